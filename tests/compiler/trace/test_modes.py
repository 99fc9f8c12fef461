from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sffx
from sffx.errors import TraceError
from tests.compiler.trace.oracle import assert_same_logits, cut_without_norms, leaf_names, logits
from tests.toys import around


class _TrainBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * 2
        return self.inner(x)


def test_what_one_branch_does_runs_in_one_mode_only():
    model = around(_TrainBranch())
    net = cut_without_norms(model)
    assert not net.plan.leaves
    x = torch.randn(5, 6)
    assert_same_logits(net.train(), model.train(), x)
    assert_same_logits(net.eval(), model.eval(), x)


class _ModeDependentRoot(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.inner = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.inner(x * 2 if self.training else x)


def test_the_model_itself_may_branch_on_its_mode():
    model = _ModeDependentRoot()
    assert (
        sffx.check(model, cut_without_norms(model), torch.randn(4, 6), raises=False).difference
        is None
    )


class _Augmented(nn.Module):
    """Does what `steps` say, each a pair of an operation and the mode that it is for."""

    def __init__(self, steps: Sequence[tuple[str, bool | None]]) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in steps)
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in steps)
        self.shift = nn.Parameter(torch.randn(6))
        self.end = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i, (operation, mode) in enumerate(self.steps):
            if mode is None or mode == self.training:
                x = self._step(operation, i, x)
        return self.end(x)

    def _step(self, operation: str, i: int, x: Tensor) -> Tensor:
        if operation == "layer":
            return self.layers[i](x).relu()
        if operation == "norm":
            return self.norms[i](x)
        if operation == "residual":
            return x + self.layers[i](x)
        if operation == "noise":
            return x + 0.1 * torch.randn_like(x)
        if operation == "shift":
            return x + self.shift
        if operation == "write":
            x = x * 1.5
            x[:, 0] = self.shift[0]
            return x
        return x[:, :3].repeat(1, 2)


_OPERATIONS = ("layer", "norm", "residual", "noise", "shift", "write", "half")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(_OPERATIONS), st.sampled_from([None, True, False])),
        min_size=1,
        max_size=6,
    )
)
def test_branches_of_any_kind_are_kept(steps):
    """The oracle is the model, in both modes, with its gradients, and the way back."""
    model = _Augmented([("layer", None), *steps, ("residual", None)])
    try:
        net = sffx.transform(model, example_input=torch.zeros(2, 6), check=False)
    except TraceError:  # as a write in place on what only one mode has computed
        return
    assert sffx.check(model, net, torch.randn(5, 6), raises=False).difference is None


def test_augmentation_in_training_leaves_the_layers_around_it_as_blocks():
    steps = [("layer", None), ("noise", True), ("layer", None), ("layer", True), ("layer", None)]
    net = sffx.transform(_Augmented(steps), "layer", torch.zeros(2, 6))
    assert not net.plan.leaves
    trained = [block.parameters for block in net.plan.blocks]
    assert any("layers.0.weight" in names and "layers.2.weight" not in names for names in trained)


class ModeNumber(nn.Module):
    """Reads its mode for a number, as attention does for its dropout, or for what it computes."""

    def __init__(self, form: str = "number") -> None:
        super().__init__()
        self.inner, self.form = nn.Linear(6, 6), form

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.inner(x), 0.5 if self.training else 0.0, training=True)
        return x * 2 if self.training and self.form == "branch" else x


@pytest.mark.parametrize(
    ("whole", "first", "second"),
    [(True, True, True), (False, False, False), (True, False, True), (False, False, True)],
)
def test_a_number_that_goes_by_the_mode_stays_a_choice(whole, first, second):
    """The modes are those of the whole model and of the two modules that read theirs."""
    model = nn.Sequential(nn.Linear(6, 6), ModeNumber(), ModeNumber(), nn.Linear(6, 4))
    net = cut_without_norms(model)
    assert not net.plan.leaves
    for root in (model, *net.children()):
        modules = dict(root.train(whole).named_modules())
        for qualname, training in (("1", first), ("2", second)):
            if qualname in modules:
                modules[qualname].train(training)
    net.training = whole
    x = torch.randn(64, 6)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(logits(net, x), expected)


def test_a_branch_beside_a_number_is_kept():
    model = around(ModeNumber("branch"))
    net = cut_without_norms(model)
    assert not leaf_names(net)
    assert sffx.check(model, net, torch.randn(5, 6), raises=False).difference is None


class _Scaled(nn.Module):
    """Scales by a tensor in one mode, and by a number in the other."""

    def __init__(self, *, draws_in_eval: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.draws_in_eval = draws_in_eval

    def forward(self, x: Tensor) -> Tensor:
        keep: Tensor | float = 1.0
        if self.training != self.draws_in_eval:
            keep = (torch.rand(x.shape[0], 1) > 0.5).float()
        x = self.first(x).relu() * keep
        return self.last(self.second(x).relu())


@pytest.mark.parametrize("draws_in_eval", [False, True])
def test_a_factor_may_be_a_number_in_one_mode(draws_in_eval):
    model = _Scaled(draws_in_eval=draws_in_eval)
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert not net.plan.leaves
    assert sffx.check(model, net).difference is None


def _added(m: nn.Module, x: Tensor) -> None:
    m.mean += 0.1 * (x.detach().mean(0) - m.mean)


def _copied(m: nn.Module, x: Tensor) -> None:
    m.mean.copy_(0.9 * m.mean + 0.1 * x.detach().mean(0))


def _blended(m: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        m.mean.lerp_(x.mean(0), 0.1)


def _chained(m: nn.Module, x: Tensor) -> None:
    m.spread.mul_(0.9).add_(x.detach().var(0) + 1, alpha=0.1)


def _subtracted(m: nn.Module, x: Tensor) -> None:
    m.spread -= 0.1 * (m.spread - (x.detach() - m.mean).square().mean(0))


def _counted(m: nn.Module, x: Tensor) -> None:
    m.calls += 1


class _Normaliser(nn.Module):
    """Normalises by numbers that it updates in train mode, before or after it uses them."""

    def __init__(self, updates, before: bool, noise: bool) -> None:
        super().__init__()
        self.updates, self.before, self.noise = updates, before, noise
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("spread", torch.ones(8))
        self.register_buffer("calls", torch.tensor(0))

    def update(self, x: Tensor) -> None:
        if self.training:
            for each in self.updates:
                each(self, x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.before:
            self.update(x)
        y = (x - self.mean) / self.spread.sqrt()
        if self.training and self.noise:
            y = y + torch.randn_like(y) - self.mean
        y = self.second(y)
        if not self.before:
            self.update(x)
        return self.last(y.relu())


_UPDATES = [
    (_added, _chained, _counted),
    (_added, _subtracted),
    (_copied, _chained),
    (_blended, _counted),
]


@pytest.mark.parametrize("updates", _UPDATES, ids=lambda each: "-".join(f.__name__ for f in each))
def test_numbers_that_are_updated_in_train_mode_are_used_in_both(updates):
    for before, noise in ((True, False), (True, True), (False, False)):
        torch.manual_seed(0)
        model = _Normaliser(updates, before, noise)
        net = cut_without_norms(model, example=torch.zeros(1, 6))
        assert not net.plan.leaves
        twin = copy.deepcopy(model)
        for mode in (True, False, True, True, False):
            x = torch.randn(5, 6)
            torch.manual_seed(1)
            expected = twin.train(mode)(x)
            torch.manual_seed(1)
            assert torch.equal(logits(net.train(mode), x), expected)
        for name, buffer in sffx.extract(net).named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name))
