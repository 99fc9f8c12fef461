"""Channel-wise Competitive learning (CwC, AAAI 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sffx.objective import Objective


@dataclass(frozen=True)
class CwC(Objective):
    """The channels of a block are divided among the classes; each group's activity is a goodness.

    `G[n, j] = mean over the channels of group j and space of Y^2`, and the loss is cross-entropy
    with G as logits (arXiv 2312.12668, section "CwC loss"; sections 2.3.1 and 2.3.2 of the SFF
    paper). A block has no parameters beside the model's own.
    """

    name: ClassVar[str] = "cwc"
    goodness: ClassVar[str | None] = "cwc"
