"""The calls in which a model and its cut one are compared: modes, batch sizes and other sizes."""

from __future__ import annotations

from dataclasses import replace

from sffx.comparison.batches import Batches, Sizes
from sffx.comparison.runs import Run


class Calls:
    """Makes the calls of a comparison.

    Args:
        batches: makes their inputs.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def quick(self, first: int, second: int) -> list[Run]:
        """Return two calls in train mode and one in eval mode."""
        again = self.train(second, f"train mode, {second} samples")
        return [
            self.train(first, f"train mode, {first} samples"),
            replace(again, backward=False),
            self.evaluate(second, grad=False),
        ]

    def in_train_mode(self, batches: list[int]) -> list[Run]:
        """Return the calls in train mode: the first one twice, then each other batch size."""
        runs = [
            self.train(batches[0], f"train mode, {batches[0]} samples"),
            self.train(batches[0], "train mode, the same once more"),
        ]
        for batch in batches[1:]:
            runs.append(self.train(batch, f"train mode, {batch} samples"))
        return runs

    def in_eval_mode(self, batches: list[int]) -> list[Run]:
        """Return the calls in eval mode, with and without gradients."""
        runs = []
        for batch in batches:
            runs.append(self.evaluate(batch, grad=True))
            runs.append(self.evaluate(batch, grad=False))
        return [*runs, self.evaluate(1, grad=True)]

    def train(self, batch: int, name: str) -> Run:
        """Return one call in train mode, with its gradients."""
        return Run(name, True, self._batches.draw(batch), backward=True)

    def evaluate(self, batch: int, *, grad: bool) -> Run:
        """Return one call in eval mode."""
        name = f"eval mode, {batch} samples"
        if not grad:
            name += ", no_grad"
        # Without gradients torch skips padding, as long as it lies behind the real tokens.
        values = self._batches.draw(batch, padded=not grad)
        return Run(name, False, values, grad=grad, only_elsewhere=not grad)

    def at_sizes(self, batch: int, sizes: Sizes) -> Run | None:
        """Return a call on inputs of other sizes; None if one of them is empty."""
        if min(sizes.values()) < 1:
            return None
        changed = []
        for each in self._batches.inputs:
            shape = [sizes.get((each.name, axis), size) for axis, size in enumerate(each.shape)]
            changed.append(f"{each.name} {tuple(shape)}")
        name = f"eval mode, {', '.join(changed)}"
        return Run(name, False, self._batches.draw(batch, sizes), only_elsewhere=True)
