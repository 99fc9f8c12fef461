"""Objectives: how the blocks of a cut model learn, as `transform(objective=...)` takes them.

A name stands for an objective with its published options:

- "sff": `SFF`, Scalable Forward-Forward, the default;
- "cwc": `CwC`, channel-wise competitive learning;
- "ff": `ForwardForward`, with labels in the input;
- "ff-unsupervised": `UnsupervisedForwardForward`, without labels.

An object has options of its own, as `ForwardForward(labels="waves")`. The contract of an objective
that you write is in `sffx.objective`.
"""

from sffx.learning.objectives.channelwise import CwC
from sffx.learning.objectives.forward_forward import ForwardForward
from sffx.learning.objectives.unsupervised import UnsupervisedForwardForward
from sffx.objective import SFF, Batch, Objective, Place

__all__ = [
    "SFF",
    "Batch",
    "CwC",
    "ForwardForward",
    "Objective",
    "Place",
    "UnsupervisedForwardForward",
]
