"""Train a PyTorch model block by block, without end-to-end backpropagation."""

from sffx.compiler.plan import Block, BlockPlan
from sffx.learning.losses import sff_loss
from sffx.transform import plan, transform

__all__ = ["Block", "BlockPlan", "plan", "sff_loss", "transform"]
