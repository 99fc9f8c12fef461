from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from sffx.compiler.trace.randomness import call_without_draws, generators_restored
from sffx.compiler.trace.trace import trace
from tests.compiler.trace.oracle import Applies
from tests.toys import around

DRAWS = [random.random, np.random.rand, lambda: torch.rand(()).item()]


def _states() -> tuple[object, ...]:
    return random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()


@pytest.mark.parametrize("draw", DRAWS)
def test_random_numbers_drawn_on_the_side_make_a_leaf(draw):
    model = around(Applies(lambda m, x: x * draw()))
    before = _states()
    assert [leaf.qualname for leaf in trace(model).leaves] == ["2"]
    assert _states() == before


@pytest.mark.parametrize("draw", DRAWS)
def test_generators_are_restored_and_a_draw_is_refused(draw):
    before = _states()
    with generators_restored():
        with pytest.raises(RuntimeError, match="draws random numbers"):
            call_without_draws(draw)
        assert _states() != before
    assert _states() == before
    assert call_without_draws(lambda: 3) == 3
