"""The order of the exported models, and the table of their records.

The exports themselves are tested in tests/export.
"""

from __future__ import annotations

from dataclasses import asdict

from tools.exports import LEFT_OUT, Record, family_of, listed, table

GOOD = Record(
    name="a",
    family="x",
    reason="",
    parameters=1_000,
    input="3 x 8 x 8",
    error=2e-6,
    opset=20,
    nodes=9,
    bytes=2**20,
    dynamic_size=True,
    seconds=1.5,
    date="2026-11-24",
    versions={"torch": "2"},
)
BAD = Record(
    name="b",
    family="y",
    reason="relative error 1.0e-02",
    parameters=5,
    input="3 x 8 x 8",
    error=1e-2,
    opset=20,
    nodes=9,
    bytes=2**20,
    fixed="fixed",
    seconds=1.5,
    date="2026-11-24",
    versions={"torch": "2"},
)


def test_every_model_is_listed_and_each_family_comes_first_with_its_smallest():
    names = listed()
    families = {family_of(name) for name in names}
    assert len(names) == len(set(names)) == 80
    assert {family_of(name) for name in names[: len(families)]} == families
    assert names.index("resnet18") < len(families) <= names.index("resnet34")
    assert set(LEFT_OUT) < set(names)


def test_table_counts_the_models_and_gives_the_reason_of_each_failure():
    records = [GOOD, BAD, Record("c", "y", "not run")]
    text = table([asdict(record) for record in records])
    assert "2 of 3 models, of 2 families, were tried; 1 agree with torch\n" in text
    assert "\nwithin 0.0001, the largest relative error being 2.0e-06; 1" in text
    for row in (
        "| a | 1,000 | 3 x 8 x 8 | 2.0e-06 | 20 | 9 | 1.0 | yes | 1.5 |  |",
        "| b | 5 | 3 x 8 x 8 | 1.0e-02 | 20 | 9 | 1.0 | no | 1.5 | relative error 1.0e-02 |",
        "| c | – | – | – | – | – | – | – | – | not run |",
    ):
        assert row in text
