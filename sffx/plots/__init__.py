"""Pictures of results: how a training went, and what a trained model says."""
