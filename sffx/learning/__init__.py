"""What a block learns by: heads, losses, norms and readouts. Nothing here knows of graphs."""
