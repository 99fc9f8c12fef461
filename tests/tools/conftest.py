from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def few_objects_to_collect() -> None:
    """Leave what earlier tests have made out of full collections, as a timed comparison makes one.

    Late in a run a collection takes many seconds.
    """
    gc.freeze()
