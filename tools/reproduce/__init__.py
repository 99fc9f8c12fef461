"""The experiments of the paper (arXiv 2501.03176) on this library: `python -m tools.reproduce`."""
