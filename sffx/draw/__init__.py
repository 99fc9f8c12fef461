"""Pictures of block plans."""
