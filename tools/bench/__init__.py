"""Measure a training step by backpropagation, its rivals, and sffx: memory, arithmetic, time."""
