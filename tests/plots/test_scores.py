"""Confusion and goodness: the numbers against ones computed by hand, and the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import sffx
from sffx.errors import InputError
from sffx.plots.scores import OTHERS, confusion, goodnesses, plot_confusion, plot_goodness
from sffx.runtime.evaluate import block_scores


def cut(classes: int = 3) -> fx.GraphModule:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))
    return sffx.transform(model, "batchnorm", example_input=torch.zeros(1, 1, 8, 8))


def batches(classes: int = 3, sizes: tuple[int, ...] = (5, 4)) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(size, 1, 8, 8), torch.randint(classes - 1, (size,))) for size in sizes]


def test_confusion_counts_what_the_ensemble_takes_for_what() -> None:
    net, loader = cut(), batches()
    expected = torch.zeros(3, 3, dtype=torch.float64)
    net.eval()
    for x, y in loader:
        for true, predicted in zip(y.tolist(), net(x).argmax(dim=1).tolist(), strict=True):
            expected[true, predicted] += 1
    expected[:2] /= expected[:2].sum(dim=1, keepdim=True)
    assert torch.equal(confusion(net, loader), expected)
    assert expected[2].tolist() == [0, 0, 0]


def test_goodness_of_the_true_class_and_of_the_others_is_parted() -> None:
    net, loader = cut(), batches(sizes=(5,))
    true, others = goodnesses(net, loader)
    ((x, y),) = loader
    with torch.no_grad():
        scores = block_scores(net.eval(), x)[:-1]
    assert torch.equal(
        true, torch.stack([scores[:, n, int(label)] for n, label in enumerate(y)], dim=1)
    )
    assert others.shape == (len(net.plan), 5 * 2)
    torch.testing.assert_close(true.sum() + others.sum(), scores.sum())


def test_of_many_classes_some_are_looked_at_and_never_the_true_one() -> None:
    net = cut(100)
    ((x, y),) = batches(100, (2,))
    true, others = goodnesses(net, [(x, y)])
    assert others.shape == (len(net.plan), 2 * OTHERS)
    assert not torch.isin(true[0], others[0]).any()


def test_the_mode_of_every_module_is_as_before() -> None:
    net = cut().train()
    net.block_0.eval()
    modes = [module.training for module in net.modules()]
    confusion(net, batches())
    goodnesses(net, batches())
    assert [module.training for module in net.modules()] == modes


@pytest.mark.parametrize("plot", [plot_confusion, plot_goodness])
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml")])
def test_each_format_is_written(plot: Any, suffix: str, start: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert plot(cut(), batches(), tmp_path / f"plot{suffix}").read_bytes().startswith(start)


def test_the_names_of_the_classes_are_shown(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = plot_confusion(
        cut(), batches(), tmp_path / "confusion.svg", classes=["cat", "dog", "eel"]
    ).read_text()
    assert all(f"<!-- {name} -->" in text for name in ("cat", "dog", "eel"))


def test_any_name_of_a_class_stays_text(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = ["US$ and A$", r"$\nothing$", "<b>"]
    drawn = plot_confusion(cut(), batches(), tmp_path / "confusion.svg", names).read_text()
    assert "<!-- US$ and A$ -->" in drawn
    assert r"<!-- $\nothing$ -->" in drawn


@pytest.mark.parametrize("classes", ["cat", 3, {"cat": 2, "dog": 0, "eel": 1}, {"a", "b", "c"}])
def test_names_without_an_order_are_refused(classes: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"classes is a \w+, no list of names\. Hint"):
        plot_confusion(cut(), batches(), tmp_path / "plot.png", classes)


@pytest.mark.parametrize("plot", [plot_confusion, plot_goodness])
def test_a_net_in_a_wrapper_is_plotted(plot: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = torch.optim.swa_utils.AveragedModel(cut())
    assert plot(net, batches(), tmp_path / "plot.png").is_file()


@pytest.mark.parametrize("plot", [plot_confusion, plot_goodness])
def test_what_cannot_be_plotted_is_refused(plot: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match="not a cut model"):
        plot(nn.Linear(1, 1), batches(), tmp_path / "plot.png")
    with pytest.raises(InputError, match="no samples"):
        plot(cut(), [], tmp_path / "plot.png")
    with pytest.raises(InputError, match="unknown"):
        plot(cut(), batches(), tmp_path / "plot.html")
    assert list(tmp_path.iterdir()) == []


def test_the_number_of_names_must_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="classes has 2 names, but the net tells 3 classes apart"):
        plot_confusion(cut(), batches(), tmp_path / "plot.png", classes=["a", "b"])
