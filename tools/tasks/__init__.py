"""Experiments with other tasks than classes of a sample; see `python -m tools.tasks --help`."""
