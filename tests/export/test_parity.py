"""The comparison of an exported file with torch."""

import pytest
import torch

from sffx.errors import ExportError
from sffx.export.parity import require_parity

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("blocks", [(), (3,)])
def test_scores_of_padded_tokens_are_not_compared(blocks):
    expected = torch.randn(*blocks, 2, 3, 4)
    padded = expected + (MASK == 0)[..., None]
    require_parity(padded, expected, 1e-4, "there", mask=MASK)
    for mask in (None, torch.ones_like(MASK)):
        with pytest.raises(ExportError, match="differ by a relative error"):
            require_parity(padded, expected, 1e-4, "there", mask=mask)
    with pytest.raises(ExportError, match="differ by a relative error"):
        require_parity(expected + MASK[..., None], expected, 1e-4, "there", mask=MASK)


def test_scores_that_are_nan_compare_nothing():
    expected = torch.randn(2, 3, 4)
    expected[1, 1:] = torch.nan  # padding, which the mask leaves out
    require_parity(expected, expected, 1e-4, "there", mask=MASK)
    with pytest.raises(ExportError, match="torch's own scores are nan there"):
        require_parity(expected, expected, 1e-4, "there")


def test_scores_of_samples_are_compared_whole():
    # As many classes as tokens.
    expected = torch.randn(2, 3)
    with pytest.raises(ExportError, match="differ by a relative error"):
        require_parity(expected + (MASK == 0), expected, 1e-4, "there", mask=MASK)
