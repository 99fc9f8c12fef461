"""What a model needs values for, where memory is counted on fake tensors, which have none."""

from __future__ import annotations

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from sffx.errors import location

# Of what torch and `sffx.compiler.fake` raise where code outside of torch reads a fake tensor.
_READS = (
    ".numpy() is not supported for tensor subclasses",
    "data is not allocated yet",
    "access data pointer",
    "has no values for a function",
)


def why_values_are_needed(failure: BaseException) -> str:
    """Return what in a model depends on values, and the line of it; "" for another failure."""
    reason = ""
    if isinstance(failure, DataDependentOutputException):
        reason = "a branch or a plain number depends on the values of a tensor"
    elif isinstance(failure, DynamicOutputShapeException):
        reason = "a shape depends on the values of a tensor"
    elif any(words in str(failure) for words in _READS):
        reason = "code outside of torch reads the values of a tensor"
    return f"{reason} ({location(failure)})" if reason else ""
