"""A model on paper of blocks that train in parallel, and of the other ways."""
