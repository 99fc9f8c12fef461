"""The page of all records."""

from __future__ import annotations

from collections.abc import Iterator

from tools.zoo.entries import REFUSED_GROUPS
from tools.zoo.records import Record

HEADER = """\
| zoo | models | verified | of these well cut | refused with a hint | wrong | ONNX file checked |
|---|--:|--:|--:|--:|--:|--:|"""


def table(records: list[Record]) -> str:
    """Return the records as Markdown, the counts first."""
    dates = sorted({record.date for record in records})
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    versions: dict[str, str] = {}
    for record in records:
        versions.update(record.versions)
    installed = ", ".join(f"{package} {versions[package]}" for package in sorted(versions))
    lines = [
        "# Model zoos, cut and verified",
        "",
        f"`python -m tools.zoo`, {span}, {installed}.",
        "[tools/zoo](../../zoo/__init__.py) says what verified, well cut and wrong mean.",
        "",
        HEADER,
        *_counts(records),
        "",
        "| model | parameters | feature blocks | leaves: share of the parameters | result |",
        "|---|--:|--:|---|---|",
    ]
    for record in records:
        lines.append(_row(record))
    return "\n".join(lines) + "\n"


def _kind(record: Record) -> str:
    # The groups of timm are its modules.
    is_alone = record.zoo != "torchvision" and record.group == "classification"
    if record.zoo == "timm" or is_alone:
        return record.zoo
    return f"{record.zoo}, {record.group.replace('_', ' ')}"


def _counts(records: list[Record]) -> Iterator[str]:
    """Yield a row for each kind of model."""
    for kind in dict.fromkeys(_kind(record) for record in records):
        own = [record for record in records if _kind(record) == kind]
        exported = sum(record.onnx for record in own) or "–"
        if own[0].group in REFUSED_GROUPS:
            yield f"| {kind} | {len(own)} | – | – | {_number(own, 'verified')} | – | – |"
            continue
        ran = [record for record in own if record.outcome != "idle"]
        verified = [record for record in ran if record.outcome == "verified"]
        refused, wrong = _number(ran, "refused"), _number(ran, "wrong")
        cells = [kind, str(len(ran)), _share(len(verified), len(ran)), _well_cut(verified, ran)]
        yield f"| {' | '.join(cells)} | {refused} | {wrong} | {exported} |"


def _number(records: list[Record], outcome: str) -> int:
    return sum(record.outcome == outcome for record in records)


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else "–"


def _well_cut(verified: list[Record], ran: list[Record]) -> str:
    """Return how many are well cut; older records do not count that."""
    if any(record.poor is None for record in verified):
        return "–"
    return _share(sum(record.is_good for record in verified), len(ran))


def _row(record: Record) -> str:
    cells = [
        f"{_kind(record)}: {record.name}",
        f"{record.parameters:,}",
        str(record.blocks or "–"),
        _leaves(record) or "–",
        _verdict(record).replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"


def _leaves(record: Record) -> str:
    """Return the classes of the leaves with their share of the parameters."""
    shares: dict[str, float] = {}
    for kind, share, _ in record.leaves:
        shares[kind] = shares.get(kind, 0.0) + share
    return ", ".join(f"{kind}: {share:.1%}" for kind, share in shares.items())


def _verdict(record: Record) -> str:
    if record.reason:
        return f"{record.outcome}: {record.reason.splitlines()[0][:300]}"
    verdict = "refused" if record.group in REFUSED_GROUPS else "verified"
    if record.poor:
        verdict += f", poorly cut: {', '.join(record.poor)}"
    if record.blocks < 2 and record.notes:
        verdict += f" ({'; '.join(record.notes)[:200]})"
    return verdict
