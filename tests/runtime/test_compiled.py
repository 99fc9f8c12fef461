"""Compiled blocks against the same blocks as they are.

The backends run the graphs with torch's own operators, so values agree to the bit. "aot_eager" has
the graphs of forward and backward pass that a compiler would get. "eager" has that of the code
only, and is made faster, for tests of what is compiled when.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import sffx
from sffx import InputError
from sffx.objectives import ForwardForward
from sffx.runtime.compiled import compile, compiled_blocks
from sffx.runtime.optimizers import parameter_groups

BACKEND = "eager"


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + x)


class Net(nn.Module):
    """A stem, two equal blocks, and a classifier, on (B, 2, 6, 6)."""

    def __init__(self, between=None):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.one = Residual(4)
        self.between = nn.Identity() if between is None else between
        self.two = Residual(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.two(self.between(self.one(self.stem(x)))).mean((2, 3)))


def pair(between=None, backend=BACKEND, **options):
    """Return a net and a copy of it whose blocks are compiled."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(between).double()
    x = torch.zeros(2, 2, 6, 6, dtype=torch.float64)
    net = sffx.transform(model, example_input=x, **options).train()
    return net, compile(copy.deepcopy(net), backend=backend)


def batch(samples=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 2, 6, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 3, (samples,), generator=generator)


def require_equal(one, other):
    for (name, tensor), twin in zip(
        one.state_dict().items(), other.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, twin), name


def test_steps_are_those_of_the_net_as_it_is():
    plain, compiled = pair(backend="aot_eager")
    nets = (plain, compiled)
    optimizers = [torch.optim.AdamW(parameter_groups(net, 1e-2)) for net in nets]
    for step in range(3):
        x, y = batch(seed=step)
        losses = []
        for net, optimizer in zip(nets, optimizers, strict=True):
            losses.append(sffx.local_step(net, x, y, optimizer))
        assert torch.equal(*losses)
        require_equal(*nets)
    assert set(compiled_blocks(compiled).values()) == {"compiled"}
    for _ in range(2):
        expected = sffx.evaluate(plain, [batch()]).loss
        assert sffx.evaluate(compiled, [batch()]).loss == pytest.approx(expected, rel=1e-12)


def test_losses_hand_on_the_same_gradients_and_name_the_blocks():
    nets = pair(backend="aot_eager")
    x, y = batch()
    for _ in range(2):
        seen = {net: [] for net in nets}
        for net in nets:
            net.zero_grad()

            def note(name, scores, loss, notes=seen[net]):
                notes.append((name, scores.clone(), loss.clone()))

            losses = sffx.block_losses(net, x, y, on_block=note)
            sum(losses.values()).backward()
        for one, other in zip(*(net.parameters() for net in nets), strict=True):
            assert torch.equal(one.grad, other.grad)
        for one, other in zip(*seen.values(), strict=True):
            assert one[0] == other[0]
            assert torch.equal(one[1], other[1])
            assert torch.equal(one[2], other[2])


def test_equal_blocks_are_compiled_once():
    plain = pair(nn.Sequential(Residual(4), Residual(4)))[0]
    counter = CompileCounterWithBackend(BACKEND)
    compiled = compile(plain, backend=counter)
    for _ in range(3):
        sffx.local_loss(compiled, *batch())
    # The stem, four residual blocks that are alike, and the classifier.
    assert set(compiled_blocks(compiled).values()) == {"compiled"}
    assert len(compiled_blocks(compiled)) == 6
    assert counter.frame_count == 3
    for _ in range(3):
        sffx.evaluate(compiled, [batch()])
    assert counter.frame_count == 6


def test_blocks_are_compiled_for_the_sizes_of_their_own_weights():
    """Dynamo compiles code for any size where it has seen another one."""
    counter = CompileCounterWithBackend(BACKEND)
    compiled = compile(pair()[0], backend=counter)
    for _ in range(2):
        sffx.local_loss(compiled, *batch())
    assert len(counter.graphs) == 4
    for graph in counter.graphs:
        for node in graph.graph.find_nodes(op="placeholder"):
            assert isinstance(node.meta["example_value"], torch.Tensor)


def test_a_loss_of_ones_own_and_smaller_batches():
    plain, compiled = pair()
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    for samples in (6, 6, 4):
        x, y = batch(samples)
        losses = [sffx.local_loss(net, x, y, loss_fn) for net in (plain, compiled)]
        torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


@dataclass
class Scaled:
    """A loss without a hash, since it compares by its fields."""

    factor: float

    def __call__(self, scores, y):
        return self.factor * F.cross_entropy(scores, y)


def test_a_loss_may_have_no_hash_or_be_made_in_each_step():
    plain, compiled = pair()
    x, y = batch()
    for _ in range(2):
        for loss_fn in (Scaled(2.0), lambda scores, y: 2.0 * F.cross_entropy(scores, y)):
            losses = [sffx.local_loss(net, x, y, loss_fn) for net in (plain, compiled)]
            torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    assert set(compiled_blocks(compiled).values()) == {"compiled"}


def test_some_blocks_learn_and_frozen_ones_stay():
    plain, compiled = pair()
    for net in (plain, compiled):
        net.block_1.requires_grad_(False)
        net.block_1.eval()
    for _ in range(3):
        for net in (plain, compiled):
            net.zero_grad()
            sffx.local_loss(net, *batch(), blocks=["block_1", "block_2"]).backward()
        require_equal(plain, compiled)
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        assert one.grad is None or torch.equal(one.grad, other.grad), name


def test_another_objective():
    objective = ForwardForward(neutral=True)
    plain, compiled = pair(backend="aot_eager", objective=objective)
    for step in range(4):
        losses = []
        for net in (plain, compiled):
            with torch.random.fork_rng():
                torch.manual_seed(step)
                losses.append(sffx.local_loss(net, *batch()))
        assert torch.equal(*losses)
    assert set(compiled_blocks(compiled).values()) == {"compiled"}


class Counting(nn.Module):
    """A layer whose forward counts its calls in an attribute, and scales by the count."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls = self.calls + 1
        return x * (1 + 0.1 * self.calls)


class Branching(nn.Module):
    """A layer that looks at values."""

    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


def test_a_setting_that_changes_is_seen():
    plain, compiled = pair(nn.Dropout(0.0))

    def losses_agree(steps):
        for step in steps:
            losses = [sffx.local_loss(net, *batch(seed=step)) for net in (plain, compiled)]
            torch.testing.assert_close(*losses)

    losses_agree(range(3))
    for net in (plain, compiled):
        net.get_submodule("block_2").get_submodule("between").p = 1.0
    losses_agree(range(3, 5))
    (reason,) = set(compiled_blocks(compiled).values()) - {"compiled"}
    assert reason.startswith("p of a Dropout in it changed after the first step")

    compile(compiled, backend=BACKEND)
    losses_agree(range(5, 8))
    assert set(compiled_blocks(compiled).values()) == {"compiled"}


def test_a_tensor_that_is_replaced_is_seen():
    dropout = nn.Dropout(0.0)
    dropout.scale = torch.zeros(2)
    plain, compiled = pair(dropout)
    for step in range(2):
        losses = [sffx.local_loss(net, *batch(seed=step)) for net in (plain, compiled)]
        torch.testing.assert_close(*losses)
    compiled.get_submodule("block_2").get_submodule("between").scale = torch.ones(2)
    sffx.local_loss(compiled, *batch(seed=2))
    (reason,) = set(compiled_blocks(compiled).values()) - {"compiled"}
    assert reason.startswith("scale of a Dropout in it changed after the first step")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("layer", [Counting, Branching])
def test_what_cannot_be_compiled_runs_as_it_is_and_says_why(layer, caplog):
    plain, compiled = pair(layer())
    for step in range(4):
        x, y = batch(seed=step)
        assert torch.equal(*[sffx.local_loss(net, x, y) for net in (plain, compiled)])
    reasons = compiled_blocks(compiled)
    uncompiled = {name: reason for name, reason in reasons.items() if reason != "compiled"}
    assert len(uncompiled) == 1
    ((name, reason),) = uncompiled.items()
    assert f"{name} runs uncompiled: {reason}" in caplog.text


def test_hooks_are_called():
    plain, compiled = pair()
    for _ in range(2):
        sffx.local_loss(compiled, *batch())
    calls = []
    for net in (plain, compiled):
        net.block_1.register_forward_hook(lambda module, args, y: calls.append(y))
        sffx.local_loss(net, *batch())
    assert len(calls) == 2
    assert "has hooks" in compiled_blocks(compiled)["block_1"]
    gradients = []
    weight = next(plain.block_2.parameters())
    twin = next(compiled.block_2.parameters())
    for parameter in (weight, twin):
        parameter.register_hook(lambda gradient: gradients.append(gradient.clone()))
    for net in (plain, compiled):
        sffx.local_loss(net, *batch()).backward()
    assert len(gradients) == 2


def test_seeds_of_blocks_are_honoured():
    plain, compiled = pair(nn.Dropout(0.5))
    for _ in range(3):
        losses = []
        for net in (plain, compiled):
            with sffx.block_seeds(7):
                losses.append(sffx.local_loss(net, *batch()))
        assert torch.equal(*losses)
    assert set(compiled_blocks(compiled).values()) == {"not yet"}


def test_a_copy_is_not_compiled():
    compiled = pair()[1]
    twin = copy.deepcopy(compiled)
    with pytest.raises(InputError, match=r"not compiled by sffx. Hint: sffx.compile\(net\)"):
        compiled_blocks(twin)
    sffx.local_loss(twin, *batch()).backward()
    assert all(p.grad is None for p in compiled.parameters())


def test_nets_that_cannot_be_compiled():
    plain = pair()[0]
    with pytest.raises(InputError, match="not a cut model"):
        compile(nn.Linear(2, 2))
    for name in ("fullgraph", "backends"):
        with pytest.raises(InputError, match=f"no option '{name}'. Hint: it takes backend, "):
            compile(plain, **{name: True})
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    sffx.offload(plain, optimizer)
    with pytest.raises(InputError, match="offloaded, sharded or replicated"):
        compile(plain)


@pytest.mark.parametrize(
    "elsewhere",
    [
        lambda net: sffx.offload(net, torch.optim.SGD(net.parameters(), 0.1)),
        sffx.shard,
        sffx.replicate,
    ],
)
def test_compiled_blocks_stay_where_they_are(elsewhere):
    with pytest.raises(InputError, match=r"blocks of net are compiled, and sffx\.\w+ needs them"):
        elsewhere(pair()[1])
    sffx.offload(*_copy_with_optimizer())


def _copy_with_optimizer():
    twin = copy.deepcopy(pair()[1])
    return twin, torch.optim.SGD(twin.parameters(), 0.1)


def test_wrong_input_is_still_explained():
    compiled = pair()[1]
    for _ in range(2):
        sffx.local_loss(compiled, *batch())
    with pytest.raises(InputError, match="the model was cut for"):
        sffx.local_loss(compiled, torch.randn(6, 3, 6, 6, dtype=torch.float64), batch()[1])
