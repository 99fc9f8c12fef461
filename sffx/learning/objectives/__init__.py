"""How the blocks learn: Scalable Forward-Forward, and the methods that it grew out of."""
