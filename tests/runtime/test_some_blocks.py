"""Some blocks learn, each with a loss and an optimizer of its own; the oracles are plain loops."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.errors import InputError
from tests.toys import Residual, SharedWeight, TwoBranches, kept

NAMES = ["block_0", "block_1", "block_2", "classifier"]


@kept
def cut(**options: object) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(9, 3, 8, 8, dtype=torch.float64)
    net = sffx.transform(Residual().double(), example_input=x, **options).train()
    net.classifier.drop.p = 0.0
    return net, x, torch.randint(0, 4, (9,))


def margin(goodness: Tensor, y: Tensor) -> Tensor:
    return F.multi_margin_loss(goodness, y)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def hand_written(
    net: nn.Module, x: Tensor, y: Tensor, learning: list[str], loss_fn: dict[str, object]
) -> dict[str, Tensor]:
    """Train the named blocks of a net in plain torch, and return their losses.

    Only the modules of the net are used. Blocks that do not learn are in eval mode, under no_grad.
    """
    losses = {}
    for index, name in enumerate(NAMES):
        block = getattr(net, name)
        if not any(later in learning for later in NAMES[index:]):
            break
        if name in learning:
            output = block(x)
            scores = output if name == "classifier" else getattr(net, f"head_{index}")(output)
            loss = loss_fn.get(name, F.cross_entropy)(scores, y)
            loss.backward()
            losses[name] = loss.detach()
        else:
            block.eval()
            with torch.no_grad():
                output = block(x)
            block.train()
        if name != "classifier":
            x = F.layer_norm(output.detach(), output.shape[1:])
    return losses


CHOICES = [["block_0"], ["block_1"], ["block_0", "block_2"], ["classifier"], NAMES]


@pytest.mark.parametrize("learning", CHOICES, ids=str)
def test_some_blocks_learn_as_in_a_hand_written_loop(learning):
    net, x, y = cut()
    twin = copy.deepcopy(net)
    loss_fn = {"block_0": margin, "classifier": nn.CrossEntropyLoss(label_smoothing=0.1)}
    expected = hand_written(net, x, y, learning, loss_fn)
    losses = sffx.block_losses(twin, x, y, loss_fn, blocks=learning)
    assert list(losses) == list(expected)
    for name, loss in losses.items():
        torch.testing.assert_close(loss.detach(), expected[name])
        loss.backward()
    for name, gradient in gradients(net).items():
        torch.testing.assert_close(gradients(twin)[name], gradient)
    assert gradients(twin).keys() == gradients(net).keys()
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(twin.get_buffer(name), buffer)
    assert all(module.training for module in twin.modules())


@pytest.mark.parametrize("learning", CHOICES, ids=str)
def test_the_loss_and_the_step_train_the_same_blocks(learning):
    net, x, y = cut()
    twins = [copy.deepcopy(net) for _ in range(2)]
    sum(sffx.block_losses(net, x, y, blocks=learning).values()).backward()
    loss = sffx.LocalLoss(twins[0], blocks=learning)(x, y)
    loss.backward()
    assert_same(gradients(net), gradients(twins[0]))
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1) for each in (net, twins[1])]
    optimizers[0].step()
    found = sffx.local_step(twins[1], x, y, optimizers[1], blocks=learning)
    assert torch.equal(found, loss.detach())
    assert_same(net.state_dict(), twins[1].state_dict())


def test_blocks_that_do_not_learn_are_called_once_without_gradients_and_heads():
    net, x, y = cut()
    calls = []
    for name, module in net.named_children():

        def note(module, args, name=name):
            calls.append((name, module.training, torch.is_grad_enabled()))

        module.register_forward_pre_hook(note)
    sffx.local_loss(net, x, y, blocks=["block_1"])
    assert calls == [
        ("block_0", False, False),
        ("norm_0", False, False),
        ("block_1", True, True),
        ("head_1", True, True),
    ]


def test_all_blocks_by_name_are_all_blocks_to_the_bit():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    expected = sffx.local_loss(net, x, y)
    expected.backward()
    found = sffx.local_loss(twin, x, y, blocks=NAMES)
    found.backward()
    assert torch.equal(found, expected)
    assert_same(gradients(net), gradients(twin))
    assert_same(dict(net.named_buffers()), dict(twin.named_buffers()))


def test_losses_of_blocks_sum_to_the_local_loss_and_can_be_weighted():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    weights = {"block_0": 0.5, "block_1": 2.0, "block_2": 0.0, "classifier": 1.0}
    losses = sffx.block_losses(net, x, y)
    values = torch.stack([loss.detach() for loss in losses.values()])
    sum(weights[name] * loss for name, loss in losses.items()).backward()
    assert torch.equal(values.sum(), sffx.local_loss(copy.deepcopy(twin), x, y).detach())
    scaled = [
        lambda scores, y, weight=weight: weight * F.cross_entropy(scores, y)
        for weight in weights.values()
    ]
    sffx.sff_loss(twin(x), y, scaled).backward()
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradients(net)[name], gradient)


@pytest.mark.parametrize("model", [TwoBranches, SharedWeight])
def test_side_values_and_shared_weights_pass_through_frozen_blocks(model):
    torch.manual_seed(0)
    shape = (6,) if model is SharedWeight else (3, 8, 8)
    x = torch.randn(9, *shape, dtype=torch.float64)
    y = torch.randint(0, 4, (9,))
    net = sffx.transform(model().double(), "layer", x).train()
    net.eval()
    net.classifier.train()
    scores = sffx.block_scores(net, x)[-1]
    net.train()
    seen = {}

    def keep(name, scores, loss):
        seen[name] = (scores, loss)

    loss = sffx.local_loss(net, x, y, blocks=["classifier"], on_block=keep)
    torch.testing.assert_close(loss, F.cross_entropy(scores, y))
    torch.testing.assert_close(seen["classifier"][0], scores.detach())


def test_the_caller_sees_scores_and_loss_of_each_block_in_a_step():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    seen = {}

    def keep(name, scores, loss):
        seen[name] = (scores, loss)

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    value = sffx.local_step(net, x, y, optimizer, on_block=keep)
    goodness = twin(x)
    assert list(seen) == NAMES
    for own, (scores, loss) in zip(goodness, seen.values(), strict=True):
        assert torch.equal(scores, own)
        assert torch.equal(loss, F.cross_entropy(own, y))
        assert not scores.requires_grad
        assert not loss.requires_grad
    assert torch.equal(value, torch.stack([loss for _, loss in seen.values()]).sum())


@pytest.mark.parametrize("form", ["mapping", "list", "ModuleDict", "ModuleList"])
def test_a_loss_function_for_each_block(form):
    net, x, y = cut()
    smooth = nn.CrossEntropyLoss(label_smoothing=0.2)
    plain = nn.CrossEntropyLoss()
    forms = {
        "mapping": {"block_1": smooth},
        "list": [None, smooth, None, None],
        "ModuleDict": nn.ModuleDict({"block_1": smooth}),
        "ModuleList": nn.ModuleList([plain, smooth, plain, plain]),
    }
    twin = copy.deepcopy(net)
    losses = sffx.block_losses(net, x, y, forms[form])
    for name, scores in zip(NAMES, twin(x), strict=True):
        function = smooth if name == "block_1" else plain
        assert torch.equal(losses[name], function(scores, y)), name
    expected = sffx.sff_loss(copy.deepcopy(twin)(x), y, forms[form])
    assert torch.equal(sffx.local_loss(copy.deepcopy(twin), x, y, forms[form]), expected)


def test_an_optimizer_for_each_block_ends_where_a_hand_written_loop_does():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    kinds = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD]
    groups = zip(kinds, sffx.parameter_groups(net, 0.1), strict=True)
    optimizers = {group["name"]: kind([group], lr=0.1) for kind, group in groups}
    by_hand = [
        kind(
            [
                *getattr(twin, name).parameters(),
                *getattr(twin, f"head_{i}", nn.Module()).parameters(),
            ],
            lr=0.1,
        )
        for i, (kind, name) in enumerate(zip(kinds, NAMES, strict=True))
    ]
    for _ in range(3):
        sffx.local_step(net, x, y, optimizers)
        for optimizer in by_hand:
            optimizer.zero_grad()
        sffx.sff_loss(twin(x), y).backward()
        for optimizer in by_hand:
            optimizer.step()
    assert_same(net.state_dict(), twin.state_dict())


def test_an_optimizer_is_needed_for_the_blocks_that_learn_only():
    net, x, y = cut()
    before = copy.deepcopy(net.state_dict())
    group = sffx.parameter_groups(net, 0.1)[1]
    optimizers = {"block_1": torch.optim.SGD([group])}
    with pytest.raises(InputError, match=r"block_0 has no optimizer.*Hint: blocks="):
        sffx.local_step(net, x, y, optimizers)
    assert_same(net.state_dict(), before)
    sffx.local_step(net, x, y, optimizers, blocks=["block_1"])
    changed = {
        name.partition(".")[0]
        for name, value in net.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"block_1", "head_1"}


def test_an_optimizer_that_lacks_the_head_is_refused():
    net, x, y = cut()
    optimizers = {"block_1": torch.optim.SGD(net.block_1.parameters(), lr=0.1)}
    with pytest.raises(InputError, match=r"the optimizer of block_1 lacks 2 of its \d+ trainable"):
        sffx.local_step(net, x, y, optimizers, blocks=["block_1"])


@pytest.mark.parametrize(
    ("held", "frozen", "apart"),
    [
        (["classifier"], [], "block_0, block_1, .*"),
        (["block_0", "head_0", "block_1", "head_1"], [], ".*classifier"),
        # The optimizer holds frozen parameters alone.
        (["block_0"], ["block_0", "head_0"], "block_1, .*"),
    ],
)
def test_a_block_that_no_optimizer_holds_is_named(
    held: list[str], frozen: list[str], apart: str
) -> None:
    net, x, y = cut()
    before = copy.deepcopy(net.state_dict())
    for name in frozen:
        net.get_submodule(name).requires_grad_(False)
    parameters = [p for name in held for p in net.get_submodule(name).parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    with pytest.raises(InputError, match=rf"holds no parameter of {apart}, which would learn noth"):
        sffx.local_step(net, x, y, optimizer)
    assert_same(net.state_dict(), before)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("block_0", r"blocks is 'block_0', not a list\. Hint: blocks=\['block_0'\]"),
        (["block_7"], r"blocks names 'block_7'\. Hint: the blocks are block_0, .*classifier"),
        ([], r"blocks names no block"),
    ],
)
def test_blocks_that_are_not_there(blocks, message):
    net, x, y = cut()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(InputError, match=message):
        sffx.local_loss(net, x, y, blocks=blocks)
    with pytest.raises(InputError, match=message):
        sffx.local_step(net, x, y, optimizer, blocks=blocks)


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        ({"block_9": margin}, r"loss_fn names 'block_9', but the blocks are block_0, .*classifier"),
        ([margin], r"loss_fn holds 1 functions, but there are 4 blocks"),
    ],
)
def test_loss_functions_of_other_blocks(loss_fn, message):
    net, x, y = cut()
    with pytest.raises(InputError, match=message):
        sffx.local_loss(net, x, y, loss_fn)


def test_labels_are_checked_where_a_block_has_cross_entropy():
    net, x, y = cut()
    functions = dict.fromkeys(NAMES, lambda scores, y: scores.square().mean())
    sffx.local_loss(net, x, y + 100, functions)
    del functions["block_2"]
    with pytest.raises(InputError, match="labels run from"):
        sffx.local_loss(net, x, y + 100, functions)
    sffx.local_loss(net, x, y + 100, functions, blocks=["block_0"])


def test_an_offloaded_net_trains_some_blocks():
    net, x, y = cut()
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.AdamW(sffx.parameter_groups(each, 0.1)) for each in (net, twin)]
    sffx.offload(net, optimizers[0], "cpu")
    for learning in (["block_1"], ["block_0", "classifier"]):
        losses = [
            sffx.local_step(each, x, y, optimizer, blocks=learning)
            for each, optimizer in zip((net, twin), optimizers, strict=True)
        ]
        assert torch.equal(*losses)
    assert_same(net.state_dict(), twin.state_dict())


def test_an_interrupted_step_leaves_the_modes():
    net, x, y = cut()

    def stop(module, args):
        raise KeyboardInterrupt

    net.norm_0.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        sffx.local_loss(net, x, y, blocks=["block_1"])
    assert all(module.training for module in net.modules())
