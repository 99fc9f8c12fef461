"""What a comparison of a model and its cut one has found."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from sffx.tables import Column, html_table, text_table

_COLUMNS = (Column("compared", align="left"), Column("largest relative error"))


@dataclass(frozen=True)
class Difference:
    """The first thing in which a cut model differs from the model.

    Attributes:
        where: the comparison that found it, such as "train mode, 4 samples".
        error: the largest relative error; infinite where there is no number to compare.
        problem: what differs, in words.
        block: the part of the cut model in which the values part, such as "block_3"; "" if unknown.
        node: the first node of that block whose value the model does not compute; "" if unknown.
        module: qualname of the module of the original model that the node belongs to, or that
            owns the parameter or buffer; "" if unknown.
        hint: what to do about it.
        only_elsewhere: whether the cut model is right for training and evaluation on inputs like
            the example. It differs in something else: at another size, under `torch.no_grad()`
            alone, or in which hooks it calls.
    """

    where: str
    error: float
    problem: str
    block: str = ""
    node: str = ""
    module: str = ""
    hint: str = ""
    only_elsewhere: bool = False

    def __str__(self) -> str:
        text = f"the cut model differs from the model in {self.where}: {self.problem}"
        if self.error < float("inf"):
            text += f" (relative error {self.error:.1e})"
        if self.node:
            text += f". The values part at node {self.node!r} of {self.block}"
        elif self.block:
            text += f". It is in {self.block}"
        if self.module:
            text += f", in the model's module {self.module!r}"
        elif self.node:
            text += ", in the model's own forward"
        return f"{text}. Hint: {self.hint}" if self.hint else text


@dataclass(frozen=True)
class CheckReport:
    """What `sffx.check` compared and found. Prints as a table.

    Attributes:
        errors: the largest relative error of each comparison, by its name.
        skipped: what was not compared, and why, by its name.
        differences: what differs, the first of each part of the check.
    """

    errors: dict[str, float]
    skipped: dict[str, str]
    differences: tuple[Difference, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.differences

    @property
    def difference(self) -> Difference | None:
        """The difference that matters most: in training and evaluation first, else the first."""
        for each in self.differences:
            if not each.only_elsewhere:
                return each
        return self.differences[0] if self.differences else None

    def __str__(self) -> str:
        return "\n".join([text_table(_COLUMNS, self._rows()), *self._remarks()])

    def _repr_html_(self) -> str:
        """Return the same table for a notebook."""
        remarks = [f"<p>{escape(remark)}</p>" for remark in self._remarks()]
        return html_table(_COLUMNS, self._rows()) + "".join(remarks)

    def _rows(self) -> list[tuple[str, str]]:
        return [(name, f"{error:.1e}") for name, error in self.errors.items()]

    def _remarks(self) -> list[str]:
        lines = [f"not compared: {name}: {reason}" for name, reason in self.skipped.items()]
        return lines + [f"DIFFERENT: {difference}" for difference in self.differences]
