"""Names, numbers and phrases as pictures show them."""

from __future__ import annotations

import pytest

from sffx.draw.words import shape_in_words, shorten


@pytest.mark.parametrize(
    ("name", "width", "short"),
    [
        ("layer1.0", 8, "layer1.0"),
        ("layer1.0", 7, "…yer1.0"),
        ("encoder.layers.11.attention", 20, "…layers.11.attention"),
        ("encoder.layers.11.attention", 19, "…11.attention"),
        ("a_name_without_any_dots", 10, "…_any_dots"),
        ("x.a_very_long_last_part", 10, "…last_part"),
    ],
)
def test_a_long_name_keeps_its_end(name: str, width: int, short: str) -> None:
    assert shorten(name, width) == short


@pytest.mark.parametrize(("shape", "words"), [((64, 56, 56), "64×56×56"), ((), "scalar")])
def test_a_shape_has_crosses(shape: tuple[int, ...], words: str) -> None:
    assert shape_in_words(shape) == words
