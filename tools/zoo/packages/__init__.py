"""One module for each package of models."""
