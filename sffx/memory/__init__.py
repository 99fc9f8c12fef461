"""Count and predict the memory of a training step."""
