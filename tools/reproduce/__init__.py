"""The experiments of the paper (arXiv 2501.03176) on this library's public face: `python -m tools.reproduce --help`."""
