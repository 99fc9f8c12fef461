"""A goodness and a norm of one's own, in everything that takes a cut model."""

import copy
import pickle
import re
from functools import partial

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.blocks import Options
from sffx.draw.graph import block_graph
from sffx.errors import InputError, VerifyError
from sffx.export.early_exit import EarlyExit
from sffx.memory.count import count_memory
from sffx.runtime.evaluate import block_scores
from tests.toys import Chain, Residual, Tokens

IMAGE = torch.zeros(1, 3, 8, 8)


class Pooled(nn.Module):
    """A linear layer on the mean over space."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear(y.mean((2, 3)))


class PooledTokens(nn.Module):
    """A linear layer on the mean over real tokens."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        real = mask.to(y.dtype)[:, :, None]
        return self.linear((y * real).sum(1) / real.sum(1).clamp(min=1))


class Shifted(nn.Module):
    """A linear layer on the pooled squares of the output plus a learned map."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.randn(1, *shape))
        self.linear = nn.Linear(shape[0], num_classes)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear((y + self.map).square().mean((2, 3)))


class Halved(nn.Module):
    def forward(self, y: Tensor) -> Tensor:
        return y / 2


class HalvedTokens(nn.Module):
    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        return y / 2 * mask.to(y.dtype)[:, :, None]


class Wrong(nn.Module):
    """Returns whatever it is told to."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result

    def forward(self, y: Tensor) -> object:
        return self.result(y)


def pooled(block: sffx.blocks.Block, num_classes: int) -> nn.Module:
    return Pooled(block.channels, num_classes)


def halved(block: sffx.blocks.Block) -> nn.Module:
    return Halved()


def custom_net(**options: object) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return sffx.transform(Residual(), "residual", IMAGE, goodness=pooled, **options).double()


def images(batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.arange(batch) % 4


def by_hand(net: torch.fx.GraphModule, x: Tensor) -> list[Tensor]:
    """Each block's goodness and the logits of `custom_net(norm=halved)`, written out."""
    goodness = []
    for i in range(len(net.plan)):
        y = net.get_submodule(f"block_{i}")(x)
        linear = net.get_submodule(f"head_{i}.linear")
        goodness.append(y.mean((2, 3)) @ linear.weight.t() + linear.bias)
        x = y.detach() / 2
    return [*goodness, net.classifier(x)]


def without_dropout(net: torch.fx.GraphModule) -> torch.fx.GraphModule:
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net


def test_values_and_gradients_are_those_written_by_hand():
    net = without_dropout(custom_net(norm=halved)).train()
    x, y = images()
    expected = by_hand(net, x)
    torch.testing.assert_close(net(x), torch.stack(expected), rtol=0, atol=0)
    sum(F.cross_entropy(scores, y) for scores in expected).backward()
    wanted = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    sffx.local_loss(net, x, y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], msg=name)


def test_local_step_is_a_step_with_the_gradients_of_all_losses():
    net = without_dropout(custom_net()).train()
    twin = copy.deepcopy(net)
    x, y = images()
    sffx.local_step(net, x, y, torch.optim.SGD(net.parameters(), 0.1))
    sffx.sff_loss(twin(x), y).backward()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    for (name, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_offloaded_steps_are_those_on_the_device():
    """A norm with buffers runs between the blocks, and is not moved with them."""
    torch.manual_seed(0)
    plain = sffx.transform(
        Chain(),
        "layer",
        IMAGE,
        goodness=pooled,
        norm=lambda block: nn.BatchNorm2d(block.channels, affine=False),
    ).train()
    offloaded = copy.deepcopy(plain)
    x, y = images()
    optimizers = [torch.optim.AdamW(net.parameters()) for net in (plain, offloaded)]
    sffx.offload(offloaded, optimizers[1])
    for _ in range(2):
        sffx.local_step(plain, x.float(), y, optimizers[0])
        sffx.local_step(offloaded, x.float(), y, optimizers[1])
    sffx.onload(offloaded)
    expected = plain.state_dict()
    assert expected["norm_0.num_batches_tracked"] == 2
    for name, value in offloaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("batch", [1, 3])
def test_a_head_may_give_the_same_gradient_to_its_input_and_to_a_parameter(batch):
    """With one sample, autograd gives the block and the map one tensor.

    A kernel that wrote over it would change the gradient of the map.
    """

    def shifted(block, num_classes):
        return Shifted(block.shape, num_classes)

    torch.manual_seed(0)
    net = sffx.transform(Chain(), "layer", IMAGE, goodness=shifted).double().train()
    x, y = images(batch)
    sffx.local_loss(net, x, y).backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    values = x
    for i, block in enumerate(net.plan):
        assert block.shape
        values = net.get_submodule(f"block_{i}")(values)
        F.cross_entropy(net.get_submodule(f"head_{i}")(values), y).backward()
        values = net.get_submodule(f"norm_{i}")(values.detach())
    F.cross_entropy(net.classifier(values), y).backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(found[name], p.grad, msg=name)


def test_masks_reach_goodness_and_norm():
    def tokens(block, num_classes):
        assert block.mask == "attention_mask"
        return PooledTokens(block.channels, num_classes)

    torch.manual_seed(0)
    x = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 0]])
    net = sffx.transform(
        Tokens(), "residual", (x, mask), goodness=tokens, norm=lambda block: HalvedTokens()
    ).train()
    y = net.block_0(*_arguments(net, 0, x, mask))
    real = mask.bool()
    means = torch.stack([sample[row].mean(0) for sample, row in zip(y, real, strict=True)])
    torch.testing.assert_close(net(x, mask)[0], net.head_0.linear(means))
    assert not net.norm_0(y, mask)[~real].any()
    sffx.local_loss(net, (x, mask), torch.tensor([0, 1, 2])).backward()


def _arguments(net: torch.fx.GraphModule, index: int, x: Tensor, mask: Tensor) -> list[Tensor]:
    named = dict(zip([each.name for each in net.plan.inputs], (x, mask), strict=True))
    return [named[name] for name in net.plan.blocks[index].inputs]


def test_evaluation_is_that_of_the_scores_by_hand():
    net = custom_net(norm=halved).eval()
    x, y = images(12)
    with torch.no_grad():
        scores = by_hand(net, x)
    found = sffx.evaluate(net, [(x[:5], y[:5]), (x[5:], y[5:])])
    right = {
        "block_0": scores[0],
        "ensemble": torch.stack(scores[:-1]).mean(0),
        "last": scores[-2],
        "classifier": scores[-1],
    }
    for name, each in right.items():
        assert found.accuracy[name] == float((each.argmax(1) == y).double().mean())
        torch.testing.assert_close(found.loss[name], float(F.cross_entropy(each, y)))


def test_footprint_predicts_the_counted_peak():
    net = custom_net(norm=halved).float().train()
    predicted = sffx.footprint(net, 16)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=1e-3, classifier_lr=1e-3))

    def step() -> None:
        sffx.local_loss(net, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    counted = count_memory(step, model=net, optimizer=optimizer)
    assert predicted.peak == pytest.approx(counted.peak, rel=0.001)


def test_the_memory_policy_counts_the_heads_that_it_is_given():
    model = Residual()

    def wide(block, num_classes):
        values = torch.arange(3).tolist()  # real values, while the head is made
        return nn.Sequential(
            nn.Flatten(), nn.Linear(8 * 64, 400), nn.Linear(400, num_classes), *[] * len(values)
        )

    least = {}
    for name, goodness in (("sff", "sff"), ("wide", wide)):
        with pytest.raises(sffx.CutError, match="the smallest achievable peak is") as error:
            sffx.plan(model, "memory(1 B, 8)", IMAGE, goodness=goodness)
        least[name] = _bytes(str(error.value))
    # One head at least, with its gradients and AdamW's two states: 16 bytes a parameter.
    assert least["wide"] - least["sff"] > 16 * 8 * 64 * 400 * 0.95
    net = sffx.transform(model, f"memory({least['wide'] + 2**14} B, 8)", IMAGE, goodness=wide)
    assert sffx.footprint(net, 8).peak <= least["wide"] + 2**14


def _bytes(message: str) -> int:
    number, unit = re.search(r"peak is ([\d.]+) (\w+)", message).groups()
    return int(float(number) * {"KiB": 2**10, "MiB": 2**20}[unit])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("readout", ["ensemble", "last", "classifier", "cumulative"])
def test_an_onnx_file_has_the_scores_by_hand(tmp_path, readout):
    net = custom_net(norm=halved).eval()
    path = sffx.export_onnx(net, tmp_path / "net.onnx", readout)
    x, _ = images()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.float().numpy()})
    with torch.no_grad():
        *goodness, logits = by_hand(net, x)
    means = [torch.stack(goodness[:depth]).mean(0) for depth in range(1, len(goodness) + 1)]
    expected = {
        "ensemble": means[-1:],
        "last": goodness[-1:],
        "classifier": [logits],
        "cumulative": means,
    }[readout]
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours).double(), wanted, rtol=1e-4, atol=1e-5)


def test_early_exit_answers_as_the_ensemble_where_nobody_leaves_early():
    net = custom_net(norm=halved).eval()
    x, _ = images()
    with torch.no_grad():
        assert torch.equal(EarlyExit(net, threshold=2.0)(x).scores, net(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_and_pickles_of_models_cut_with_closures(copied):
    channels = []

    def closure(block, num_classes):
        channels.append(block.channels)
        return Pooled(block.channels, num_classes)

    net = sffx.transform(Residual(), "residual", IMAGE, goodness=closure, norm=lambda b: Halved())
    twin = copied(net)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(block_scores(twin.eval(), x), block_scores(net.eval(), x))
    assert twin.plan.record() == net.plan.record()
    assert str(twin.plan) == str(net.plan)


def test_a_checkpoint_names_the_callables_and_takes_them_back(tmp_path):
    net = custom_net(norm=halved).eval()
    path = tmp_path / "net.pt"
    sffx.save_checkpoint(path, net)
    checkpoint = sffx.load_checkpoint(path)
    with pytest.raises(InputError, match=r"pass goodness=.*pooled, norm=.*halved as in the train"):
        checkpoint.net(Residual())
    loaded = checkpoint.net(Residual(), goodness=pooled, norm=halved).double().eval()
    x, _ = images()
    assert torch.equal(block_scores(loaded, x), block_scores(net, x))


def test_a_copy_of_a_plan_keeps_the_callable_and_a_pickle_its_name():
    plan = sffx.plan(Residual(), "residual", IMAGE, goodness=pooled, norm=halved)
    assert copy.deepcopy(plan).options.goodness is pooled
    assert copy.copy(plan.options) == plan.options == Options(pooled, norm=halved)
    loaded = pickle.loads(pickle.dumps(plan))
    record = loaded.record()
    assert record["goodness"] == "tests.scenarios.test_custom_goodness.pooled"
    assert record["norm"] == "tests.scenarios.test_custom_goodness.halved"
    assert record["custom"] == ["goodness", "norm"]
    assert pickle.loads(pickle.dumps(loaded)) == loaded
    with pytest.raises(InputError, match=r"pooled is known by name only.*Hint: pass the callable"):
        sffx.transform(Residual(), "residual", IMAGE, goodness=loaded.options.goodness)


def test_a_record_names_any_callable():
    class Maker:
        def __call__(self, block, num_classes):
            return pooled(block, num_classes)

    names = {
        "sff": "sff",
        "Pooled": Pooled,
        "<lambda>": lambda block, num_classes: pooled(block, num_classes),
        "pooled": partial(partial(pooled), num_classes=4),
        "Maker": Maker(),
    }
    for name, goodness in names.items():
        options = Options(goodness)
        assert options.record()["goodness"].rpartition(".")[2] == name
        assert options.custom == ([] if name == "sff" else ["goodness"])


def test_a_norm_of_one_s_own_may_be_none_for_some_blocks():
    net = sffx.transform(
        Residual(), "residual", IMAGE, norm=lambda b: Halved() if b.target == "block_0" else None
    )
    norms = [name for name, _ in net.named_children() if name.startswith("norm_")]
    assert norms == ["norm_0"]


def test_drawings_name_what_is_not_built_in():
    plan = sffx.plan(Residual(), "residual", IMAGE, goodness=pooled, norm=halved)
    text = block_graph(plan).source
    assert "tests.scenarios.test_custom_goodness.pooled" in text
    assert "tests.scenarios.test_custom_goodness.halved" in text


def returns(result: object) -> object:
    return lambda block, num_classes=4: Wrong(result)


WRONG_GOODNESSES = {
    "no module": (lambda b, j: 3, InputError, r"block_0 .*returned a int, not a torch.nn.Module"),
    "a module": (Halved(), InputError, "goodness is a module, Halved, but each block has a head"),
    "a kernel": (pooled, InputError, "kernel_size is 3, but heads of .*pooled' have no conv"),
    "shape": (
        returns(lambda y: y.mean((2, 3))),
        VerifyError,
        r"head_0 returns shape \(.*, 8\), not \(B, J\) = \(.*, 4\)",
    ),
    "type": (returns(lambda y: (y, y)), VerifyError, "head_0 returns a tuple, not a tensor"),
    "dtype": (
        returns(lambda y: y[:, :4, 0, 0] > 0),
        VerifyError,
        "head_0 returns torch.bool, not floats",
    ),
}


@pytest.mark.parametrize("case", WRONG_GOODNESSES)
def test_wrong_goodnesses_are_named(case):
    goodness, error, message = WRONG_GOODNESSES[case]
    options = {"kernel_size": 3} if case == "a kernel" else {}
    with pytest.raises(error, match=message):
        sffx.transform(Residual(), "residual", IMAGE, goodness=goodness, **options)


def test_one_head_for_all_blocks_is_found():
    head = Pooled(8, 4)
    with pytest.raises(VerifyError, match=r"parameter 'head_0\.linear\.weight' .* of block_1"):
        sffx.transform(Residual(), "residual", IMAGE, goodness=lambda block, num_classes: head)


def once(norm: nn.Module, block: sffx.Block) -> nn.Module:
    return norm


WRONG_NORMS = {
    "no module": (lambda b: 3, InputError, "block_0 .*returned a int, not a torch.nn.Module"),
    "a module": (Halved(), InputError, "norm is a module, Halved, but each block has a norm"),
    "parameters": (
        lambda b: nn.BatchNorm2d(b.channels),
        InputError,
        "returned a BatchNorm2d with trainable parameters.*Hint: elementwise_affine=False",
    ),
    "shape": (returns(lambda y: y[:, :4]), VerifyError, r"norm_0 returns shape \(.*, 4, 8, 8\)"),
    "dtype": (
        returns(lambda y: y.double()),
        VerifyError,
        r"norm_0 returns torch\.float64 for a value of torch\.float32.*Hint: return normed\.to",
    ),
    "one for all": (
        partial(once, nn.BatchNorm2d(8, affine=False)),
        InputError,
        r"block_1 .*returned the same BatchNorm2d as before.*Hint: make a new module",
    ),
    "type": (returns(lambda y: None), VerifyError, "norm_0 returns a NoneType, not a tensor"),
    "in place": (returns(lambda y: y.mul_(2)), VerifyError, "'block_0' .* is written in place"),
}


@pytest.mark.parametrize("case", WRONG_NORMS)
def test_wrong_norms_are_named(case):
    norm, error, message = WRONG_NORMS[case]
    with pytest.raises(error, match=message):
        sffx.transform(Residual(), "residual", IMAGE, norm=norm)
