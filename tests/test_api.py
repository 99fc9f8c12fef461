"""The cut model as a whole: it keeps the original's function, and does what models do."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn

import sffx
from sffx.errors import InputError
from tests.toys import Chain, Residual

# Architectures that differ in how values meet, with the input they are run on. `tools.zoo` compares
# the others.
FAMILIES = {
    "convnext_tiny": 64,
    "densenet121": 64,
    "googlenet": 96,
    "mobilenet_v3_small": 64,
    "regnet_y_400mf": 64,
    "resnet18": 64,
    "shufflenet_v2_x0_5": 64,
    "swin_t": 64,
    "vit_b_32": 224,
}


def without_values(name: str) -> nn.Module:
    """Make a model whose weights are still to be drawn."""
    options = {"init_weights": False} if name == "googlenet" else {}
    with pytest.MonkeyPatch.context() as patch:
        for draw in ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_"):
            patch.setattr(nn.init, draw, lambda tensor, *_, **__: tensor)
        return getattr(torchvision.models, name)(num_classes=10, **options)


def rerandomised(model: nn.Module) -> nn.Module:
    """Give every parameter a value that matters.

    Some models start with a head of zeros, which would make a comparison empty.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                nn.init.kaiming_normal_(p, generator=generator) if p.shape[0] > 1 else p.normal_(
                    0, 0.02, generator=generator
                )
            else:
                p.uniform_(0.5, 1.5, generator=generator) if name.endswith("weight") else p.normal_(
                    0, 0.1, generator=generator
                )
    return model


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", FAMILIES)
def test_without_norm_the_trunk_is_the_original_bit_for_bit(name):
    model = rerandomised(without_values(name))
    if name == "googlenet":
        # Its auxiliary classifiers, which are left out, draw random numbers before the dropout.
        model.dropout.p = 0.0
    x = torch.randn(3, 3, FAMILIES[name], FAMILIES[name])
    net = sffx.transform(model, example_input=x[:1], norm="none")
    net.readout.mode = "classifier"
    for training in (True, False):  # train mode first, so that BN has statistics to evaluate with
        outputs = []
        for module in (model.train(training), net.train(training)):
            torch.manual_seed(0)
            with torch.no_grad():
                outputs.append(module(x))
        expected = outputs[0] if isinstance(outputs[0], torch.Tensor) else outputs[0][0]
        found = outputs[1][-1] if training else outputs[1]
        assert expected.abs().max() > 1e-3
        assert torch.equal(found, expected)
    buffers = dict(sffx.extract(net).named_buffers())
    assert all(
        torch.equal(buffer, buffers[key])
        for key, buffer in model.named_buffers()
        if "aux" not in key.lower()
    )


@pytest.fixture
def net():
    torch.manual_seed(0)
    return sffx.transform(Residual())


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 3, 0, 1])


def test_shapes_and_readouts(net):
    assert net.train()(X).shape == (4, 6, 4)
    net.eval()
    goodness = [net.readout.mode, net(X)]
    scores = {}
    for mode in ("ensemble", "last", "classifier"):
        net.readout.mode = mode
        scores[mode] = net(X)
        assert scores[mode].shape == (6, 4)
    assert goodness[0] == "ensemble"
    assert torch.equal(goodness[1], scores["ensemble"])
    parts = sffx.block_scores(net, X)
    assert torch.equal(scores["ensemble"], parts[:-1].mean(0))
    assert torch.equal(scores["last"], parts[-2])
    assert torch.equal(scores["classifier"], parts[-1])
    with pytest.raises(
        InputError,
        match=r"there is no readout 'best'\. Hint: the readouts are "
        "'ensemble', 'weighted', 'last', 'classifier'",
    ):
        net.readout.mode = "best"


def test_copies_are_independent_and_carry_the_plan(net):
    twin = copy.deepcopy(net).eval()
    twin.readout.mode = "last"
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert twin.plan == net.plan
    assert net.readout.mode == "ensemble"
    assert not torch.equal(net.eval()(X), twin(X))
    own = {id(p) for p in twin.parameters()}
    assert {id(p) for p in twin.origin.model.parameters()} <= own


def test_state_dict_and_whole_model_survive_a_file(net):
    for weights_only in (True, False):
        file = io.BytesIO()
        torch.save(net.state_dict() if weights_only else net, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
        other = sffx.transform(Residual()) if weights_only else loaded
        if weights_only:
            other.load_state_dict(loaded)
        assert torch.equal(other.eval()(X), net.eval()(X))
        assert other.plan == net.plan
        assert torch.equal(
            sffx.extract(other).stem[0].weight, net.block_0.stem.get_submodule("0").weight
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(net, dtype):
    net = net.to(dtype).train()
    loss = sffx.local_loss(net, X.to(dtype), Y)
    loss.backward()
    assert all(p.grad.dtype == dtype for p in net.parameters())
    assert loss.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


def test_a_meta_model_can_be_planned_and_cut():
    with torch.device("meta"):
        model = Residual()
    assert len(sffx.transform(model).plan) == 3


def test_channels_last_gives_the_same(net):
    net.classifier.drop.p = 0.0
    expected = net(X)
    found = copy.deepcopy(net).to(memory_format=torch.channels_last)(
        X.to(memory_format=torch.channels_last)
    )
    torch.testing.assert_close(found, expected)


def test_compiled_gives_the_same(net):
    net = net.eval()
    net.classifier.drop.p = 0.0
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), net(X))
    trained = copy.deepcopy(net).train()
    step = torch.compile(trained, backend="aot_eager", fullgraph=True)
    sffx.sff_loss(step(X), Y).backward()
    plain = copy.deepcopy(net).train()
    sffx.sff_loss(plain(X), Y).backward()
    for p, q in zip(trained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_blocks_have_the_mode_of_the_model():
    for training in (True, False):
        net = sffx.transform(Residual().train(training))
        assert {m.training for m in net.modules() if type(m) is not nn.Module} == {training}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"norm": "batch"},
            r"there is no norm 'batch'\. Hint: choose one of 'layer', 'length'",
        ),
        (
            {"goodness": "best"},
            r"there is no goodness 'best'\. "
            r"Hint: choose one of 'sff', 'cwc', 'cosine', 'cosine\(4\)'",
        ),
        (
            {"kernel_size": 2},
            r"kernel_size is 2\. Hint: pass an odd positive integer",
        ),
        ({"num_classes": 7}, r"num_classes is 7, but the model returns 4 logits"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(InputError, match=message):
        sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8), **options)


@pytest.mark.parametrize("cut_again", [sffx.transform, sffx.plan])
def test_what_is_cut_is_not_cut_again(cut_again):
    net = sffx.transform(Chain(), example_input=torch.zeros(1, 3, 8, 8))
    with pytest.raises(
        InputError,
        match=r"the model is cut already\. Hint: sffx\.extract\(net\) gives the plain model back",
    ):
        cut_again(net)


def test_cwc_needs_a_channel_for_each_class():
    with pytest.raises(InputError, match=r"block_0 .*has 6 channels for 9 classes"):
        sffx.transform(Chain(classes=9), example_input=torch.zeros(1, 3, 8, 8), goodness="cwc")


def test_the_plan_prints_as_a_table(net):
    lines = str(net.plan).splitlines()
    assert lines[0] == "Residual, policy 'residual': 3 feature blocks and the classifier, 4 classes"
    assert lines[1].split() == [
        "block",
        "modules",
        "cut",
        "after",
        "output",
        "parameters",
        "MACs",
        "kept/sample",
    ]
    assert lines[3].split()[:4] == ["block_1", "block1", "block1_relu_1", "8x224x224"]


def test_costs_are_counted():
    plan = sffx.plan(Residual(width=8), example_input=torch.zeros(1, 3, 8, 8))
    convolution = 8 * 8 * 9 * 64  # channels in and out, kernel, positions
    assert [block.macs for block in plan] == [3 * 8 * 9 * 64, 2 * convolution, 2 * convolution]
    assert plan.blocks[1].num_parameters == 2 * (8 * 8 * 9) + 4 * 8
    value = 8 * 64 * 4  # bytes of one sample's value
    # The block's input, both BN inputs, the ReLU between, the output. The batch shares BN's
    # statistics.
    assert plan.blocks[1].activation_bytes // value == 5


def test_a_copy_of_what_was_unpickled_can_be_trained_and_extracted():
    net = sffx.transform(Residual(), example_input=torch.zeros(1, 3, 8, 8))
    twin = copy.deepcopy(pickle.loads(pickle.dumps(copy.deepcopy(pickle.loads(pickle.dumps(net))))))
    assert twin.plan == net.plan
    x, y = torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64)
    losses = []
    for each in (net, twin):
        torch.manual_seed(0)  # of its dropout
        losses.append(sffx.local_loss(each.train(), x, y).item())
    assert losses[0] == losses[1]
    with torch.no_grad():
        next(twin.block_0.parameters()).zero_()
    assert not next(sffx.extract(twin).parameters()).any()
