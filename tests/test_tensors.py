from __future__ import annotations

import torch

from sffx.tensors import can_learn, storage_key


def test_views_share_the_key_of_their_storage():
    x, y = torch.zeros(6), torch.zeros(6)
    assert storage_key(x.view(2, 3)[1]) == storage_key(x)
    assert storage_key(y) != storage_key(x)


def test_floats_and_complex_numbers_can_learn():
    dtypes = (torch.float16, torch.complex64, torch.int64, torch.bool)
    assert [can_learn(torch.zeros(1, dtype=dtype)) for dtype in dtypes] == [
        True,
        True,
        False,
        False,
    ]
