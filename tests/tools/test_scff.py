"""The loop in plain torch that tells where SCFF's accuracy comes from."""

import pytest
import torch
import torch.nn.functional as F

from tests.toys import seeded
from tools.reproduce import scff
from tools.reproduce.data import Images


def stripes(count):
    """Images of two classes: horizontal and vertical stripes."""
    with seeded():
        y = torch.randint(0, 2, (count,))
        x = 20 * torch.rand(count, 1, 28, 28)
    for image, label in zip(x, y, strict=True):
        bright = image[0] if label else image[0].T
        bright[::4] += 200
    return Images(x.to(torch.uint8), y)


@pytest.mark.parametrize("without", [[], ["triangle", "shifts", "decay"], ["goodness of ReLU"]])
def test_a_probe_reads_the_classes_off_both_layers(without, monkeypatch, tmp_path):
    monkeypatch.setattr(scff, "UNITS", 40)
    monkeypatch.setattr(scff, "load_mnist", lambda folder, size: (stripes(300), stripes(100)))
    found = scff.run(tmp_path, without, epochs=(1, 1), probe_epochs=100)
    assert set(found) == {"first layer", "second layer", "both layers"}
    assert min(found.values()) > 0.9


def test_parts_are_left_out_of_what_goes_on_and_of_the_goodness():
    z = torch.tensor([[1.0, -3.0, 5.0]])
    assert scff.TwoLayers([]).act(z).tolist() == [[0, 0, 4]]
    assert scff.TwoLayers(["triangle"]).act(z).tolist() == [[1, 0, 5]]
    assert scff.TwoLayers([]).goodness(z).tolist() == [pytest.approx(26 / 3)]
    assert scff.TwoLayers(["goodness of ReLU"]).goodness(z).tolist() == [pytest.approx(16 / 3)]


def test_halves_are_moved_by_themselves():
    images = torch.rand(6, 1, 28, 28)
    with seeded():
        still, moved = scff.pairs(images, False), scff.pairs(images, True)
    flat = images.flatten(1)
    expected = F.layer_norm(flat, flat.shape[1:])
    torch.testing.assert_close(still[:6], expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(moved[:6], still[:6])
