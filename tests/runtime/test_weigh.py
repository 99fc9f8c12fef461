"""Weights of blocks against the likelihood that they maximise, and weighed models."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import sffx
from sffx.errors import InputError
from sffx.runtime.evaluate import block_scores
from sffx.runtime.weigh import mixture_weights
from tests.toys import Residual

X = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def cut() -> fx.GraphModule:
    torch.manual_seed(0)
    net = sffx.transform(Residual(), example_input=X[:1]).train()
    net(X)
    with torch.no_grad():
        for i in range(3):
            net.get_submodule(f"head_{i}").weight.mul_(
                6
            )  # so that the blocks are sure of what they say
    return net.eval()


@pytest.fixture
def net() -> fx.GraphModule:
    return cut()


@pytest.fixture
def loader(net: fx.GraphModule) -> list[tuple[Tensor, Tensor]]:
    """Samples of whose labels block 1 gives half and block 2 the others."""
    goodness = block_scores(net, X)[:-1].detach()
    y = torch.where(torch.arange(60) % 2 == 0, goodness[1].argmax(1), goodness[2].argmax(1))
    return [(X[:25], y[:25]), (X[25:], y[25:])]


def test_weights_are_the_most_likely_mixture() -> None:
    torch.manual_seed(0)
    scores, y = torch.randn(3, 200, 4), torch.randint(0, 4, (200,))
    scores[1:, torch.arange(200), y] += 1
    told = scores.log_softmax(2)[:, torch.arange(200), y].double()

    def likelihood(weights: Tensor) -> Tensor:
        return (weights[:, None] * told.exp()).sum(0).log().mean()

    weights = mixture_weights(told)
    assert weights.sum() == pytest.approx(1)
    for step in torch.randn(50, 3, dtype=torch.float64):
        beside = (weights + 0.02 * step).clamp(min=0)
        assert likelihood(weights) >= likelihood(beside / beside.sum()) - 1e-6


def test_a_component_that_adds_nothing_gets_no_weight_at_all() -> None:
    told = torch.tensor([[-2.0, -300.0, -3.0], [-0.1, -200.0, -0.2]])
    assert mixture_weights(told).tolist() == [0, 1]


def test_a_diverged_block_has_no_weight_and_without_another_nothing_changes(
    net: fx.GraphModule, loader: list[tuple[Tensor, Tensor]]
) -> None:
    with torch.no_grad():
        net.head_1.weight.fill_(torch.nan)
    assert sffx.weigh(net, loader)["block_1"] == 0
    assert net(X).isfinite().all()
    assert math.isfinite(sffx.evaluate(net, loader).loss["weighted"])
    weights = net.readout.weights
    with torch.no_grad():
        for p in net.block_0.parameters():
            p.fill_(torch.nan)
    with pytest.raises(
        InputError, match=r"no block gives any of the labels a probability\. Hint: "
    ):
        sffx.weigh(net, loader)
    assert net.readout.weights == weights


def test_eval_mode_returns_the_weighted_mixture(
    net: fx.GraphModule, loader: list[tuple[Tensor, Tensor]]
) -> None:
    weights = sffx.weigh(net, loader)
    assert list(weights) == ["block_0", "block_1", "block_2"]
    assert sum(weights.values()) == pytest.approx(1)
    assert net.readout.mode == "weighted"
    expected = sum(
        weight * goodness.softmax(1)
        for weight, goodness in zip(weights.values(), block_scores(net, X)[:-1], strict=True)
    )
    torch.testing.assert_close(net(X).exp(), expected)


def test_it_is_better_than_the_ensemble_and_each_block_on_what_it_was_weighed_by(
    net: fx.GraphModule, loader: list[tuple[Tensor, Tensor]]
) -> None:
    assert "weighted" not in sffx.evaluate(net, loader).loss
    sffx.weigh(net, loader)
    loss = sffx.evaluate(net, loader).loss
    assert list(loss) == [
        "block_0",
        "block_1",
        "block_2",
        "ensemble",
        "weighted",
        "last",
        "classifier",
    ]
    assert all(
        loss["weighted"] < loss[other] for other in ("block_0", "block_1", "block_2", "ensemble")
    )


def test_training_is_as_before(net: fx.GraphModule, loader: list[tuple[Tensor, Tensor]]) -> None:
    before = net.train()(X)[:-1]  # the classifier has dropout
    sffx.weigh(net, loader)
    assert net.training
    assert torch.equal(net(X)[:-1], before)


def test_weights_travel_with_the_state(
    net: fx.GraphModule, loader: list[tuple[Tensor, Tensor]], tmp_path: Path
) -> None:
    plain = copy.deepcopy(net.state_dict())
    sffx.weigh(net, loader)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = cut()
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert other.readout.mode == "weighted"
    assert torch.equal(other(X), net(X))
    assert torch.equal(copy.deepcopy(net)(X), net(X))
    other.load_state_dict({**net.state_dict(), "readout.weights": torch.ones(4)})
    with pytest.raises(InputError, match=r"there are 4 weights, but 3 blocks\. Hint: "):
        other(X)
    other.load_state_dict(plain)
    assert (other.readout.weights, other.readout.mode) == (None, "ensemble")
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"readout.other\""):
        other.load_state_dict({**plain, "readout.other": torch.ones(1)})


@pytest.mark.parametrize("kept", ["", "block_0", "head_", "classifier"])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_part_of_a_state_leaves_the_weights(
    net: fx.GraphModule, loader: list[tuple[Tensor, Tensor]], kept: str, is_wrapped: bool
) -> None:
    sffx.weigh(net, loader)
    weights = net.readout.weights
    prefix = "net." if is_wrapped else ""
    part = {}
    for name, value in net.state_dict().items():
        if kept and name.startswith(kept):
            part[prefix + name] = value
    holder = nn.ModuleDict({"other": nn.Linear(1, 1), "net": net}) if is_wrapped else net
    found = holder.load_state_dict(part, strict=False)
    assert (net.readout.weights, net.readout.mode) == (weights, "weighted")
    assert f"{prefix}readout.weights" in found.missing_keys


def test_without_weights_the_error_names_what_finds_them(
    net: fx.GraphModule, tmp_path: Path
) -> None:
    message = r"the blocks have no weights yet\. Hint: sffx\.weigh\(net, loader\)"
    with pytest.raises(InputError, match=message):
        net.readout.mode = "weighted"
    with pytest.raises(InputError, match=message):
        sffx.export_onnx(net, tmp_path / "net.onnx", "weighted")
    assert not list(tmp_path.iterdir())


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ((0.25, 0.75, 0.0), {"block_0", "head_0", "block_1", "head_1"}),
        ((0.25, 0.0, 0.75), {"block_0", "head_0", "block_1", "block_2", "head_2"}),
    ],
)
def test_export_takes_the_readout_of_the_net_and_leaves_out_what_has_no_weight(
    net: fx.GraphModule,
    loader: list[tuple[Tensor, Tensor]],
    tmp_path: Path,
    weights: tuple[float, ...],
    names: set[str],
) -> None:
    sffx.weigh(net, loader)
    net.readout.weights = weights
    path = sffx.export_onnx(net, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["sffx"])["readout"] == "weighted"
    found = torch.from_numpy(session.run(None, {"x": X.numpy()})[0])
    torch.testing.assert_close(found, net(X).detach(), rtol=1e-4, atol=1e-5)
    program = torch.export.load(sffx.export_program(net, tmp_path / "net.pt2")).module()
    torch.testing.assert_close(program(X), net(X).detach(), rtol=1e-4, atol=1e-5)
    kept = {name.partition(".")[0] for name in program.state_dict()}
    assert kept == names
