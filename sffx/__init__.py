"""Train a PyTorch model block by block, without end-to-end backpropagation."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sffx import objectives, policies, tasks
    from sffx.api import plan, transform
    from sffx.blocks import Block, BlockPlan
    from sffx.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from sffx.comparison.check import check
    from sffx.comparison.report import CheckReport
    from sffx.errors import (
        CheckError,
        CutError,
        ExportError,
        InputError,
        MissingExtra,
        ProcessError,
        SffxError,
        TraceError,
        VerifyError,
    )
    from sffx.export.early_exit import EarlyExit, EarlyScores, ExitCurve, ExitPoint
    from sffx.export.onnx import export_onnx
    from sffx.export.program import export_program
    from sffx.export.quantize import Quantization, quantize_onnx
    from sffx.export.stages import export_early_exit
    from sffx.extraction import extract
    from sffx.learning.heads import named_head
    from sffx.learning.losses import sff_loss
    from sffx.memory.footprint import Footprint, footprint
    from sffx.memory.largest import LargestBatch, largest_batch
    from sffx.runtime.cached import CachedOutputs, cache_outputs
    from sffx.runtime.compiled import compile, compiled_blocks
    from sffx.runtime.evaluate import Evaluation, block_scores, evaluate
    from sffx.runtime.find_residency import finish
    from sffx.runtime.keywords import KeywordLoss
    from sffx.runtime.offload import offload, onload
    from sffx.runtime.optimizers import BlockPlateau, parameter_groups
    from sffx.runtime.pipeline import Pipeline
    from sffx.runtime.probe import LinearProbe
    from sffx.runtime.randomness import block_seeds
    from sffx.runtime.replicate import replicate
    from sffx.runtime.schedule import BlockSchedule
    from sffx.runtime.shard import shard
    from sffx.runtime.step import LocalLoss, block_losses, local_loss, local_step
    from sffx.runtime.weigh import weigh

__version__ = "0.2.0"

__all__ = [
    "Block",
    "BlockPlan",
    "BlockPlateau",
    "BlockSchedule",
    "CachedOutputs",
    "CheckError",
    "CheckReport",
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
    "KeywordLoss",
    "LargestBatch",
    "LinearProbe",
    "LocalLoss",
    "MissingExtra",
    "Pipeline",
    "ProcessError",
    "Quantization",
    "SffxError",
    "TraceError",
    "VerifyError",
    "block_losses",
    "block_scores",
    "block_seeds",
    "cache_outputs",
    "check",
    "compile",
    "compiled_blocks",
    "evaluate",
    "export_early_exit",
    "export_onnx",
    "export_program",
    "extract",
    "finish",
    "footprint",
    "largest_batch",
    "load_checkpoint",
    "local_loss",
    "local_step",
    "named_head",
    "objectives",
    "offload",
    "onload",
    "parameter_groups",
    "plan",
    "policies",
    "quantize_onnx",
    "replicate",
    "save_checkpoint",
    "sff_loss",
    "shard",
    "tasks",
    "transform",
    "weigh",
]

# The module of each public name. A name is imported when it is first used, so that `--help` of the
# commands does not wait for torch.
_MODULE_OF = {
    "Block": "sffx.blocks",
    "BlockPlan": "sffx.blocks",
    "BlockPlateau": "sffx.runtime.optimizers",
    "BlockSchedule": "sffx.runtime.schedule",
    "CachedOutputs": "sffx.runtime.cached",
    "CheckError": "sffx.errors",
    "CheckReport": "sffx.comparison.report",
    "Checkpoint": "sffx.checkpoint",
    "CutError": "sffx.errors",
    "EarlyExit": "sffx.export.early_exit",
    "EarlyScores": "sffx.export.early_exit",
    "Evaluation": "sffx.runtime.evaluate",
    "ExitCurve": "sffx.export.early_exit",
    "ExitPoint": "sffx.export.early_exit",
    "ExportError": "sffx.errors",
    "Footprint": "sffx.memory.footprint",
    "InputError": "sffx.errors",
    "KeywordLoss": "sffx.runtime.keywords",
    "LargestBatch": "sffx.memory.largest",
    "LinearProbe": "sffx.runtime.probe",
    "LocalLoss": "sffx.runtime.step",
    "MissingExtra": "sffx.errors",
    "Pipeline": "sffx.runtime.pipeline",
    "ProcessError": "sffx.errors",
    "Quantization": "sffx.export.quantize",
    "SffxError": "sffx.errors",
    "TraceError": "sffx.errors",
    "VerifyError": "sffx.errors",
    "block_losses": "sffx.runtime.step",
    "block_scores": "sffx.runtime.evaluate",
    "block_seeds": "sffx.runtime.randomness",
    "cache_outputs": "sffx.runtime.cached",
    "check": "sffx.comparison.check",
    "compile": "sffx.runtime.compiled",
    "compiled_blocks": "sffx.runtime.compiled",
    "evaluate": "sffx.runtime.evaluate",
    "export_early_exit": "sffx.export.stages",
    "export_onnx": "sffx.export.onnx",
    "export_program": "sffx.export.program",
    "extract": "sffx.extraction",
    "finish": "sffx.runtime.find_residency",
    "footprint": "sffx.memory.footprint",
    "largest_batch": "sffx.memory.largest",
    "load_checkpoint": "sffx.checkpoint",
    "local_loss": "sffx.runtime.step",
    "local_step": "sffx.runtime.step",
    "named_head": "sffx.learning.heads",
    "objectives": "sffx.objectives",
    "offload": "sffx.runtime.offload",
    "onload": "sffx.runtime.offload",
    "parameter_groups": "sffx.runtime.optimizers",
    "plan": "sffx.api",
    "policies": "sffx.policies",
    "quantize_onnx": "sffx.export.quantize",
    "replicate": "sffx.runtime.replicate",
    "save_checkpoint": "sffx.checkpoint",
    "sff_loss": "sffx.learning.losses",
    "shard": "sffx.runtime.shard",
    "tasks": "sffx.tasks",
    "transform": "sffx.api",
    "weigh": "sffx.runtime.weigh",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sffx' has no attribute {name!r}")
    module = import_module(_MODULE_OF[name])
    # Three of the names are modules themselves.
    is_module = name in ("objectives", "policies", "tasks")
    value = module if is_module else getattr(module, name)
    # From now on Python finds the name without calling this function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
