"""Train a PyTorch model block by block, without end-to-end backpropagation."""

from sffx import policies
from sffx.api import plan, transform
from sffx.blocks import Block, BlockPlan
from sffx.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sffx.errors import (
    CutError,
    ExportError,
    InputError,
    MissingExtra,
    SffxError,
    TraceError,
    VerifyError,
)
from sffx.export.early_exit import EarlyExit, EarlyScores, ExitCurve, ExitPoint
from sffx.export.onnx import export_onnx
from sffx.export.program import export_program
from sffx.export.quantize import Quantization, quantize_onnx
from sffx.export.stages import export_early_exit
from sffx.extract import extract
from sffx.learning.losses import sff_loss
from sffx.memory.footprint import Footprint, footprint
from sffx.runtime.evaluate import Evaluation, evaluate
from sffx.runtime.offload import offload, onload
from sffx.runtime.optimizers import BlockPlateau, parameter_groups
from sffx.runtime.shard import shard
from sffx.runtime.step import LocalLoss, local_loss, local_step
from sffx.runtime.weigh import weigh

__all__ = [
    "Block",
    "BlockPlan",
    "BlockPlateau",
    "Checkpoint",
    "CutError",
    "EarlyExit",
    "EarlyScores",
    "Evaluation",
    "ExitCurve",
    "ExitPoint",
    "ExportError",
    "Footprint",
    "InputError",
    "LocalLoss",
    "MissingExtra",
    "Quantization",
    "SffxError",
    "TraceError",
    "VerifyError",
    "evaluate",
    "export_early_exit",
    "export_onnx",
    "export_program",
    "extract",
    "footprint",
    "load_checkpoint",
    "local_loss",
    "local_step",
    "offload",
    "onload",
    "parameter_groups",
    "plan",
    "policies",
    "quantize_onnx",
    "save_checkpoint",
    "sff_loss",
    "shard",
    "transform",
    "weigh",
]
