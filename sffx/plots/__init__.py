"""Pictures of results: how a training went, and the scores of a trained model."""
