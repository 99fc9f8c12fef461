"""Objectives: how the blocks of a cut model learn, as `transform(objective=...)` takes them.

A name stands for an objective with its published options: "sff", "cwc", "ff". An object has options
of its own, as `ForwardForward(labels="waves")`. The contract of an objective that you write is in
`sffx.objective`.
"""

from sffx.learning.objectives.channelwise import CwC
from sffx.learning.objectives.forward_forward import ForwardForward
from sffx.objective import SFF, Batch, Objective, Place

__all__ = ["SFF", "Batch", "CwC", "ForwardForward", "Objective", "Place"]
