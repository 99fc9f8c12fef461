"""Count the memory and compare the time of training steps."""

from __future__ import annotations

from sffx.measure.memory import MemoryCount, MemorySplit, count_memory, mark_gradients
from sffx.measure.timing import TimeComparison, compare_time

__all__ = ["MemoryCount", "MemorySplit", "TimeComparison", "compare_time", "count_memory", "mark_gradients"]
