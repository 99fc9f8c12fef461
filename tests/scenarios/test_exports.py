"""The record of exports (`tools/exports.py`): its order and its table. The exports themselves are tested in tests/export."""

from __future__ import annotations

from dataclasses import asdict

from tools.exports import LEFT_OUT, Record, family_of, listed, table


def test_every_model_is_listed_and_each_family_comes_first_with_its_smallest():
    names = listed()
    families = {family_of(name) for name in names}
    assert len(names) == len(set(names)) == 80
    assert {family_of(name) for name in names[: len(families)]} == families
    assert names.index("resnet18") < len(families) <= names.index("resnet34")
    assert set(LEFT_OUT) < set(names)


def test_table_counts_what_was_tried_and_says_what_failed():
    good = Record(
        "a",
        "x",
        "",
        1_000,
        "3 x 8 x 8",
        2e-6,
        20,
        9,
        2**20,
        True,
        "",
        1.5,
        "2026-11-24",
        {"torch": "2"},
    )
    bad = Record(
        "b",
        "y",
        "relative error 1.0e-02",
        5,
        "3 x 8 x 8",
        1e-2,
        20,
        9,
        2**20,
        False,
        "fixed",
        1.5,
        "2026-11-24",
        {"torch": "2"},
    )
    text = table([asdict(record) for record in (good, bad, Record("c", "y", "not run"))])
    assert (
        "2 of 3 models, of 2 families, were tried; 1 agree with torch\nwithin 0.0001, the largest relative error being 2.0e-06; 1"
        in text
    )
    assert "| a | 1,000 | 3 x 8 x 8 | 2.0e-06 | 20 | 9 | 1.0 | yes | 1.5 |  |" in text
    assert (
        "| b | 5 | 3 x 8 x 8 | 1.0e-02 | 20 | 9 | 1.0 | no | 1.5 | relative error 1.0e-02 |" in text
    )
    assert "| c | – | – | – | – | – | – | – | – | not run |" in text
