"""What a comparison has found so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from sffx.comparison.locate import Place
from sffx.comparison.report import CheckReport, Difference

HINT = (
    "look at what its forward does there that a graph cannot hold: state that it changes, a branch "
    "on sizes, a write in place, a method that the class or the instance overrides. Rewrite that, "
    "or report it to sffx with the model"
)


@dataclass
class Findings:
    """Gathers what `CheckReport` reports.

    Attributes:
        notes: of the plan. They say where the cut model is known to differ.
        errors: the largest relative error of each comparison, by its name.
        skipped: what was not compared, and why, by its name.
        differences: what differs.
    """

    notes: tuple[str, ...]
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    differences: list[Difference] = field(default_factory=list)

    @property
    def is_wrong(self) -> bool:
        """Whether something differs in training or evaluation on inputs like the example."""
        return any(not each.only_elsewhere for each in self.differences)

    def differ(
        self,
        where: str,
        problem: str,
        error: float = float("inf"),
        place: Place | None = None,
        hint: str = HINT,
        only_elsewhere: bool = False,
    ) -> None:
        """Add a difference. The arguments are the attributes of `Difference`."""
        place = place or Place()
        difference = Difference(
            where=where,
            error=error,
            problem=problem,
            block=place.block,
            node=place.node,
            module=place.module,
            hint=hint,
            only_elsewhere=only_elsewhere,
        )
        self.differences.append(difference)

    def skip(self, name: str, reason: str) -> None:
        """Note why something was not compared."""
        self.skipped[name] = reason

    def is_noted(self, words: str) -> bool:
        """Return whether a note of the plan has some words."""
        return any(words in note for note in self.notes)

    def report(self) -> CheckReport:
        """Return what was found."""
        return CheckReport(self.errors, self.skipped, tuple(self.differences))
