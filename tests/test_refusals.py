"""Wrong arguments of public functions end in an error of sffx, which names a way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import sffx
from sffx.draw.render import draw

X = torch.zeros(4, 4)
Y = torch.tensor([0, 1, 2, 0])
ADAMW = torch.optim.AdamW


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def net() -> fx.GraphModule:
    return sffx.transform(model(), "layer", X).train()


def optimizer(net: fx.GraphModule) -> torch.optim.Optimizer:
    return ADAMW(sffx.parameter_groups(net, 1e-3))


def a_scalar(goodness: Any, y: Any) -> Any:
    return 1.0


def nothing(goodness: Any, y: Any) -> None:
    pass


def without_values(net: fx.GraphModule) -> None:
    with torch.device("meta"):
        meta = sffx.transform(model(), "layer", torch.zeros(2, 4))
    sffx.export_onnx(meta, "a.onnx")


def wrong_weights(net: fx.GraphModule, weights: Any) -> None:
    net.load_state_dict({**net.state_dict(), "readout.weights": weights})


def without_end() -> list[Any]:
    """Return a list that holds itself."""
    own: list[Any] = []
    own.append(own)
    return own


def with_attribute_without_end(net: fx.GraphModule) -> None:
    holding = model()
    holding[0].registry = {"all": without_end()}
    sffx.transform(holding, "layer", torch.zeros(2, 4))


def loss(y: Any, loss_fn: Any = None) -> Callable[[fx.GraphModule], object]:
    return lambda net: sffx.local_loss(net, X, y, loss_fn)


def onnx(**options: Any) -> Callable[[fx.GraphModule], object]:
    return lambda net: sffx.export_onnx(net, "a.onnx", **options)


def program(**options: Any) -> Callable[[fx.GraphModule], object]:
    return lambda net: sffx.export_program(net, "a.pt2", **options)


def early(x: Any) -> Callable[[fx.GraphModule], object]:
    return lambda net: sffx.EarlyExit(net)(x)


CALLS: dict[str, Callable[[fx.GraphModule], object]] = {
    "norm a list": lambda net: sffx.transform(model(), "layer", X, norm=["layer"]),
    "goodness a list": lambda net: sffx.transform(model(), "layer", X, goodness=["sff"]),
    "policy a number": lambda net: sffx.transform(model(), 3, X),
    "a model without an end": with_attribute_without_end,
    "a batch without an end": lambda net: sffx.evaluate(net, [(without_end(), Y)]),
    "x a scalar": lambda net: sffx.local_loss(net, torch.tensor(1.0), Y),
    "x None": lambda net: sffx.local_loss(net, None, Y),
    "x on another device": lambda net: sffx.local_loss(net, X.to("meta"), Y),
    "y unsigned": loss(Y.to(torch.uint64)),
    "y complex": loss(Y.to(torch.complex64)),
    "y of float64": loss(Y.double()),
    "y bool": loss(Y.bool()),
    "y a list": loss([0, 1, 2, 0]),
    "y None": loss(None),
    "y on another device": loss(Y.to("meta")),
    "loss_fn returns None": loss(Y, nothing),
    "loss_fn returns a number": loss(Y, a_scalar),
    "loss_fn a name": loss(Y, "ce"),
    "loss_fn a class": loss(Y, nn.CrossEntropyLoss),
    "loss_fn a number": loss(Y, 3),
    "loss_fn by name, a number": loss(Y, {"block_0": 3}),
    "loss_fn in a list, a class": loss(Y, [None, nn.CrossEntropyLoss]),
    "sff_loss of a class": lambda net: sffx.sff_loss(net(X), Y, nn.CrossEntropyLoss),
    "step without an optimizer": lambda net: sffx.local_step(net, X, Y, None),
    "step with a class": lambda net: sffx.local_step(net, X, Y, ADAMW),
    "step with a list": lambda net: sffx.local_step(net, X, Y, [optimizer(net)]),
    "step with a mapping of classes": lambda net: sffx.local_step(
        net, X, Y, {"block_0": ADAMW, "classifier": ADAMW}
    ),
    "offload without an optimizer": lambda net: sffx.offload(net, None),
    "offload with a class": lambda net: sffx.offload(net, ADAMW),
    "offload to an unknown device": lambda net: sffx.offload(net, optimizer(net), "gpu9"),
    "offload to a number": lambda net: sffx.offload(net, optimizer(net), 3.5),
    "shard without processes": lambda net: sffx.shard(net),
    "replicate without processes": lambda net: sffx.replicate(net),
    "evaluate with nobody": lambda net: sffx.evaluate(net, [(X, Y)], group="all"),
    "finish alone": lambda net: sffx.finish(net),
    "lr a string": lambda net: sffx.parameter_groups(net, "1e-3"),
    "lr None": lambda net: sffx.parameter_groups(net, None),
    "classifier_lr a string": lambda net: sffx.parameter_groups(net, 1e-3, "1"),
    "plateau without an optimizer": lambda net: sffx.BlockPlateau(None),
    "plateau of a state None": lambda net: sffx.BlockPlateau(optimizer(net)).load_state_dict(None),
    "plateau with an unknown option": lambda net: sffx.BlockPlateau(optimizer(net), foo=1),
    "plateau with a wrong factor": lambda net: sffx.BlockPlateau(optimizer(net), factor=2.0),
    "evaluate None": lambda net: sffx.evaluate(net, None),
    "evaluate a number": lambda net: sffx.evaluate(net, 3),
    "weigh None": lambda net: sffx.weigh(net, None),
    "early exit of None": early(None),
    "early exit of a scalar": early(torch.tensor(1.0)),
    "early exit of another width": early(X[:, :2]),
    "early exit of another dtype": early(X.to(torch.uint8)),
    "early exit on another device": early(X.to("meta")),
    "curve of None": lambda net: sffx.EarlyExit(net).curve(None),
    "curve of an empty batch": lambda net: sffx.EarlyExit(net).curve([(X[:0], Y[:0])]),
    "curve of names": lambda net: sffx.EarlyExit(net).curve([(X, Y)], ["a"]),
    "curve of a number": lambda net: sffx.EarlyExit(net).curve([(X, Y)], 0.5),
    "export to None": lambda net: sffx.export_onnx(net, None),
    "export to a number": lambda net: sffx.export_program(net, 3),
    "export of an early exit to None": lambda net: sffx.export_early_exit(net, None),
    "export to a long name": lambda net: sffx.export_onnx(net, "a" * 300),
    "load of an early exit from None": lambda net: sffx.EarlyExit.load(None),
    "class names an iterator": onnx(class_names=iter("abc")),
    "class names a number": onnx(class_names=3),
    "class name with a lone surrogate": onnx(class_names=["\ud800", "b", "c"]),
    "mean a number": onnx(mean=0.5, std=0.5),
    "mean of names": onnx(mean=["a"], std=["b"]),
    "std an iterator": onnx(mean=[0.5], std=iter([0.5])),
    "tolerance a string": onnx(tolerance="x"),
    "tolerance None": program(tolerance=None),
    "parameters without values": without_values,
    "weights a string": lambda net: wrong_weights(net, "x"),
    "weights a matrix": lambda net: wrong_weights(net, torch.ones(2, 2)),
    "weights of zero": lambda net: wrong_weights(net, torch.zeros(1)),
    "draw to None": lambda net: draw(net, None),
    "draw to a number": lambda net: draw(net, 3),
    "save to None": lambda net: sffx.save_checkpoint(None, net),
    "load from None": lambda net: sffx.load_checkpoint(None),
    "load from a number": lambda net: sffx.load_checkpoint(3.5),
    "quantise None": lambda net: sffx.quantize_onnx(None, "a.onnx", []),
    "footprint of a name": lambda net: sffx.footprint(net, "8"),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_wrong_argument_is_refused_with_a_hint(
    net: fx.GraphModule, call: Callable[[fx.GraphModule], object]
) -> None:
    with pytest.raises(sffx.SffxError):
        call(net)
    assert sffx.local_loss(net, X, Y).isfinite()
