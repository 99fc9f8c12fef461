"""What a class or an instance overrides is honoured, noted or refused, and never dropped."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx.errors import InputError, SffxError, TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms, logits


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).relu())


class _Called(_Net):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class _CalledTwice(_Called):
    def __call__(self, x: Tensor, times: int = 2) -> Tensor:
        return super().__call__(x) * times + 1


def _other_forward(self: _Net, inputs: Tensor) -> Tensor:
    return self.head(self.b(self.a(inputs).tanh()).tanh()) * 2


def _by_method() -> nn.Module:
    model = _Net()
    model.forward = types.MethodType(_other_forward, model)
    return model


def _by_partial() -> nn.Module:
    model = _Net()
    model.forward = functools.partial(_other_forward, model)
    return model


@pytest.mark.parametrize("make", [_by_method, _by_partial, _Called, _CalledTwice])
def test_what_a_call_of_the_model_runs_is_what_is_cut(make):
    model = make().eval()
    net = cut_without_norms(model)
    assert_same_logits(net, model)
    assert_same_logits(sffx.extract(net), model)


class _Doubled(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class _DoubledBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


def test_the_call_of_a_layer_is_run_once():
    model = nn.Sequential(
        *(_Doubled(6, 8), nn.ReLU(), _DoubledBlock(), nn.ReLU(), nn.Linear(8, 4))
    ).eval()
    net = cut_without_norms(model)
    assert not net.plan.leaves
    assert_same_logits(net, model)
    assert torch.equal(net.block_0(torch.ones(2, 6)), model[1](model[0](torch.ones(2, 6))))


def test_the_forward_of_a_layers_instance_is_honoured():
    model = nn.Sequential(_Net(), nn.ReLU(), nn.Linear(4, 4)).eval()
    model[0].forward = types.MethodType(_other_forward, model[0])
    model[2].forward = types.MethodType(lambda self, x: x @ self.weight - 1, model[2])
    assert_same_logits(cut_without_norms(model), model)


def _around_a_layer() -> nn.Module:
    model = _Net()
    old = model.a.forward
    model.a.forward = lambda x: old(x) * 2
    return model


def _by_default() -> nn.Module:
    model = _Net()
    model.b.forward = lambda x, old=model.b.forward: old(x) * 2
    return model


def _hook_on_another() -> nn.Module:
    model = _Net()
    model.b.register_forward_hook(lambda m, args, output: output + model.b.weight[0])
    return model


def _around_a_layer_in_a_script() -> nn.Module:
    model = _Net()
    _GLOBALS["old"] = model.a.forward
    script = "model.a.forward = lambda x: old(x) * 2"
    exec(script, _GLOBALS | {"model": model})
    return model


def _by_a_function_of_a_script() -> nn.Module:
    model = _Net()
    names = {"model": model, "__name__": "__main__"}
    script = """
def scaled(x):
    return model.a.weight.mean() * x

model.b.register_forward_hook(lambda layer, args, output: scaled(output))
"""
    exec(script, names)
    return model


# The names of a script.
_GLOBALS: dict[str, Any] = {"__name__": "__main__"}


@pytest.mark.parametrize(
    ("make", "place"),
    [
        (_around_a_layer, "a.forward"),
        (_around_a_layer_in_a_script, "a.forward"),
        (_by_a_function_of_a_script, "b._forward_hooks"),
        (_by_default, "b.forward"),
        (_hook_on_another, "b._forward_hooks"),
    ],
)
def test_a_function_that_a_copy_would_share_with_the_model_is_refused(make, place):
    with pytest.raises(InputError, match=f"{place!r} of _Net is a function that holds a part"):
        sffx.plan(make())


class _ReadsAGlobal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(_scaled_by_a_global(x)).relu()


def _scaled_by_a_global(x: Tensor) -> Tensor:
    return x * _PARTS["head"].weight.mean()


_PARTS: dict[str, nn.Module] = {}


def test_a_forward_that_reads_a_part_of_the_model_as_a_global_is_refused():
    """A copy would train and read the weights of the original."""
    model = nn.Sequential(nn.Linear(6, 8), _ReadsAGlobal(), nn.Linear(8, 4))
    assert len(sffx.plan(_with(head=nn.Linear(8, 4), model=model), "layer")) == 2
    with pytest.raises(InputError, match="_scaled_by_a_global reads '_PARTS', a global") as error:
        sffx.plan(_with(head=model[2], model=model), "layer")
    assert "Hint: read the part from self" in str(error.value)


def _with(*, head: nn.Module, model: nn.Module) -> nn.Module:
    _PARTS["head"] = head
    return model


def test_a_layer_without_state_may_be_a_global():
    model = nn.Sequential(_Activated(6), _Activated(8), nn.Linear(8, 4)).eval()
    assert_same_logits(cut_without_norms(model), model)


class _Activated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.activation = nn.Linear(width, 8), _ACTIVATION

    def forward(self, x: Tensor) -> Tensor:
        return _ACTIVATION(self.inner(x))


_ACTIVATION = nn.GELU()


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


def _train_frozen(self: _Block, mode: bool = True) -> _Block:
    nn.Module.train(self, mode)
    self.norm.eval()
    return self


class _Frozen(_Block):
    train = _train_frozen


def test_hooks_of_modules_that_are_traced_through_are_noted():
    model = nn.Sequential(_Block(6), _Block(8), nn.Linear(8, 4))
    model[1].register_forward_hook(lambda m, args, output: output * 2)
    model[1].linear.register_forward_hook(lambda m, args, output: output + 1)
    net = cut_without_norms(model)
    (note,) = net.plan.notes
    assert note.startswith("hooks of 1 ran during the trace alone")
    assert_same_logits(net.eval(), model.eval())


@pytest.mark.parametrize("place", ["block", "instance", "model"])
def test_an_overridden_train_sets_the_modes_of_the_cut_model(place):
    """Whatever calls train() or eval(): of copies and pickles, and of wrappers, too."""
    model: nn.Module = nn.Sequential(_Block(6), _Block(8), nn.Linear(8, 4))
    if place == "block":
        model[1] = _Frozen(8)
    elif place == "instance":
        model[1].train = types.MethodType(_train_frozen, model[1])
    else:
        model = _FrozenModel(model)
    x = torch.randn(5, 6)
    net = cut_without_norms(model)
    assert net.plan.notes == ()
    report = sffx.check(model, net)
    assert report.passed, report
    wrapped = torch.optim.swa_utils.AveragedModel(net)
    copies = [net, copy.deepcopy(net), wrapped]
    if place != "instance":  # a pickle holds no method of an instance
        copies.append(pickle.loads(pickle.dumps(net)))
    for cut in copies:
        for training in (True, False, True):
            model.train(training)
            cut.train(training)
            modes = [m.training for m in model.modules() if isinstance(m, nn.BatchNorm1d)]
            own = [m.training for m in cut.modules() if isinstance(m, nn.BatchNorm1d)]
            assert own == modes
            assert modes == [training, False]
    assert torch.equal(logits(net.eval(), x), model.eval()(x))
    plain = sffx.extract(net).train()
    assert [m.training for m in plain.modules() if isinstance(m, nn.BatchNorm1d)] == [True, False]


class _FrozenModel(nn.Module):
    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def train(self, mode: bool = True) -> _FrozenModel:
        super().train(mode)
        self.layers[1].norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_a_step_leaves_the_modes_that_an_overridden_train_sets():
    model = nn.Sequential(_Block(6), _Frozen(8), nn.Linear(8, 4))
    net = cut_without_norms(model).train()
    before = net.block_1.get_submodule("1.norm").running_mean.clone()
    x, y = torch.randn(5, 6), torch.randint(0, 4, (5,))
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.1))
    sffx.local_step(net, x, y, optimizer)
    sffx.evaluate(net, [(x, y)])
    sffx.local_step(net, x, y, optimizer, blocks=["classifier"])
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
    assert [norm.training for norm in norms] == [True, False]
    assert torch.equal(net.block_1.get_submodule("1.norm").running_mean, before)


class _Merging(nn.Linear):
    """Merges a second weight in eval mode, as LoRA layers do."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.extra = nn.Parameter(torch.randn(8, 8))
        self.is_merged = False

    def train(self, mode: bool = True) -> _Merging:
        super().train(mode)
        if mode == self.is_merged:
            self.weight.data += -self.extra if mode else self.extra
            self.is_merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        extra = 0 if self.is_merged else x @ self.extra.T
        return super().forward(x) + extra


def test_a_layer_that_merges_weights_in_eval_mode_unmerges_them_after_an_evaluation():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), _Merging(), nn.ReLU(), nn.Linear(8, 4))
    net = cut_without_norms(model).train()
    x, y = torch.randn(5, 6), torch.randint(0, 4, (5,))
    before = logits(net, x)
    sffx.evaluate(net, [(x, y)])
    torch.testing.assert_close(logits(net, x), before)


class _ChangesALayer(nn.Module):
    def __init__(self, code) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.code(self, self.first(x)).relu())


def _in_eval_mode(m: _ChangesALayer, x: Tensor) -> Tensor:
    m.norm.eval()
    return m.norm(x)


def _as_it_is(m: _ChangesALayer, x: Tensor) -> Tensor:
    """In train mode this changes nothing."""
    m.norm.train()
    return m.norm(x)


def _by_attribute(m: _ChangesALayer, x: Tensor) -> Tensor:
    m.norm.training = True
    return m.norm(x)


def _itself_in_eval_mode(m: _ChangesALayer, x: Tensor) -> Tensor:
    return m.eval().norm(x)


def _hooked(m: _ChangesALayer, x: Tensor) -> Tensor:
    handle = m.norm.register_forward_hook(lambda module, inputs, output: output * 2)
    y = m.norm(x)
    handle.remove()
    return y


def _with_a_new_layer(m: _ChangesALayer, x: Tensor) -> Tensor:
    if not hasattr(m, "new"):
        m.new = nn.Linear(x.shape[1], 8)
    return m.norm(m.new(x))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (_in_eval_mode, r"sets the mode of 'norm'.*override train\(\)"),
        (_as_it_is, r"sets the mode of 'norm'.*override train\(\)"),
        (_by_attribute, r"sets the mode of 'norm'.*override train\(\)"),
        (_itself_in_eval_mode, r"sets the mode of the model.*override train\(\)"),
        (_hooked, r"sets a hook on a layer that it calls, which is lost.*Hint: move"),
        (_with_a_new_layer, r"'new\.weight' is made in the first call.*Hint: run the model once"),
    ],
)
def test_a_forward_that_changes_its_layers_is_refused(code, message):
    with pytest.raises(SffxError, match=message):
        sffx.plan(_ChangesALayer(code), "layer", torch.zeros(4, 6))


def test_a_part_that_sets_the_mode_of_its_layer_is_a_leaf():
    """Monte Carlo dropout draws in eval mode as well."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            self.drop.train()
            return self.drop(self.inner(x))

    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Drops(), nn.Linear(6, 4))
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert [leaf.qualname for leaf in net.plan.leaves] == ["2"]
    assert sffx.check(model, net).difference is None


def test_layers_that_the_first_call_makes_are_cut_after_it():
    model = _ChangesALayer(_with_a_new_layer)
    model(torch.zeros(4, 6))
    net = sffx.transform(model, "layer", torch.zeros(4, 6))
    assert sffx.check(model, net).difference is None


class _Merged(nn.Module):
    """A layer with a correction, which is a part of its weights in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(6, 2))
        self.merged = False

    def train(self, mode: bool = True) -> _Merged:
        super().train(mode)
        if mode == self.merged:
            sign = -1 if mode else 1
            self.layer.weight.data += sign * (self.up @ self.down)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if self.merged else y + x @ self.down.t() @ self.up.t()


class _AsksMerged(nn.Module):
    """Asks the layer inside whether it is merged, and does the rest itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Merged()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner.layer(x)
        merged = self.inner.merged
        return y if merged else y + x @ self.inner.down.t() @ self.inner.up.t()


class _MergedRoot(_Merged):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :4]


@pytest.mark.parametrize("kind", [_Merged, _AsksMerged])
@pytest.mark.parametrize("mode", [True, False])
def test_a_layer_whose_mode_sets_what_its_forward_reads_is_a_leaf(kind, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), kind(), nn.Linear(6, 4)).train(mode)
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 0])
    net = sffx.transform(model, "layer", x, norm="none", check=False)
    assert [leaf.reason for leaf in net.plan.leaves] == [
        "reads the attribute 'merged', which its mode sets"
    ]
    twin = copy.deepcopy(model)
    net.readout.mode = "classifier"
    for each in (True, False, False, True):
        found = net.train(each)(x)
        torch.testing.assert_close(found[-1] if each else found, twin.train(each)(x))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sffx.local_step(net.train(), x, y, optimizer)
    torch.testing.assert_close(sffx.extract(net).eval()(x), net.eval()(x))


def test_a_model_whose_mode_sets_what_its_own_forward_reads_is_refused():
    with pytest.raises(
        TraceError, match=r"'merged', which its mode sets.*Hint: move this into a submodule"
    ):
        sffx.transform(_MergedRoot(), "layer", torch.zeros(2, 6))
