"""Everything that works with Scalable Forward-Forward works with every objective, or says why not.

A new objective is tested here as soon as it has a name.
"""

import copy
import functools
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sffx
from sffx import InputError
from sffx.export.prepare import inference_copy, reduce_to_readout
from sffx.learning.objectives.records import OBJECTIVES, objective_named, objective_of_record
from sffx.memory.count import count_memory
from sffx.objectives import Objective
from sffx.runtime.keywords import KeywordLoss
from tests.toys import kept, seeded

CLASSES = 3


def convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 9, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(9, CLASSES),
    )


@kept
def cut(objective):
    with seeded():
        model = convolutions()
        x = torch.zeros(1, 1, 8, 8)
        return sffx.transform(model, policy="layer", example_input=x, objective=objective).train()


def batch(samples=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(samples, 1, 8, 8, generator=generator)
    return x, torch.arange(samples) % CLASSES


@pytest.fixture(params=OBJECTIVES)
def name(request):
    return request.param


def test_a_step_learns_from_every_block(name):
    net = cut(name)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-2))
    with seeded():
        sffx.local_step(net, *batch(), optimizer)
    learning = [*net.plan.blocks]
    if net.plan.objective.trains_classifier:
        learning.append(net.plan.classifier)
    for block in learning:
        own = [key for key in before if key.startswith(f"{block.target}.")]
        assert any(not torch.equal(before[key], net.state_dict()[key]) for key in own), block


def test_a_step_equals_the_loss_and_an_optimizer_step(name):
    stepped, other = cut(name), cut(name)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(stepped, 1e-2))
    with seeded():
        value = sffx.local_step(stepped, *batch(), optimizer)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(other, 1e-2))
    with seeded():
        loss = sffx.local_loss(other, *batch())
    loss.backward()
    optimizer.step()
    assert torch.equal(value, loss.detach())
    for one, two in zip(stepped.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_no_gradient_crosses_a_cut(name):
    net = cut(name)
    x, y = batch()
    alone = []
    for block in net.plan:
        net.zero_grad(set_to_none=True)
        with seeded():
            sffx.local_loss(net, x, y, blocks=[block.target]).backward()
        alone.append({key for key, p in net.named_parameters() if p.grad is not None})
    for one in alone:
        assert one
        assert sum(bool(one & other) for other in alone) == 1


def test_the_model_is_the_one_that_was_cut(name):
    with seeded():
        model = convolutions()
    net = sffx.transform(
        model, "layer", torch.zeros(1, 1, 8, 8), objective=name, norm="none", check=True
    )
    x, _ = batch()
    torch.testing.assert_close(sffx.extract(net)(x), model(x))
    if net.plan.objective.changes_model:
        with pytest.raises(InputError, match="has cut another model"):
            sffx.check(model, net)
    else:
        assert sffx.check(model, net)


def test_predictions(name):
    net = cut(name)
    x, y = batch()
    evaluation = sffx.evaluate(net, [(x, y)])
    assert evaluation.samples == len(x)
    net.eval()
    with torch.no_grad():
        scores = net(x)
        assert scores.shape == (len(x), CLASSES)
        one_by_one = torch.cat([net(each[None]) for each in x])
    torch.testing.assert_close(one_by_one, scores, rtol=1e-4, atol=1e-5)
    share = (scores.argmax(1) == y).double().mean().item()
    assert evaluation.accuracy["ensemble"] == pytest.approx(share)


@pytest.mark.parametrize("readout", ["ensemble", "last"])
def test_what_is_exported_predicts_the_same(name, readout):
    net = cut(name).eval()
    model = inference_copy(net)
    reduce_to_readout(model, readout)
    net.readout.mode = readout
    x, _ = batch()
    torch.testing.assert_close(model(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(3)
def test_an_exported_file_predicts_the_same_and_can_be_quantised(name, tmp_path):
    """The file has the heads of all blocks, and its writer compares it with torch."""
    sffx.export_onnx(cut(name), tmp_path / "net.onnx", "cumulative")
    sffx.quantize_onnx(tmp_path / "net.onnx", tmp_path / "net.int8.onnx", [batch()])
    assert (tmp_path / "net.int8.onnx").exists()


@pytest.mark.sampled(3)
def test_an_exported_program_takes_any_batch_size(name, tmp_path):
    net = cut(name)
    sffx.export_program(net, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    net.eval()
    for samples in (1, 5):
        x, _ = batch(samples)
        with torch.no_grad():
            torch.testing.assert_close(program(x), net(x), rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_checkpoints(name, tmp_path):
    net = cut(name)
    x, _ = batch()
    path = tmp_path / "net.pt"
    sffx.save_checkpoint(path, net)
    again = sffx.load_checkpoint(path).net(convolutions())
    assert again.plan.objective == net.plan.objective
    net.eval()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), again.eval()):
        with torch.no_grad():
            assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("other", OBJECTIVES)
def test_a_checkpoint_of_another_objective_says_so(name, other, tmp_path):
    sffx.save_checkpoint(tmp_path / "net.pt", cut(name))
    checkpoint = sffx.load_checkpoint(tmp_path / "net.pt")
    # The goodness of CwC has no weights, and is one for SFF as well.
    if name == other or {name, other} == {"sff", "cwc"}:
        assert checkpoint.net(convolutions(), objective=other).plan.objective.name == other
        return
    message = f"holds heads of the objective '{name}', and '{other}' is given.*Hint: leave"
    with pytest.raises(InputError, match=message):
        checkpoint.net(convolutions(), objective=other)


def test_records(name):
    objective = objective_named(name)
    assert objective_of_record(objective.record()) == objective


def perceptron():
    layers = [nn.Flatten(), nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(50, CLASSES))


@functools.cache
def backpropagation(model, samples):
    """Return the peak of the plain model. It is the same, whatever its blocks learn by."""
    plain = sffx.transform(model(), "layer", torch.zeros(1, 1, 8, 8))
    return sffx.footprint(plain, samples).backpropagation


@pytest.mark.sampled(5)
@pytest.mark.parametrize("model", [convolutions, perceptron])
def test_memory_is_predicted(name, model):
    """The views of a batch are held until the last block that reads them has run."""
    with seeded():
        x = torch.zeros(1, 1, 8, 8)
        net = sffx.transform(model(), "layer", x, objective=name).train()
    predicted = sffx.footprint(net, 64)
    assert predicted.peak > sffx.footprint(net, 32).peak
    x, y = batch(64)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-2), foreach=False)

    def step():
        optimizer.zero_grad()
        sffx.local_loss(net, x, y).backward()
        optimizer.step()

    step()
    counted = count_memory(step, model=net, optimizer=optimizer)
    assert predicted.peak == pytest.approx(counted.peak, rel=0.005)
    assert predicted.optimizer_state == counted.optimizer_state
    assert predicted.backpropagation == backpropagation(model, 64)


def test_the_default_dtype_does_not_matter(name):
    """A user may work in float64 for a while; the net has the dtype that it was cut for."""
    net, (x, y) = cut(name), batch()
    with seeded():
        expected = sffx.local_loss(net, x, y).detach()
    torch.set_default_dtype(torch.float64)
    try:
        with seeded():
            assert torch.equal(sffx.local_loss(net, x, y).detach(), expected)
        other = cut(name).float()
    finally:
        torch.set_default_dtype(torch.float32)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.eval()(x), net.eval()(x))


def test_what_cannot_run_a_sample_several_times_says_so(name):
    net = cut(name)
    objective = net.plan.objective
    message = f"objective '{objective.name}' runs each sample"
    if objective.views == 1 and not objective.is_tried:
        KeywordLoss(net)
    else:
        with pytest.raises(InputError, match=message):
            KeywordLoss(net)
    if objective.tries(CLASSES) == 1:
        sffx.EarlyExit(net, 0.9)
    else:
        with pytest.raises(InputError, match=message):
            sffx.EarlyExit(net, 0.9)


@pytest.mark.sampled(4)
def test_an_early_exit_at_the_end_is_the_ensemble(name, tmp_path):
    net = cut(name)
    if net.plan.objective.tries(CLASSES) > 1:
        return
    x, y = batch()
    net.eval()
    runner = sffx.EarlyExit(net, 2.0)
    with torch.no_grad():
        assert torch.equal(runner(x).scores, net(x))
    impatient = sffx.EarlyExit(net, 1e-6)
    first = net.plan.objective.skips
    assert impatient(x).blocks.eq(first + 1).all()
    assert torch.equal(impatient(x).scores, sffx.block_scores(net, x)[first])
    assert runner.curve([(x, y)]).points[0].blocks >= first + 1
    if not first:
        # Their files are tested where early exit is.
        return
    sffx.export_early_exit(net, tmp_path / "exit")
    loaded = sffx.EarlyExit.load(tmp_path / "exit", 1e-6)
    torch.testing.assert_close(loaded(x).scores, impatient(x).scores, rtol=1e-4, atol=1e-5)


def test_rates_follow_the_losses_of_an_evaluation(name):
    """A classifier that does not learn has neither a loss nor a learning rate."""
    net = cut(name)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1.0))
    plateau = sffx.BlockPlateau(optimizer, patience=0, factor=0.5)
    losses = sffx.evaluate(net, [batch()]).loss
    for _ in range(2):
        plateau.step(losses)
    learning = sffx.BlockSchedule.all_at_once(net, 1).learning(0)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates == dict.fromkeys(learning, 0.5)


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_a_training_is_drawn(name, suffix, tmp_path):
    from sffx.cli.drawing import progress_of
    from sffx.draw.render import draw

    net = cut(name)
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, 1e-3))
    accuracy = sffx.evaluate(net, [batch()]).accuracy
    sffx.save_checkpoint(tmp_path / "net.pt", net, optimizer, accuracy)
    progress = progress_of(sffx.load_checkpoint(tmp_path / "net.pt"), net.plan)
    assert progress.accuracy == accuracy
    path = draw(net.plan, tmp_path / f"plan.{suffix}", progress=progress)
    is_told = "no accuracy" not in path.read_text()
    assert is_told or not net.plan.objective.trains_classifier


def test_a_model_may_write_on_its_input(name):
    """What it writes on is the views, or their trials, and never the batch of the user."""
    first = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(1), nn.Dropout(0.0, inplace=True))
    with seeded():
        model = nn.Sequential(first, *convolutions())
        net = sffx.transform(model, "layer", torch.zeros(2, 1, 8, 8), objective=name).train()
    x, y = batch()
    with seeded():
        loss = sffx.local_loss(net, x.clone() - 0.5, y)
    loss.backward()
    plain = copy.deepcopy(net)
    for module in plain.modules():
        if isinstance(module, (nn.ReLU, nn.Dropout)):
            module.inplace = False
    with seeded():
        torch.testing.assert_close(sffx.local_loss(plain, x - 0.5, y), loss)
    if net.plan.objective.makes_views:
        given = x - 0.5
        sffx.local_loss(net, given, y)
        assert torch.equal(given, x - 0.5)


def test_scores_in_train_mode(name):
    net = cut(name)
    x, _ = batch()
    scores = net(x)
    assert len(scores) == len(net.plan) + 1
    for own in scores[:-1]:
        expected = net.plan.objective.head_shape(CLASSES)
        assert len(own) == len(x)
        assert expected is None or own.shape[1:] == expected


def test_a_probe_reads_features_and_leaves_the_net_alone(name):
    net = cut(name)
    x, y = batch()
    before = copy.deepcopy(net.state_dict())
    with seeded():
        probe = sffx.LinearProbe(net, ["block_1", "block_2"])
    F.cross_entropy(probe(x), y).backward()
    assert {key for key, p in probe.named_parameters() if p.grad is not None} == {
        "linear.weight",
        "linear.bias",
    }
    assert all(p.grad is None for p in net.parameters())
    assert net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])


def test_plans_print_and_are_drawn(name, tmp_path):
    from sffx.draw.render import draw

    net = cut(name)
    assert str(net.plan)
    assert draw(net.plan, tmp_path / "plan.svg").exists()


@dataclass(frozen=True)
class Mirrored(Objective):
    """Learns an image and its mirror image, and answers by the sum of both."""

    name: ClassVar[str] = "mirrored"
    views = 2

    def training_views(self, batch):
        return {name: torch.cat([x, x.flip(-1)]) for name, x in batch.inputs.items()}

    def loss(self, scores, y, place):
        return F.cross_entropy(scores, y.repeat(2))

    classifier_loss = loss


def test_an_objective_of_ones_own():
    net, plain = cut(Mirrored()), cut("sff")
    x, y = batch()
    loss = sffx.local_loss(net, x, y)
    loss.backward()
    expected = sffx.sff_loss(plain(torch.cat([x, x.flip(-1)])), y.repeat(2))
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for one, two in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_an_objective_of_ones_own_is_passed_again(tmp_path):
    net = cut(Mirrored())
    sffx.save_checkpoint(tmp_path / "net.pt", net)
    checkpoint = sffx.load_checkpoint(tmp_path / "net.pt")
    with pytest.raises(InputError, match="objective=mirrored"):
        checkpoint.net(convolutions())
    again = checkpoint.net(convolutions(), objective=Mirrored())
    assert again.plan.objective == Mirrored()


@pytest.mark.parametrize("wrong", ["fff", None, 3, sffx.objectives.ForwardForward])
def test_names_of_no_objective(wrong):
    with pytest.raises(InputError, match=r"there is no objective .*Hint: "):
        cut(wrong)


def test_heads_of_ones_own_are_refused_where_the_objective_has_its_own():
    with pytest.raises(InputError, match="goodness is 'mlp', but the heads of the objective 'ff'"):
        sffx.transform(
            convolutions(), "layer", torch.zeros(1, 1, 8, 8), objective="ff", goodness="mlp"
        )
