from __future__ import annotations

import copy
import functools
import gc
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import sffx
from sffx.errors import InputError
from sffx.memory.count import count_memory
from sffx.runtime import update
from sffx.runtime.step import scaled
from tests.runtime import interrupts
from tests.toys import (
    Chain,
    Residual,
    Rounding,
    SharedBias,
    SharedWeight,
    TwoBranches,
    kept,
    step_scores,
)
from tools.operations import counted_operations

MODELS = {
    "chain": (Chain, (3, 8, 8)),
    "residual": (Residual, (3, 8, 8)),
    "two branches": (TwoBranches, (3, 8, 8)),
    "shared weight": (SharedWeight, (6,)),
    "rounding": (Rounding, (6,)),
    "shared bias": (SharedBias, (6,)),
}


@kept
def cut(name: str, **options: object) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    kind, shape = MODELS[name]
    x = torch.randn(9, *shape, dtype=torch.float64)
    options = {"policy": "layer", **options}
    return (
        sffx.transform(kind().double(), example_input=x, **options).train(),
        x,
        torch.randint(0, 4, (9,)),
    )


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def deferred(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(1)
    loss = sffx.sff_loss(net(x), y)
    loss.backward()
    return loss.detach()


def local(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    torch.manual_seed(1)
    loss = sffx.local_loss(net, x, y)
    loss.backward()
    return loss.detach()


@pytest.mark.sampled(18)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "none"},
        {"goodness": "cwc"},
        {"goodness": "mlp"},
        {"kernel_size": 3},
        {"policy": "residual"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", MODELS)
def test_same_value_gradients_and_buffers_as_the_deferred_way_to_the_bit(name, options):
    net, x, y = cut(name, **options)
    twin = copy.deepcopy(net)
    assert torch.equal(deferred(net, x, y), local(twin, x, y))
    assert_same(gradients(net), gradients(twin))
    assert_same(dict(net.named_buffers()), dict(twin.named_buffers()))


def test_resnet18_same_to_the_bit():
    torch.manual_seed(0)
    net = sffx.transform(
        torchvision.models.resnet18(num_classes=10).double(),
        example_input=torch.zeros(1, 3, 32, 32, dtype=torch.float64),
    ).train()
    x, y = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.randint(0, 10, (4,))
    twin = copy.deepcopy(net)
    assert torch.equal(deferred(net, x, y), local(twin, x, y))
    assert_same(gradients(net), gradients(twin))


def test_step_of_an_optimizer_of_the_original_model_is_refused():
    model = Chain()
    optimizer = torch.optim.AdamW(model.parameters())
    net = sffx.transform(model, example_input=torch.zeros(1, 3, 8, 8)).train()
    with pytest.raises(
        InputError,
        match=(
            r"the optimizer holds \d+ parameters, none of them of net\. "
            r"Hint: make it by AdamW\(sffx"
        ),
    ):
        sffx.local_step(net, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), optimizer)


def test_gradients_of_a_hand_written_detached_loop():
    """The method in plain torch, without anything of sffx but the weights."""
    net, x, y = cut("residual", policy="residual")
    net.classifier.drop.p = 0.0
    model = copy.deepcopy(net.origin.model)
    heads = [copy.deepcopy(net.get_submodule(f"head_{i}")) for i in range(3)]
    local(net, x, y)

    value, total = x, 0.0
    for block, head in zip((model.stem, model.block1, model.block2), heads, strict=True):
        output = block(value)
        goodness = F.conv2d(output, head.weight, head.bias).square().mean((2, 3))
        loss = F.cross_entropy(goodness, y)
        loss.backward()
        total += loss.item()
        value = F.layer_norm(output.detach(), output.shape[1:])
    loss = F.cross_entropy(model.head(value.mean((2, 3))), y)
    loss.backward()

    found = {
        name.partition(".")[2]: g
        for name, g in gradients(net).items()
        if not name.startswith("head_")
    }
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    for i, head in enumerate(heads):
        torch.testing.assert_close(net.get_submodule(f"head_{i}").weight.grad, head.weight.grad)
    torch.testing.assert_close(local(net, x, y).item(), total + loss.item())


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_a_block_reaches_no_other_block(name):
    net, x, y = cut(name)
    parameters = dict(net.named_parameters())
    for k, scores in enumerate(step_scores(net, x)):
        own = ("classifier",) if k == len(net.plan) else (f"block_{k}", f"head_{k}")
        found = torch.autograd.grad(
            F.cross_entropy(scores, y), list(parameters.values()), allow_unused=True
        )
        for parameter, gradient in zip(parameters, found, strict=True):
            assert (gradient is not None) == (parameter.partition(".")[0] in own), parameter


def test_batch_statistics_are_updated_once_a_step():
    net, x, y = cut("residual")
    local(net, x, y)
    assert {int(b) for name, b in net.named_buffers() if name.endswith("num_batches_tracked")} == {
        1
    }


def test_accumulation_scaling_and_clipping_are_those_of_an_ordinary_loss():
    net, x, y = cut("two branches")
    twin = copy.deepcopy(net)
    for half in (slice(0, 4), slice(4, 9)):
        (sffx.local_loss(net, x[half], y[half]) * (half.stop - half.start) / 9).backward()
        (sffx.sff_loss(twin(x[half]), y[half]) * (half.stop - half.start) / 9).backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    norms = [nn.utils.clip_grad_norm_(module.parameters(), 0.1) for module in (net, twin)]
    torch.testing.assert_close(*norms)


def test_the_loss_adds_to_other_losses():
    net, x, y = cut("two branches")
    penalty = sum(p.square().sum() for p in net.parameters())
    (sffx.local_loss(net, x, y) + penalty).backward()
    twin, _, _ = cut("two branches")
    local(twin, x, y)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad + 2 * q)


def test_a_second_backward_is_refused():
    net, x, y = cut("chain")
    loss = sffx.local_loss(net, x, y)
    loss.backward(retain_graph=True)
    with pytest.raises(
        RuntimeError,
        match=r"backward was called twice on one local_loss.*Hint: call local_loss again",
    ):
        loss.backward()


def test_without_gradients_only_the_value_is_computed():
    net, x, y = cut("chain")
    with torch.no_grad():
        loss = sffx.local_loss(net, x, y)
    assert not loss.requires_grad
    assert not gradients(net)


@pytest.mark.parametrize("frozen", ["block_0", "head_0", "block_1", "classifier"])
def test_frozen_parts_pass_their_value_on(frozen):
    net, x, y = cut("chain")
    net.get_submodule(frozen).requires_grad_(False)
    twin = copy.deepcopy(net)
    assert torch.equal(deferred(net, x, y), local(twin, x, y))
    assert_same(gradients(net), gradients(twin))
    assert not any(name.startswith(f"{frozen}.") for name in gradients(net))


def test_all_frozen_gives_a_plain_value():
    net, x, y = cut("chain")
    net.requires_grad_(False)
    assert not sffx.local_loss(net, x, y).requires_grad


def test_under_autocast_as_the_deferred_way():
    torch.manual_seed(0)
    net = sffx.transform(Residual()).train()
    net.classifier.drop.p = 0.0
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    twin = copy.deepcopy(net)
    with torch.autocast("cpu", torch.bfloat16):
        a = sffx.sff_loss(net(x), y)
        b = sffx.local_loss(twin, x, y)
    a.backward()
    b.backward()
    assert torch.equal(a, b)
    assert_same(gradients(net), gradients(twin))
    assert all(g.dtype == torch.float32 for g in gradients(net).values())


def test_the_module_form_is_the_same():
    net, x, y = cut("residual")
    twin = copy.deepcopy(net)
    local(net, x, y)
    torch.manual_seed(1)
    sffx.LocalLoss(twin)(x, y).backward()
    assert_same(gradients(net), gradients(twin))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_local_step_ends_where_the_loss_and_the_optimizer_do(name, kind, grouped):
    net, x, y = cut(name)
    twin = copy.deepcopy(net)
    optimizers = [
        kind(sffx.parameter_groups(m, lr=0.1) if grouped else m.parameters(), lr=0.1)
        for m in (net, twin)
    ]
    for seed in range(3):
        torch.manual_seed(seed)
        optimizers[0].zero_grad()
        loss = sffx.local_loss(net, x, y)
        loss.backward()
        optimizers[0].step()
        torch.manual_seed(seed)
        assert torch.equal(sffx.local_step(twin, x, y, optimizers[1]), loss)
    assert_same(net.state_dict(), twin.state_dict())
    assert not gradients(twin)
    assert [len(o.param_groups) for o in optimizers] == [len(optimizers[0].param_groups)] * 2


def test_steps_under_one_autocast_are_those_under_one_each():
    torch.manual_seed(0)
    net = sffx.transform(TwoBranches()).train()
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, twin)]
    x, y = torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        found = [sffx.local_step(net, x, y, optimizers[0]) for _ in range(3)]
    for loss in found:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(sffx.local_step(twin, x, y, optimizers[1]), loss)


def test_the_local_step_holds_the_gradients_of_one_block_at_a_time():
    layers = [layer for _ in range(8) for layer in (nn.Linear(256, 256), nn.ReLU())]
    net = sffx.transform(nn.Sequential(*layers, nn.Linear(256, 4)), "layer").train()
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, lr=0.1))
    x, y = torch.randn(4, 256), torch.randint(0, 4, (4,))
    counted = count_memory(
        lambda: sffx.local_step(net, x, y, optimizer), model=net, optimizer=optimizer
    )
    one_block = 4 * (256 * 256 + 256 + 4 * 256 + 4)
    assert counted.gradients <= one_block


def test_activations_of_one_block_at_a_time_on_resnet18():
    """The bar of the project: at most 0.55 of backpropagation's peak of activations.

    The images are of 32 x 32, the batch is 128, and there are 10 classes.
    """
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).train()
    net = sffx.transform(model, example_input=torch.zeros(1, 3, 32, 32))
    x, y = torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))
    plain = count_memory(lambda: F.cross_entropy(model(x), y).backward(), model=model)
    cut_model = count_memory(lambda: sffx.local_loss(net, x, y).backward(), model=net)
    assert cut_model.activations <= 0.55 * plain.activations


def test_activations_do_not_grow_with_depth():
    def peak(depth: int) -> int:
        layers = [layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.ReLU())]
        net = sffx.transform(nn.Sequential(*layers, nn.Linear(64, 4)), "layer").train()
        x, y = torch.randn(256, 64), torch.randint(0, 4, (256,))
        return count_memory(lambda: sffx.local_loss(net, x, y).backward(), model=net).activations

    assert (
        peak(24) <= peak(4) + 24 * 256
    )  # a few bytes of loss for each block, where one activation is 64 KiB


def test_nothing_of_a_block_outlives_the_step():
    net, x, y = cut("residual")
    before = activations()
    local(net, x, y)
    gc.collect()
    assert activations() == before


def activations() -> set[int]:
    """Return the addresses of all images and maps of a batch that are alive."""
    alive = set()
    for found in gc.get_objects():
        if type(found) is Tensor and found.ndim == 4 and found.shape[0] == 9:
            alive.add(id(found))
    return alive


class _Summed(nn.Module):
    """Two parameters added up, and one that is broadcast.

    Autograd gives the first two one gradient tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w, self.d, self.s = (
            nn.Parameter(torch.randn(*shape)) for shape in ((6, 6), (6, 6), (6,))
        )
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.w + self.d) * self.s.sum())
        return self.head(F.relu(self.second(x)))


def test_a_scaled_loss_scales_every_gradient_once():
    torch.manual_seed(0)
    net = sffx.transform(
        _Summed().double(), ["relu"], torch.zeros(1, 6, dtype=torch.float64)
    ).train()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    twin = copy.deepcopy(net)
    (0.5 * sffx.local_loss(net, x, y)).backward()
    (0.5 * sffx.sff_loss(twin(x), y)).backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_hooks_of_parameters_run_once():
    net, x, y = cut("two branches")
    for p in net.parameters():
        p.register_hook(lambda gradient: gradient * 2)
    twin = copy.deepcopy(net)
    for p in twin.parameters():
        p.register_hook(lambda gradient: gradient * 2)
    local(net, x, y)
    deferred(twin, x, y)
    assert_same(gradients(net), gradients(twin))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda net, x, y: (Chain(), x, y),
            r"net is a Chain, not a cut model\. Hint: pass what sffx\.transform returned",
        ),
        (lambda net, x, y: (net.eval(), x, y), r"in eval mode.*Hint: call net\.train\(\)"),
        (lambda net, x, y: (net, x, y + 4), r"labels run from \d to 7, but there are 4 classes"),
        (lambda net, x, y: (net, x, y[:-1]), r"y has shape \(8,\), not \(9,\)"),
        (lambda net, x, y: (net, (x, x), y), r"x holds 2 inputs, but the model takes 1: input"),
        (lambda net, x, y: (net, {"z": x}, y), r"x has the keys 'z', but the model takes 'input'"),
        (lambda net, x, y: (net, [1], y), r"x is a list, not a tensor"),
        (lambda net, x, y: (net, x, [0]), r"y is a list, not a tensor"),
        (
            lambda net, x, y: (net, x.clone().requires_grad_(), y),
            r"x requires gradient.*Hint: pass x\.detach\(\)",
        ),
    ],
)
def test_steps_that_cannot_be_made(change, message):
    with pytest.raises(InputError, match=message):
        sffx.local_loss(*change(*cut("chain")))


@pytest.mark.parametrize("recompute", [True, False])
def test_hooks_see_the_gradients_that_they_see_in_the_deferred_way(recompute):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 1),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4)).double()
    x, y = torch.randn(9, 3, 8, 8, dtype=torch.float64), torch.randint(0, 4, (9,))
    model(x)
    net = sffx.transform(model, ["_7"], x, recompute=recompute).train()
    # Not the first layer, whose input has no gradient.
    watched = [
        module
        for name, module in net.named_modules()
        if name == "head_0" or (name.startswith("block_0.") and name != "block_0.0")
    ]
    seen: list[Tensor] = []
    for module in watched:
        module.register_full_backward_hook(
            lambda module, given, received: seen.extend(
                g for g in (*given, *received) if g is not None
            )
        )
    twin_seen: list[list[Tensor]] = []
    for loss in (lambda: sffx.sff_loss(net(x), y), lambda: sffx.local_loss(net, x, y)):
        seen.clear()
        loss().backward()
        twin_seen.append(seen.copy())
    assert len(watched) > 4
    assert len(twin_seen[0]) == len(twin_seen[1]) >= 2 * len(watched)
    for a, b in zip(*twin_seen, strict=True):
        torch.testing.assert_close(a, b)


def test_a_value_that_a_hook_has_kept_is_not_written_over():
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 4))
    net, kept = sffx.transform(model, ["_2"], norm="none").train(), []
    net.block_0.get_submodule("0").register_forward_hook(
        lambda module, args, out: kept.append((out, out.detach().clone()))
    )
    local(net, torch.randn(9, 6), torch.randint(0, 4, (9,)))
    assert torch.equal(*kept[0])


def test_hooks_after_the_accumulation_run_in_a_step_of_its_own():
    net, x, y = cut("chain")
    twin = copy.deepcopy(net)
    optimizers = []

    def clamp(p: Tensor) -> None:
        p.grad.clamp_(-1e-3, 1e-3)

    for model in (net, twin):
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(clamp)
        optimizers.append(torch.optim.SGD(model.parameters(), lr=1.0))
    sffx.local_loss(net, x, y).backward()
    optimizers[0].step()
    sffx.local_step(twin, x, y, optimizers[1])
    assert_same(dict(net.named_parameters()), dict(twin.named_parameters()))


def test_parameters_of_other_models_are_left_alone():
    net, x, y = cut("chain")
    other = nn.Parameter(torch.zeros(()))
    other.grad = torch.ones(())
    optimizer = torch.optim.SGD([{"params": [*net.parameters(), other]}], lr=1.0)
    held = list(optimizer.param_groups[0]["params"])
    sffx.local_step(net, x, y, optimizer)
    assert other.item() == 0
    assert optimizer.param_groups[0]["params"] == held


@pytest.mark.parametrize("soft", [False, True])
def test_a_loss_of_ones_own_and_probabilities_train_as_in_the_deferred_way(soft):
    net, x, y = cut("residual")
    loss_fn = (
        None if soft else nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.rand(4).double())
    )
    y = F.one_hot(y, 4).double().lerp(torch.full((9, 4), 0.25).double(), 0.3) if soft else y
    twins = [copy.deepcopy(net) for _ in range(2)]
    torch.manual_seed(1)
    expected = sffx.sff_loss(net(x), y, loss_fn)
    expected.backward()
    torch.manual_seed(1)
    found = sffx.LocalLoss(twins[0], loss_fn)(x, y)
    found.backward()
    assert torch.equal(found, expected)
    assert_same(gradients(net), gradients(twins[0]))
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (net, twins[1])]
    optimizers[0].step()
    torch.manual_seed(1)
    sffx.local_step(twins[1], x, y, optimizers[1], loss_fn)
    assert_same(dict(net.named_parameters()), dict(twins[1].named_parameters()))


def test_an_optimizer_that_asks_for_the_loss_again_is_refused():
    net, x, y = cut("chain")
    with pytest.raises(
        InputError,
        match=r"LBFGS computes the loss several times.*Hint: sffx\.local_loss in its closure",
    ):
        sffx.local_step(net, x, y, torch.optim.LBFGS(net.parameters()))


@pytest.mark.parametrize("step", [False, True])
def test_a_block_whose_own_parameters_get_nothing_is_named(step):
    net = sffx.transform(Chain(), "layer", torch.zeros(1, 3, 8, 8), goodness="cwc").train()
    layer = next(module for module in net.block_1.modules() if isinstance(module, nn.Conv2d))
    for name in ("weight", "bias"):  # what a wrapper does that trains others in their place
        tensor = getattr(layer, name).detach().clone().requires_grad_()
        delattr(layer, name)
        setattr(layer, name, tensor)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train = (lambda *args: sffx.local_step(*args, optimizer)) if step else sffx.local_loss
    with pytest.raises(
        InputError,
        match=r"block_1 has a gradient, but none for its \d trainable parameters.*sff_loss",
    ):
        train(net, torch.randn(4, 3, 8, 8), torch.arange(4) % 4)


def test_a_loss_that_learns_is_refused_where_the_first_block_is_frozen():
    net = sffx.transform(Chain(), "layer", torch.zeros(1, 3, 8, 8)).train()
    for part in (net.block_0, net.head_0):
        part.requires_grad_(False)
    scale = torch.ones((), requires_grad=True)
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4) % 4
    with pytest.raises(InputError, match="hands gradients to 1 tensors"):
        sffx.local_loss(net, x, y, lambda scores, y: F.cross_entropy(scores * scale, y))
    assert scale.grad is None


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda scores, y: F.cross_entropy(scores.detach(), y),
        lambda scores, y: (scores.argmax(1) == y).float().mean(),
    ],
)
def test_a_loss_without_gradient_is_refused_by_the_name_of_its_block(loss_fn):
    net = sffx.transform(Chain(), "layer", torch.zeros(1, 3, 8, 8)).train()
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4) % 4
    with pytest.raises(InputError, match="returned for block_1 carries no gradient"):
        sffx.local_loss(net, x, y, {"block_1": loss_fn})


def test_an_interrupt_at_any_line_of_the_update_leaves_the_optimizer_whole():
    net = sffx.transform(Chain(), "layer", torch.zeros(1, 3, 8, 8)).train()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-3))
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    call = functools.partial(sffx.local_step, net, x, y, optimizer)
    call()
    groups = [list(group["params"]) for group in optimizer.param_groups]
    functions = ("apply", "_step_on", "_restore")
    for line in range(interrupts.lines_run(update, call, functions)):
        interrupts.interrupt(update, call, functions, line)
        assert [list(group["params"]) for group in optimizer.param_groups] == groups, line
    before = [p.clone() for p in net.parameters()]
    call()
    changed = [not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)]
    assert all(changed)


class Tempered(nn.Module):
    """Cross-entropy with a temperature that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, goodness: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(goodness * self.temperature, y)


def test_a_loss_that_learns_and_targets_that_learn_are_refused():
    net = sffx.transform(Chain(), "layer", torch.zeros(1, 3, 8, 8)).train()
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    learning = torch.full((4, 4), 0.25, requires_grad=True)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-3))
    for targets, loss_fn in ((y, Tempered()), (learning, None), (learning * 1, None)):
        with pytest.raises(
            InputError, match=r"hands gradients to 1 tensors .* Hint: use sffx\.sff"
        ):
            sffx.local_loss(net, x, targets, loss_fn)
        with pytest.raises(InputError, match="hands gradients to 1 tensors"):
            sffx.local_step(net, x, targets, optimizer, loss_fn)
    sffx.local_loss(net, x, y, Tempered().requires_grad_(False)).backward()


@pytest.mark.parametrize("place", ["no_grad", "inference_mode", "frozen"])
def test_a_step_that_would_train_nothing_is_refused_and_changes_nothing(place):
    net = sffx.transform(Residual(), "layer", torch.zeros(1, 3, 8, 8)).train()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-3))
    before = copy.deepcopy(net.state_dict())
    contexts = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    if place == "frozen":
        net.requires_grad_(False)
    with contexts.get(place, nullcontext)(), pytest.raises(InputError, match="would train nothing"):
        sffx.local_step(net, torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]), optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_gradients_of_half_precision_survive_the_first_loss_scale_of_a_scaler():
    net = (
        sffx.transform(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), "layer", torch.zeros(2, 4)
        )
        .train()
        .half()
    )
    other = copy.deepcopy(net)
    x, y = torch.randn(4, 4).half() / 100, torch.tensor([0, 1, 2, 0])
    (sffx.local_loss(net, x, y) * 65536.0).backward()
    (sffx.sff_loss(other(x), y) * 65536.0).backward()
    for p, expected in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, atol=0.05, rtol=0.02)


def test_gradients_are_scaled_by_one_operation_for_each_dtype():
    torch.manual_seed(0)
    gradients = [torch.randn(3, dtype=dtype) for dtype in (torch.float32, torch.float64) * 3]
    gradients.append(torch.randn(2, dtype=torch.float16))
    unscaled = [gradient.clone() for gradient in gradients]
    scale = torch.tensor(0.7)
    with counted_operations() as found:
        results = scaled(gradients, scale)
    assert found.names["aten._foreach_mul_.Tensor"] == 2
    for result, gradient, before in zip(results, gradients, unscaled, strict=True):
        is_wide = before.dtype != torch.float16
        factor = scale.to(before.dtype) if is_wide else scale
        assert torch.equal(result, (before * factor).to(before.dtype))
        # A gradient narrower than the scale is not scaled where it lies.
        assert (result.data_ptr() == gradient.data_ptr()) == is_wide


def test_the_loss_may_be_written_on():
    net = sffx.transform(_Summed(), ["relu"], torch.zeros(1, 6)).train()
    x, y = torch.randn(4, 6), torch.tensor([0, 1, 0, 1])
    seen = []
    losses = sffx.block_losses(net, x, y, on_block=lambda name, scores, loss: seen.append(loss))
    for loss, of_block in zip(losses.values(), seen, strict=True):
        value = of_block.clone()
        loss *= 2
        assert torch.equal(of_block, value)
    total = sffx.local_loss(net, x, y)
    total += 1
    total.backward()
    assert all(p.grad is not None for p in net.parameters())
