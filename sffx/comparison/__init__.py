"""Compare a cut model with the model that it was made from, on real numbers."""
