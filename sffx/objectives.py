"""Objectives: how the blocks of a cut model learn, as `transform(objective=...)` takes them.

A name stands for an objective with its published options:

- "sff": `SFF`, Scalable Forward-Forward, the default;
- "cwc": `CwC`, channel-wise competitive learning;
- "ff": `ForwardForward`, with labels in the input;
- "ff-unsupervised": `UnsupervisedForwardForward`, without labels;
- "scff": `SCFF`, without labels, by pairs of samples;
- "ffcl": `FFCL`, two nets side by side, with one loss for each pair of blocks;
- "cffa": `CFFA`, with labels in the input and a threshold that learns.

An object has options of its own, as `ForwardForward(labels="waves")`. The contract of an objective
that you write is in `sffx.objective`.
"""

from sffx.learning.objectives.channelwise import CwC
from sffx.learning.objectives.directional import CFFA
from sffx.learning.objectives.forward_forward import ForwardForward
from sffx.learning.objectives.pairs import FFCL
from sffx.learning.objectives.self_contrastive import SCFF
from sffx.learning.objectives.unsupervised import UnsupervisedForwardForward
from sffx.objective import SFF, Batch, Objective, Place

__all__ = [
    "CFFA",
    "FFCL",
    "SCFF",
    "SFF",
    "Batch",
    "CwC",
    "ForwardForward",
    "Objective",
    "Place",
    "UnsupervisedForwardForward",
]
