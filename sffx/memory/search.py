"""Find the blocks of a plan that stay within a memory budget, by dynamic programming.

The search goes through the places of a model in order (see `costs`). For each place it holds the
*paths* that lead there: blocks that follow each other from the start. A path is dropped if another
one to the same place is no larger in any respect, since each way on from there is no better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sffx.memory.costs import START, BlockCosts, Owned, Place, Span
from sffx.memory.footprint import UPDATE


@dataclass(frozen=True)
class Path:
    """Blocks from the start of the model on, and what a training step holds in them, in bytes.

    Attributes:
        spans: the blocks.
        lasting: what is held all the time: parameters, the optimizer's state, the input batch.
        gradients: of the blocks so far.
        running: the peak so far, without what is lasting.
        largest: the largest parameter of the model and of the heads so far.
    """

    spans: tuple[Span, ...]
    lasting: int
    gradients: int
    running: int
    largest: int

    @property
    def peak(self) -> int:
        """The peak of a step as far as it has come."""
        return self.lasting + self.running

    @property
    def sizes(self) -> tuple[int, ...]:
        """The respects in which a path may be better than another one to the same place."""
        return self.lasting, self.gradients, self.running, self.largest


class Search:
    """Finds paths to the logits.

    Spans that were not counted have lower bounds. So the best path is a guess as long as one of its
    spans was not counted. Then its blocks are counted, and the search is repeated. A path is
    returned once all its blocks were counted, in the very plan that they make.
    """

    def __init__(self, costs: BlockCosts) -> None:
        self.costs = costs

    def coarsest(self, allowed: int) -> Path | None:
        """Return the path of fewest blocks within a number of bytes, None if there is none.

        Among paths of as few blocks, it is the one of the least peak.
        """
        return self._settled(allowed, lambda path: (len(path.spans), path.peak))

    def smallest(self) -> Path:
        """Return the path of the least peak; among those, the one of the fewest blocks."""
        path = self._settled(None, lambda path: (path.peak, len(path.spans)))
        # Without a limit there is always a path.
        assert path is not None
        return path

    def _settled(self, allowed: int | None, rank: Callable[[Path], tuple[int, int]]) -> Path | None:
        """Return the first path by some order whose blocks were all counted in its plan."""
        while True:
            paths = self._paths(allowed)
            if not paths:
                return None
            best = min(paths, key=rank)
            is_counted = all(self.costs.is_counted(span) for span in best.spans)
            if not is_counted:
                self.costs.count(best.spans)
            elif not self._grows(best):
                return best

    def _grows(self, path: Path) -> bool:
        """Return whether a block takes more in the plan of a path than it did where it was counted.

        Whether a block recomputes depends on its size relative to the largest block of the plan.
        """
        before = [self.costs.running(span) for span in path.spans]
        self.costs.count(path.spans, again=True)
        return before != [self.costs.running(span) for span in path.spans]

    def _paths(self, allowed: int | None) -> list[Path]:
        """Return the paths to the logits within a number of bytes that no other is better than."""
        start = Path(
            spans=(),
            lasting=self.costs.model.lasting + self.costs.input_bytes,
            gradients=0,
            running=0,
            largest=self.costs.model.largest,
        )
        paths: dict[Place, list[Path]] = {START: [start]}
        for place in self.costs.places:
            reached = self._paths_to(place, paths, allowed)
            paths[place] = _undominated(reached, by_length=allowed is not None)
        return paths[self.costs.places[-1]]

    def _paths_to(
        self, place: Place, paths: dict[Place, list[Path]], allowed: int | None
    ) -> list[Path]:
        """Return the paths to a place, each one block longer than one to an earlier place."""
        reached = []
        for span, bound in self.costs.bounds[place].items():
            start = span[0]
            for path in paths.get(start, []):
                least = path.lasting + path.gradients + bound
                if allowed is not None and least > allowed:
                    continue  # it would be too large, whatever its head
                longer = self._extended(path, span)
                if allowed is None or longer.peak <= allowed:
                    reached.append(longer)
        return reached

    def _extended(self, path: Path, span: Span) -> Path:
        """Return the path with one more block; the optimizer's step follows the last one."""
        end = span[1]
        head = self.costs.heads.get(end, Owned())  # the classifier has none
        gradients = path.gradients + self.costs.trainable(span) + head.trainable
        largest = max(path.largest, head.largest)
        # While a block runs, the gradients of the blocks before it are held.
        while_it_runs = path.gradients + self.costs.running(span)
        running = max(path.running, while_it_runs)
        logits = self.costs.places[-1]
        if end == logits:
            while_it_updates = gradients + UPDATE * largest
            running = max(running, while_it_updates)
        return Path(
            spans=(*path.spans, span),
            lasting=path.lasting + head.lasting,
            gradients=gradients,
            running=running,
            largest=largest,
        )


def _undominated(paths: list[Path], *, by_length: bool) -> list[Path]:
    """Return the paths to a place without those that another one is as good as in all respects.

    Args:
        paths: all to the same place.
        by_length: whether the number of blocks is one of the respects.
    """

    def respects(path: Path) -> tuple[int, ...]:
        length = len(path.spans) if by_length else 0
        return (length, *path.sizes)

    kept: list[Path] = []
    # A path can only be beaten by one that comes before it in this order.
    for path in sorted(paths, key=respects):
        is_beaten = any(_no_larger(respects(other), respects(path)) for other in kept)
        if not is_beaten:
            kept.append(path)
    return kept


def _no_larger(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Return whether one path is as good as another in all respects."""
    return all(a <= b for a, b in zip(one, other, strict=True))
