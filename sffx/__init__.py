"""Train a PyTorch model block by block, without end-to-end backpropagation."""

from sffx import policies
from sffx.compiler.plan import Block, BlockPlan
from sffx.errors import CutError, ExportError, InputError, MissingExtra, SffxError, TraceError, VerifyError
from sffx.export.early_exit import EarlyExit, EarlyScores, ExitCurve, ExitPoint
from sffx.export.extract import extract
from sffx.export.onnx import export_onnx
from sffx.export.program import export_program
from sffx.export.quantize import Quantization, quantize_onnx
from sffx.export.stages import export_early_exit
from sffx.footprint import Footprint, footprint
from sffx.learning.losses import sff_loss
from sffx.training.evaluate import Evaluation, evaluate
from sffx.training.groups import BlockPlateau, parameter_groups
from sffx.training.local import LocalLoss, local_loss, local_step
from sffx.training.parking import park, unpark
from sffx.training.sharding import shard
from sffx.training.weighing import weigh
from sffx.transform import plan, transform

__all__ = [
    "Block",
    "BlockPlan",
    "BlockPlateau",
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
    "local_loss",
    "local_step",
    "parameter_groups",
    "park",
    "plan",
    "policies",
    "quantize_onnx",
    "sff_loss",
    "shard",
    "transform",
    "unpark",
    "weigh",
]
