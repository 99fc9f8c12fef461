from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError
from sffx.plain import logits_of
from sffx.tasks import Regression, Segmentation
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms


class _Auxiliary(nn.Module):
    """Returns a second output in train mode, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux, self.head = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = F.relu(self.body(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_auxiliary_outputs_are_left_out_and_that_is_said():
    traced = trace(_Auxiliary())
    assert "aux" not in {node.target for node in traced.graph.nodes}
    which, left_out = traced.notes
    assert "returns 2 values like a tensor of shape (B, 4), and the first is" in which
    assert left_out == "left out, since the logits do not depend on them: aux"


class _Exits(nn.Module):
    """Returns the answer of each of its layers; the heads of the first ones are large."""

    def __init__(self, gather: Callable[[list[Tensor]], Any], *, functional: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))
        self.gather = gather
        self.functional = functional

    def forward(self, x: Tensor) -> Any:
        answers = []
        for layer, head in zip(self.layers, self.heads, strict=True):
            x = F.linear(x, layer.weight, layer.bias) if self.functional else layer(x)
            x = F.relu(x)
            answers.append(head(x))
        return self.gather(answers)


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(
    ("gather", "which", "keys"),
    [
        (list, "the last, to which most layers lead,", (2,)),
        (tuple, "the last, to which most layers lead,", (2,)),
        (lambda answers: answers[::-1], "the first", (0,)),
        (lambda answers: (answers[0], answers[2], answers[1]), "number 2, to which", (1,)),
        (lambda answers: (answers[2], answers[:2]), "the first", (0,)),
        (lambda answers: (answers[:2], answers[2]), "the last, to which", (1,)),
        (lambda answers: {"a": answers[0], "b": answers[2]}, "the last, to which", ("b",)),
        (lambda answers: {"exits": answers}, "the last, to which", ("exits", 2)),
        (lambda answers: (answers[2] * 2, answers[2]), "the first", (0,)),
    ],
)
def test_of_several_exits_the_one_that_most_layers_lead_to_is_the_output(
    gather, which, keys, functional
):
    model = _Exits(gather, functional=functional)
    net = sffx.transform(model, "layer", torch.zeros(2, 6), norm="none")
    assert which in net.plan.notes[0]
    assert net.plan.output_keys == keys
    assert len(net.plan) == 3
    x = torch.randn(5, 6)
    net.readout.mode = "classifier"
    output = model(x)
    for key in keys:
        output = output[key]
    assert torch.allclose(net.eval()(x), output, atol=1e-6)
    # The comparison reads the same value from the plain model.
    sffx.check(model, net)


@pytest.mark.parametrize("num_classes", [None, 4])
def test_num_classes_tells_the_width_and_the_layers_which_of_that_width(num_classes):
    class Wide(_Exits):
        def forward(self, x: Tensor) -> Any:
            return (*super().forward(x), x.repeat(1, 2) @ self.layers[0].weight.repeat(2, 2))

    model = Wide(tuple, functional=False)
    if num_classes is None:
        with pytest.raises(TraceError, match="pass num_classes"):
            trace(model, torch.zeros(2, 6))
        return
    assert trace(model, torch.zeros(2, 6), num_classes).output_keys == (2,)


def test_an_output_that_is_no_logits_is_refused():
    message = (
        r"returns a tensor of shape \(B, 4, 6, 6\), which does not tell the task\. "
        r"Hint: for classes of pixels, pass task=sffx\.tasks\.Segmentation\(\); "
        r"for masks of 0 and 1, task=sffx\.tasks\.MultiLabelSegmentation\(\); "
        r"for numbers of pixels, task=sffx\.tasks\.DenseRegression\(\); of a detector"
    )
    with pytest.raises(TraceError, match=message):
        trace(nn.Sequential(nn.Conv2d(3, 4, 3)), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(("channels", "task"), [(4, Segmentation()), (3, None)])
def test_a_map_as_large_as_the_image_is_of_pixels_unless_it_may_be_an_image(channels, task):
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1))
    if task is not None:
        assert trace(model, torch.zeros(1, 3, 8, 8)).task == task
        return
    with pytest.raises(TraceError, match=r"pass task=sffx\.tasks\.Segmentation\(\)"):
        trace(model, torch.zeros(1, 3, 8, 8))
    assert trace(model, torch.zeros(1, 3, 8, 8), task=Segmentation()).task == Segmentation()


class _TwoOutputs(nn.Module):
    def __init__(self, as_mapping: bool) -> None:
        super().__init__()
        self.as_mapping = as_mapping
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Any:
        embedding = self.b(torch.relu(self.a(x)))
        logits = self.c(embedding)
        if self.as_mapping:
            return {"embedding": embedding, "scores": logits}
        return embedding, logits


@pytest.mark.parametrize("as_mapping", [False, True])
def test_the_logits_among_several_outputs_are_told_by_the_number_of_classes(as_mapping):
    model, x = _TwoOutputs(as_mapping), torch.randn(4, 6)
    message = r"could be its logits, of shapes \(B, 5\), \(B, 3\)\. Hint: pass num_classes"
    with pytest.raises(TraceError, match=message):
        sffx.plan(model, "layer", x)
    with pytest.raises(TraceError, match=r"none with num_classes=4"):
        sffx.plan(model, "layer", x, num_classes=4)
    assert sffx.plan(model, "layer", x, num_classes=3).num_classes == 3


@pytest.mark.parametrize("as_mapping", [False, True])
def test_what_no_layer_leads_to_is_not_the_logits(as_mapping):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Any:
            mean, scale = x.mean(1, keepdim=True), x.std(1)
            forecast = self.b(torch.relu(self.a((x - mean) / scale[:, None])))
            outputs = {"mean": mean, "scale": scale, "forecast": forecast}
            return outputs if as_mapping else tuple(outputs.values())

    model, x = Scaled(), torch.randn(4, 6)
    net = sffx.transform(model, "layer", x, task=Regression(), norm="none")
    found = model(x)["forecast"] if as_mapping else model(x)[2]
    torch.testing.assert_close(sffx.block_scores(net.eval(), x)[-1], found)


class _Pair(NamedTuple):
    embedding: Tensor
    logits: Tensor


class _Returns(nn.Module):
    """Returns features (B, 4), logits (B, 4) and a mask (B, 6, 1), put together by a function."""

    def __init__(self, code: Any) -> None:
        super().__init__()
        self.inner, self.middle, self.head = nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 4)
        self.code = code

    def forward(self, x: Tensor) -> Any:
        x = self.inner(x).relu()
        features = self.middle(x)
        return self.code(features, self.head(features.relu()), x[:, :, None])


@pytest.mark.parametrize(
    "code",
    [
        lambda features, logits, mask: _Pair(features, logits),
        lambda features, logits, mask: SimpleNamespace(features=features, logits=logits),
        lambda features, logits, mask: (None, logits),
        lambda features, logits, mask: (mask, logits),
        lambda features, logits, mask: [mask, {"features": mask, "scores": logits}],
    ],
)
def test_the_logits_are_found_wherever_they_are(code):
    model = _Returns(code).eval()
    net = cut_without_norms(model, example=torch.randn(2, 6))
    x = torch.randn(3, 6)
    x_inner = model.inner(x).relu()
    assert torch.equal(net(x), model.head(model.middle(x_inner).relu()))


class _Other(nn.Module):
    """Returns another kind of thing in eval mode."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.linear, self.softmax, self.make = nn.Linear(6, 4), nn.Softmax(1), make

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return y if self.training else self.make(self, y)


@pytest.mark.parametrize(
    "make",
    [
        lambda m, y: (y.softmax(1), y),
        lambda m, y: (y, y.softmax(1)),
        lambda m, y: [F.log_softmax(y, 1), y],
        lambda m, y: (torch.sigmoid(y), {"scores": y}["scores"]),
        lambda m, y: (m.softmax(y), y, y.mean(1)),
    ],
)
def test_probabilities_beside_the_logits_are_not_the_logits(make):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), _Other(make))
    net = cut_without_norms(model, "layer", torch.randn(2, 6))
    assert not net.plan.leaves
    x = torch.randn(3, 6)
    expected = model.train()(x)
    assert torch.equal(net.eval()(x), expected)
    assert torch.equal(logits_of(model.eval()(x), net.plan.task), expected)


@pytest.mark.parametrize("function", [Tensor.softmax, Tensor.log_softmax])
def test_probabilities_of_tokens_beside_the_logits_are_not_the_logits(function):
    logits = torch.randn(2, 5, 3)
    task = sffx.tasks.TokenClassification()
    assert logits_of((function(logits, -1), logits), task) is logits


def test_a_head_that_returns_other_logits_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), _Other(lambda m, y: (y * 2, y)))
    net = cut_without_norms(model, "layer", torch.randn(2, 6))
    x = torch.randn(3, 6)
    assert torch.equal(net.eval()(x), logits_of(model.eval()(x), net.plan.task))
    assert torch.equal(net.train()(x)[-1], model.train()(x))


@pytest.mark.parametrize(
    ("make", "returned"),
    [
        (lambda m, y: y.argmax(1), r"a tensor of shape \(B\)"),
        (lambda m, y: y.softmax(1).topk(2), "a topk"),
        (lambda m, y: {"label": y.argmax(1)}, r"a tensor of shape \(B\)"),
    ],
)
def test_what_is_no_score_in_eval_mode_alone_is_refused_for_that_mode(make, returned):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), _Other(make))
    said = rf"in eval mode, Sequential returns {returned}.* Hint: return the same in both modes"
    with pytest.raises(TraceError, match=said):
        sffx.plan(model, "layer")


class _OtherLeaf(_Other):
    """A leaf, since it opens a region under autocast."""

    def forward(self, x: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            x.sum()
        return super().forward(x)


def test_a_leaf_that_returns_other_things_in_eval_mode_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), _OtherLeaf(lambda m, y: (y * 2, y)))
    said = r"^_OtherLeaf returns a tensor of shape \(B, 4\) in train mode and a tuple.*both modes"
    with pytest.raises(TraceError, match=said):
        sffx.plan(model, "layer")


class _ReadsLater(nn.Module):
    def __init__(self, read: Any) -> None:
        super().__init__()
        self.read, self.a, self.b = read, nn.Linear(6, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.read(x, self.head.weight)).relu()).relu())


@pytest.mark.parametrize(
    "read",
    [
        lambda x, w: x.to(w.dtype),
        lambda x, w: x.to(w.device),
        lambda x, w: x.to(w),
        lambda x, w: x.type_as(w),
        lambda x, w: x / w.shape[1] + w.size(0) + w.ndim + w.numel(),
        lambda x, w: x + w.new_zeros(1),
        lambda x, w: x + torch.zeros_like(w).sum() + torch.full_like(w, 2.0).mean(),
        lambda x, w: x + torch.zeros_like(input=w).sum() + torch.ones_like(input=w).mean(),
        lambda x, w: x.type_as(other=w) + w.new_zeros(size=(1,)),
        lambda x, w: x + x.new_ones(4, 8).view_as(other=w).mean(),
        lambda x, w: x + x.new_ones(4, 8).view_as(w).mean() + x.new_ones(1).expand_as(w).mean(),
    ],
)
def test_what_describes_a_later_weight_does_not_use_it(read):
    model = _ReadsLater(read).eval()
    net = cut_without_norms(model)
    assert len(net.plan) == 2
    assert_same_logits(net, model)
    half = torch.randn(3, 6, dtype=torch.float64)
    assert torch.equal(net.double()(half), model.double()(half))


class _DropsTokens(nn.Module):
    """Keeps the first tokens in train mode, all of them in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] if self.training else x


class _OnTokens(nn.Module):
    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.drop, self.scale = _DropsTokens(), scale

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.drop(self.first(x).relu())).relu()
        return self.head(x.sum(1) / self.scale(x))


def test_tokens_that_are_dropped_in_train_mode_are_dropped_in_the_net():
    model = _OnTokens(lambda x: x.shape[1])
    net = cut_without_norms(model, "layer", torch.randn(2, 5, 6))
    x = torch.randn(3, 5, 6)
    for mode in (True, False):
        assert_same_logits(net.train(mode), model.train(mode), x)
    assert net.train()(x)[0].shape == (3, 4)


@pytest.mark.parametrize(
    "scale", [lambda x: float(x.shape[1]), lambda x: 1.0 if x.shape[1] == 3 else 2.0]
)
def test_a_number_of_tokens_that_depends_on_the_mode_is_not_frozen(scale):
    with pytest.raises(TraceError, match="_DropsTokens returns other sizes in eval mode"):
        sffx.plan(_OnTokens(scale), "layer", torch.randn(2, 5, 6))


class _Maps(nn.Module):
    """Returns scores of pixels in a mapping, after others of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.aux = nn.Conv2d(4, 2, 1)
        self.scores = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.features(x)
        return {"aux": self.aux(y), "out": self.scores(y)}


def test_the_entry_out_is_the_output_wherever_it_stands():
    x = torch.randn(3, 3, 4, 4)
    model = _Maps()
    net = sffx.transform(model, "batchnorm", x, check=True)
    net = cut_without_norms(model, "batchnorm", x)
    assert torch.equal(net.eval()(x), model.eval()(x)["out"])
    assert torch.equal(logits_of(model(x), net.plan.task), model(x)["out"])


@pytest.mark.parametrize(
    "last",
    [
        nn.Softmax(1),
        lambda y: y.softmax(1),
        lambda y: F.softmax(y, dim=1),
        lambda y: torch.softmax(y, 1),
    ],
)
def test_an_output_of_probabilities_is_noted(last):
    class Model(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return last(super().forward(x))

    model = Model(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    if isinstance(last, nn.Module):
        model = nn.Sequential(*model, last)
    plan = sffx.plan(model, "layer", torch.randn(2, 6))
    assert any("returns a softmax" in note for note in plan.notes)
    number = sffx.plan(model, "layer", torch.randn(2, 6), task=sffx.tasks.Regression())
    assert not any("returns a softmax" in note for note in number.notes)


def test_an_output_of_a_log_softmax_is_logits():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.LogSoftmax(1))
    assert not any("softmax" in note for note in sffx.plan(model, "layer", torch.randn(2, 6)).notes)


def test_a_sigmoid_of_several_labels_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4), nn.Sigmoid())
    task = sffx.tasks.MultiLabel()
    with pytest.raises(TraceError, match="return what the sigmoid is applied to"):
        sffx.plan(model, "layer", torch.randn(2, 6), task=task)
    assert len(sffx.plan(model[:-1], "layer", torch.randn(2, 6), task=task)) == 1


class _Heads(nn.Module):
    """Returns what two layers make of one value."""

    def __init__(self, make: Any, second: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
        self.first, self.second, self.make = nn.Linear(6, 3), nn.Linear(6, second), make

    def forward(self, x: Tensor) -> Any:
        y = self.features(x)
        return self.make(self.first(y), self.second(y))


@pytest.mark.parametrize(
    ("make", "is_noted"),
    [
        (lambda a, b: (a, b), True),
        (lambda a, b: [a, b], True),
        (lambda a, b: {"colour": a, "shape": b}, True),
        (lambda a, b: {"logits": a, "shape": b}, False),
        (lambda a, b: (a, a.softmax(1)), False),
        (lambda a, b: (a + b, None), False),
        (lambda a, b: (a, b.sum()), False),
    ],
)
def test_the_first_of_several_outputs_is_noted(make, is_noted):
    plan = sffx.plan(_Heads(make), "layer", torch.randn(2, 6))
    assert is_noted == any("returns 2 values like" in note for note in plan.notes)
    assert plan.num_classes == 3


class _Nested(nn.Module):
    """Returns features, (B, 6), and in a part of its own the scores, (B, 3)."""

    def __init__(self, nest: Any) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)
        self.nest = nest

    def forward(self, x: Tensor) -> Any:
        features = self.b(self.a(x).relu())
        return self.nest(features, self.c(features.relu()))


@pytest.mark.parametrize(
    "nest",
    [
        lambda features, scores: {"features": features, "out": {"classes": scores}},
        lambda features, scores: (features, [scores, features.softmax(1)]),
        lambda features, scores: (features, ({"logits": scores, "aux": features}, None)),
    ],
)
def test_the_number_of_classes_tells_logits_that_lie_deeper(nest):
    model, x = _Nested(nest).eval(), torch.randn(4, 6)
    net = sffx.transform(model, "layer", x, num_classes=3, norm="none", check=True)
    net.readout.mode = "classifier"
    features = model.b(model.a(x).relu())
    assert torch.equal(net(x), model.c(features.relu()))
    note = "values of other widths as well, of 3 columns. Its output here has 6. Hint: num_classes"
    assert any(note in each for each in sffx.plan(model, "layer", x).notes)
    assert not any("other widths" in each for each in net.plan.notes)


@pytest.mark.parametrize(
    "nest",
    [
        lambda features, scores: ((features, features.relu()), scores),
        lambda features, scores: {"hidden": [features], "classes": scores},
        lambda features, scores: ([features, features[:, :5]], scores),
    ],
)
def test_logits_behind_a_part_with_other_values_are_told_by_the_number_of_classes(nest):
    model, x = _Nested(nest), torch.randn(4, 6)
    with pytest.raises(TraceError, match=r"shapes \(B, 6\), \(B, [35]\)\. Hint: pass num_classes"):
        sffx.plan(model, "layer", x)
    net = sffx.transform(model, "layer", x, num_classes=3, check=True)
    assert net.plan.num_classes == 3


class _OtherLayout(nn.Module):
    """Layers on each step of (B, T, 4), and then another layout."""

    def __init__(self, lay_out: Any) -> None:
        super().__init__()
        self.lay_out = lay_out
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.lay_out(self.layers(x))


@pytest.mark.parametrize(
    ("lay_out", "message"),
    [
        (lambda x: x.transpose(0, 1), "the batch is axis 1"),
        (lambda x: x.mean(0), "no axis is"),
        (lambda x: x.flatten(0, 1), "5 rows of each sample lie in axis 0"),
    ],
)
def test_an_output_whose_first_axis_is_not_the_batch_is_refused(lay_out, message):
    with pytest.raises(TraceError, match=f"{message}.*Hint: the first axis of each input"):
        trace(_OtherLayout(lay_out), torch.zeros(2, 5, 4))


def test_an_output_without_axes_is_described_so():
    with pytest.raises(TraceError, match="returns a tensor without axes"):
        trace(_OtherLayout(torch.mean), torch.zeros(2, 5, 4))


class _Balanced(nn.Module):
    """Returns numbers of the batch beside its logits, where `pack` puts them."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.pack = nn.Linear(6, 6), nn.Linear(6, 4), pack

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.body(x))
        return self.pack(self.head(x), x.square().mean())


@pytest.mark.parametrize(
    ("pack", "words"),
    [
        (lambda y, loss: (y, loss), "a number"),
        (lambda y, loss: (loss, y), "a number"),
        (lambda y, loss: (y, [loss, loss + 1]), "2 numbers"),
        (lambda y, loss: {"logits": y, "loss": loss}, "a number"),
        (lambda y, loss: SimpleNamespace(logits=y, extra={"loss": loss}), "a number"),
        (lambda y, loss: {"logits": y, "seen": torch.tensor(3), "loss": None}, ""),
        (lambda y, loss: y, ""),
    ],
)
def test_a_loss_that_a_model_returns_beside_its_logits_is_noted(pack, words):
    notes = [note for note in trace(_Balanced(pack)).notes if "no block learns from" in note]
    assert len(notes) == bool(words)
    assert all(f"also returns {words} of the whole batch" in note for note in notes)
