"""Every task through the whole package: steps, evaluation, weights, exports, records."""

from __future__ import annotations

import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
import sffx.runtime.stage
from sffx import tasks
from sffx.extraction import extract
from sffx.lightning import BPModule
from sffx.runtime.evaluate import block_scores
from sffx.tasks import task_of_record, task_record
from tests.tasks.cases import (
    ALL,
    CASES,
    CLASSES,
    IGNORED,
    IGNORING,
    Case,
    Patches,
    entropy_of_pixels,
)

HEADS = ("sff", "mlp(6)")


def cases() -> list[tuple[Case, str]]:
    pairs = [(name, head) for name in CASES for head in HEADS]
    return [*pairs, ("next token", "shared"), ("pixels", "cwc"), ("labels", "cosine")]


@pytest.fixture(params=cases(), ids="-".join)
def case_and_head(request):
    name, head = request.param
    return CASES[name], head


def gradients_by_hand(case: Case, net, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Run block by block, with a loss of each block that is written out."""
    gradients = {}
    for stage in sffx.runtime.stage.stages_of(net):
        parameters = {f"{stage.name}.{n}": p for n, p in stage.block.named_parameters()}
        if stage.head is not None:
            head = {f"head_{stage.index}.{n}": p for n, p in stage.head.named_parameters()}
            parameters.update(head)
        value = x
        for earlier in sffx.runtime.stage.stages_of(net)[: stage.index]:
            (norm,) = earlier.norms
            value = norm(earlier.block(value).detach())
        output = stage.block(value)
        scores = output if stage.head is None else stage.head(output)
        loss = case.loss(scores, y)
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        gradients.update(dict(zip(parameters, found, strict=True)))
    return gradients


def test_a_step_has_the_gradients_of_losses_written_by_hand(case_and_head):
    case, head = case_and_head
    net = case.net(goodness=head).train()
    x, y = case.batch()
    expected = gradients_by_hand(case, net.__deepcopy__({}), x, y)
    sffx.local_loss(net, x, y).backward()
    own = dict(net.named_parameters())
    assert set(expected) == set(own)
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name].grad, gradient, msg=name)


def test_all_ways_to_train_have_one_loss(case_and_head):
    case, head = case_and_head
    net = case.net(goodness=head).train()
    x, y = case.batch()
    at_once = sffx.sff_loss(net(x), y, task=net.plan.task)
    losses = sffx.block_losses(net, x, y)
    assert set(losses) == {block.target for block in net.plan.all_blocks}
    torch.testing.assert_close(sum(losses.values()).detach(), at_once.detach())
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, 1e-3))
    assert torch.equal(sffx.local_step(net, x, y, optimizer), sum_of(losses))


def sum_of(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack([loss.detach() for loss in losses.values()]).sum()


@pytest.mark.parametrize("name", CASES)
def test_the_cut_model_computes_what_the_model_computes(name):
    # Train and eval mode, two batch sizes, another image size or length, the way back.
    case = CASES[name]
    torch.manual_seed(0)
    model = case.model()
    x, _ = case.batch(2)
    net = sffx.transform(model, case.policy, x, task=case.task, check=False)
    report = sffx.check(model, net, x)
    assert any("eval mode, " in run for run in report.errors), "no other size was compared"
    assert type(extract(net)) is type(model)


@pytest.mark.parametrize("name", IGNORING)
def test_a_batch_of_nothing_but_ignored_positions_gives_zero(name):
    net = CASES[name].net().train()
    x, y = CASES[name].batch()
    loss = sffx.local_loss(net, x, torch.full_like(y, IGNORED))
    loss.backward()
    assert loss == 0
    for parameter in net.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    evaluation = sffx.evaluate(net, [(x, torch.full_like(y, IGNORED))])
    assert set(evaluation.loss.values()) == {0.0}


@pytest.mark.parametrize("name", CASES)
def test_training_lowers_the_loss_of_every_block(name):
    net = CASES[name].net().train()
    batch = CASES[name].batch(16)
    before = sffx.evaluate(net, [batch])
    optimizer = torch.optim.Adam(sffx.parameter_groups(net, 1e-2))
    plateau = sffx.BlockPlateau(optimizer, patience=1)
    for _ in range(30):
        sffx.local_step(net, *batch, optimizer)
    after = sffx.evaluate(net, [batch])
    plateau.step(after.loss)
    for block in net.plan.all_blocks:
        assert after.loss[block.target] < before.loss[block.target]
    assert str(after).count("%") % len(after.loss) in (0, 1)
    assert after.samples == 16


@pytest.mark.parametrize("name", CASES)
def test_an_evaluation_is_the_same_in_parts(name):
    net = CASES[name].net()
    x, y = CASES[name].batch(6)
    whole = sffx.evaluate(net, [(x, y)])
    parts = sffx.evaluate(net, [(x[:2], y[:2]), (x[2:], y[2:])])
    assert whole.loss == pytest.approx(parts.loss)
    for metric, values in whole.metrics.items():
        assert values == pytest.approx(parts.metrics[metric]), metric


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_samples_adds_nothing_to_an_evaluation(name):
    net = CASES[name].net()
    x, y = CASES[name].batch()
    assert str(sffx.evaluate(net, [(x, y), (x[:0], y[:0])])) == str(sffx.evaluate(net, [(x, y)]))


@pytest.mark.parametrize("name", ALL)
def test_a_step_of_no_samples_is_refused_and_changes_nothing(name):
    net = ALL[name].net()
    x, y = ALL[name].batch()
    x, y = x[:0], y[:0]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=1e-3))
    steps = [
        lambda: sffx.local_loss(net, x, y),
        lambda: sffx.block_losses(net, x, y),
        lambda: sffx.local_step(net, x, y, optimizer),
        lambda: BPModule(ALL[name].model(), task=ALL[name].task).loss(x, y),
    ]
    for step in steps:
        with pytest.raises(sffx.InputError, match=r"the batch has 0 samples.*Hint: leave out"):
            step()
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_the_deferred_loss_of_no_samples_is_refused():
    with pytest.raises(sffx.InputError, match="the batch has 0 samples"):
        sffx.sff_loss(torch.zeros(3, 0, 4), torch.zeros(0, dtype=torch.int64))


def test_a_loss_that_is_a_sum_takes_no_samples():
    net = CLASSES.net()
    x, y = CLASSES.batch()
    loss = sffx.local_loss(net, x[:0], y[:0], nn.CrossEntropyLoss(reduction="sum"))
    assert loss == 0


@pytest.mark.parametrize("name", CASES)
def test_the_answer_has_the_shape_of_the_models_output(name):
    case = CASES[name]
    net = case.net().eval()
    x, _ = case.batch()
    expected = case.model()(x).shape
    for mode in ("ensemble", "last", "classifier"):
        net.readout.mode = mode
        assert net(x).shape == expected
    assert isinstance(block_scores(net, x), tuple)


@pytest.mark.parametrize("name", ["labels", *IGNORING])
def test_weights_of_blocks_mix_probabilities(name):
    net = CASES[name].net()
    batch = CASES[name].batch(16)
    weights = sffx.weigh(net, [batch])
    assert sum(weights.values()) == pytest.approx(1)
    losses = sffx.evaluate(net, [batch]).loss
    best = min(losses[block] for block in weights)
    assert losses["weighted"] <= best + 1e-4


@pytest.mark.parametrize("name", ["regression", "one number", "field", "forecast"])
def test_numbers_are_not_weighed(name):
    with pytest.raises(sffx.InputError, match="no probabilities"):
        sffx.weigh(CASES[name].net(), [CASES[name].batch()])


@pytest.mark.parametrize("name", CASES)
def test_only_classes_of_a_sample_exit_early(name):
    with pytest.raises(sffx.InputError, match="no class of a sample"):
        sffx.EarlyExit(CASES[name].net())


@pytest.mark.parametrize("name", CASES)
def test_the_memory_of_a_step_is_predicted(name):
    net = CASES[name].net()
    few, many = sffx.footprint(net, 2), sffx.footprint(net, 64)
    assert 0 < few.peak < many.peak


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_holds_the_task(name, tmp_path):
    case = CASES[name]
    net = case.net()
    sffx.save_checkpoint(tmp_path / "run.pt", net)
    checkpoint = sffx.load_checkpoint(tmp_path / "run.pt")
    again = checkpoint.net(case.model())
    assert again.plan.task == net.plan.task
    x, _ = case.batch()
    assert torch.equal(again.eval()(x), net.eval()(x))
    assert task_of_record(task_record(case.task)) == case.task


def test_a_net_keeps_its_task_in_copies_and_pickles():
    net = CASES["pixels"].net()
    for copy in (net.__deepcopy__({}), pickle.loads(pickle.dumps(net))):
        assert copy.plan.task == net.plan.task == copy.readout.task
        assert isinstance(copy.train()(CASES["pixels"].batch()[0]), tuple)


BAD_TARGETS = {
    "a list": (lambda y: y.tolist(), "not a tensor"),
    "fewer samples": (lambda y: y[:-1], "has shape"),
    "another shape": (lambda y: y[..., None, None].repeat_interleave(2, -1), "has shape"),
    "complex numbers": (lambda y: y.to(torch.complex64), "dtype"),
    "sparse": (lambda y: y.to_sparse(), "dense"),
    "nan": (lambda y: y * float("nan"), "not finite|are nan|is nan|dtype"),
    "infinite": (lambda y: y / 0.0, "not finite|inf|nan|dtype"),
    "another device": (lambda y: y.to("meta"), "is on meta"),
}


@pytest.mark.parametrize("name", ALL)
def test_bad_targets_end_in_a_clear_error(name):
    net = ALL[name].net().train()
    x, y = ALL[name].batch()
    for spoil, said in BAD_TARGETS.values():
        with pytest.raises(sffx.InputError, match=said):
            sffx.local_loss(net, x, spoil(y))
        with pytest.raises(sffx.InputError, match=said):
            sffx.sff_loss(net(x), spoil(y), task=net.plan.task)


@pytest.mark.parametrize(
    "rows",
    [[2.0, -1.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.4, 0.0], [float("nan"), 1.0, 0.0]],
    ids=["scores", "several labels", "too small", "nan"],
)
def test_numbers_that_are_no_probabilities_are_not_taken_for_classes(rows):
    net = ALL["classes"].net().train()
    x, _ = ALL["classes"].batch()
    with pytest.raises(sffx.InputError, match=r"not probabilities.*MultiLabel\(\)"):
        sffx.local_loss(net, x, torch.tensor([rows] * len(x)))
    mixed = torch.tensor([[0.9, 0.1, 0.0]] * len(x), dtype=torch.bfloat16)
    assert sffx.local_loss(net, x, mixed) > 0


@pytest.mark.parametrize("name", IGNORING)
def test_a_label_out_of_range_is_named(name):
    net = CASES[name].net().train()
    x, y = CASES[name].batch()
    with pytest.raises(sffx.InputError, match=r"0 to 99.*ignore_index=99"):
        sffx.local_loss(net, x, y.masked_fill(y == IGNORED, 99).clamp(min=0))
    with pytest.raises(sffx.InputError, match=r"torch\.int64"):
        sffx.local_loss(net, x, y.float())


def test_values_that_are_no_labels_or_numbers_are_refused():
    labels, numbers = CASES["labels"], CASES["regression"]
    x, y = labels.batch()
    with pytest.raises(sffx.InputError, match="runs from"):
        sffx.local_loss(labels.net().train(), x, y * 2)
    x, y = numbers.batch()
    with pytest.raises(sffx.InputError, match="no floats"):
        sffx.local_loss(numbers.net().train(), x, y.long())
    with pytest.raises(sffx.InputError, match="not finite"):
        sffx.local_loss(numbers.net().train(), x, y / 0)


def test_scores_of_another_task_are_not_taken_for_classes():
    net = CASES["labels"].net().train()
    x, y = CASES["labels"].batch()
    with pytest.raises(sffx.InputError, match=r"task=net\.plan\.task"):
        sffx.sff_loss(net(x), y)


@pytest.mark.parametrize("task", [tasks.Regression, "regression", 3])
def test_what_is_no_task_is_refused(task):
    with pytest.raises(sffx.InputError, match="Hint: pass"):
        sffx.plan(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), "layer", task=task)


@pytest.mark.parametrize("label", [None, "255", 255.0, True, torch.tensor(255)])
@pytest.mark.parametrize("task", [type(CASES[name].task) for name in IGNORING])
def test_what_is_no_label_cannot_be_left_out(task, label):
    with pytest.raises(sffx.InputError, match=r"ignore_index is .*Hint: pass an integer"):
        task(ignore_index=label)


def test_a_task_that_does_not_go_with_the_output_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(sffx.TraceError, match=r"of shape \(B, T, J\)"):
        sffx.plan(model, "layer", task=tasks.LanguageModel())


def test_an_output_with_other_axes_is_refused_with_a_hint():
    x = torch.randn(3, 4)
    layers = [nn.Linear(4, 4), nn.ReLU()]
    squeezed = nn.Sequential(*layers, nn.Linear(4, 1), nn.Flatten(0))
    with pytest.raises(sffx.TraceError, match=r"return \(B, 1\), output\.unsqueeze\(1\)"):
        sffx.plan(squeezed, "layer", x, task=tasks.MultiLabel())
    (note,) = [note for note in sffx.plan(squeezed, "layer", x).notes if "inferred" in note]
    assert "return it as (B, 1) and pass task=sffx.tasks.MultiLabel()" in note
    forecast = nn.Sequential(*layers, nn.Linear(4, 6), nn.Unflatten(1, (3, 2)))
    with pytest.raises(sffx.TraceError, match=r"return output\.flatten\(1\)"):
        sffx.plan(forecast, "layer", x, task=tasks.Regression())


@pytest.mark.parametrize("goodness", ["cwc", "cosine"])
def test_a_goodness_without_a_form_is_refused(goodness):
    with pytest.raises(sffx.InputError, match="has no form"):
        CASES["regression"].net(goodness=goodness)


def test_a_token_of_a_grid_is_scored_as_a_pixel(tmp_path):
    task = tasks.Segmentation(ignore_index=IGNORED)
    torch.manual_seed(0)
    net = sffx.transform(Patches(), "layer", torch.randn(2, 3, 8, 8), task=task, check=True)
    assert [block.shape for block in net.plan] == [(6, 4, 4), (17, 6), (17, 6), (6, 8, 8)]
    for sides in ((8, 8), (4, 4), (8, 16)):
        x = torch.randn(4, 3, *sides)
        y = torch.randint(0, 3, (4, *sides))
        y[:, 0] = IGNORED
        scores = net.train()(x)
        cells = sides[0] * sides[1] // 4
        assert scores[1].shape == (4, 3, cells + 1)
        on_map = scores[1][..., 1:].reshape(4, 3, sides[0] // 2, sides[1] // 2)
        expected = entropy_of_pixels(on_map, y)
        torch.testing.assert_close(sffx.block_losses(net, x, y)["block_1"], expected)
        assert sffx.evaluate(net, [(x, y)]).loss["block_1"] > 0
        assert net.eval()(x).shape == (4, 3, *sides)
    with pytest.raises(sffx.InputError, match="make no grid"):
        sffx.local_loss(net.train(), x, y[:, :-2])
    net.train()
    sffx.export_program(net, tmp_path / "net.pt2")
    assert sffx.footprint(net, 2).peak < sffx.footprint(net, 64).peak
    compiled = sffx.compile(net.__deepcopy__({}).train(), backend="aot_eager")
    batch = (torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4, 8, 8)))
    torch.testing.assert_close(sffx.local_loss(compiled, *batch), sffx.local_loss(net, *batch))


class TwoSizes(nn.Module):
    """Two streams, one at half the resolution, along one axis of space or more."""

    def __init__(self, space: int) -> None:
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
        self.first = convolution(2, 4, 3, padding=1)
        self.pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[space - 1](2)
        self.second = convolution(2, 4, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2)
        self.last = convolution(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.pool(x)).tanh()
        return self.last(torch.cat([self.up(y), self.first(x).tanh()], 1))


@pytest.mark.parametrize("space", [1, 2, 3])
def test_streams_of_several_resolutions_are_scored_at_the_largest(space):
    x = torch.randn(2, 2, *[8] * space)
    task = tasks.Segmentation()
    net = sffx.transform(TwoSizes(space), [("tanh", "tanh_1")], x, task=task)
    assert len(net.head_0) == 2
    assert [scores.shape for scores in net.train()(x)] == [(2, 3, *[8] * space)] * 2
    y = torch.randint(0, 3, (2, *[8] * space))
    sffx.local_loss(net, x, y).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_no_cut_lies_where_a_pixel_has_no_place():
    # Nine tokens make a grid of 3 x 3, but there is no map of this size.
    x = torch.randn(2, 3, 8, 8)
    plan = sffx.plan(Patches(9), "layer", x, task=tasks.Segmentation())
    assert (9, 6) not in {block.shape for block in plan}
    with pytest.raises(sffx.CutError, match="axes of space that the goodness of a pixel needs"):
        sffx.plan(Patches(9), ["tokens_0"], x, task=tasks.Segmentation())


class Queries(nn.Module):
    """As many learned queries as a map has pixels, which attend to it."""

    def __init__(self, *, are_pixels: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 4, stride=4)
        self.queries = nn.Parameter(torch.randn(1, 16, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.places = nn.Parameter(torch.randn(8, 4, 4))
        self.last = nn.Conv2d(16, 3, 1)
        self.are_pixels = are_pixels

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        tokens = x.flatten(2).transpose(1, 2)
        queries = tokens if self.are_pixels else self.queries.expand(x.shape[0], 16, 8)
        found = queries + self.attention(queries, tokens, tokens)[0]
        found = self.layers(found)
        return self.last(torch.einsum("bqc,chw->bqhw", found, self.places))


@pytest.mark.parametrize("are_pixels", [True, False])
def test_queries_are_no_pixels_where_a_map_has_as_many(are_pixels):
    x = torch.randn(2, 3, 16, 16)
    plan = sffx.plan(Queries(are_pixels=are_pixels), "layer", x, task=tasks.Segmentation())
    assert ((16, 8) in {block.shape for block in plan}) == are_pixels


class Shortened(nn.Module):
    """Drops the first token, such as that of a class, before the end."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.output = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.layers(self.embedding(ids))[:, 1:])


def test_no_cut_lies_where_there_are_other_tokens():
    ids = torch.zeros(2, 5, dtype=torch.int64)
    plan = sffx.plan(Shortened(), "layer", ids, task=tasks.TokenClassification())
    assert {block.shape for block in plan} == {(4, 8)}


def test_the_kernel_of_a_position_reads_its_neighbours():
    for name in ("pixels", "tokens"):
        net = CASES[name].net(kernel_size=3).train()
        x, y = CASES[name].batch()
        sffx.local_loss(net, x, y).backward()
    with pytest.raises(sffx.InputError, match="kernel_size"):
        CASES["regression"].net(kernel_size=3)


def test_a_task_is_no_other_for_its_options():
    segmentation = tasks.Segmentation(ignore_index=3)
    assert task_of_record(task_record(replace(segmentation, space=3))).space == 3
    with pytest.raises(sffx.InputError, match="record of no task"):
        task_of_record({"name": "segmentation", "colour": 1})


@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(label_smoothing=0.1),
        F.cross_entropy,
        partial(F.cross_entropy, ignore_index=0),
    ],
)
def test_a_loss_of_torch_that_would_take_tokens_for_classes_is_refused(loss_fn):
    scores, y = torch.randn(2, 4, 4), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(sffx.InputError, match="looks for the classes along axis 1"):
        sffx.sff_loss((scores,), y, loss_fn, task=tasks.TokenClassification())


def test_a_loss_of_flattened_tokens_is_taken():
    scores, y = torch.randn(2, 4, 4), torch.arange(8).view(2, 4) % 4
    loss = sffx.sff_loss(
        (scores,),
        y,
        lambda scores, y: F.cross_entropy(scores.flatten(0, 1), y.flatten()),
        task=tasks.TokenClassification(),
    )
    assert torch.equal(loss, F.cross_entropy(scores.flatten(0, 1), y.flatten()))


@pytest.mark.parametrize("returned", [(6,), (6, 1)])
@pytest.mark.parametrize("given", [(6,), (6, 1)])
def test_a_loss_of_ones_own_compares_each_number_with_its_own_target(returned, given):
    y = torch.randn(6)
    scores = (torch.randn(6, 1), torch.randn(returned))
    loss = sffx.sff_loss(scores, y.view(given), nn.HuberLoss(), task=tasks.Regression())
    expected = sum(F.huber_loss(own.flatten(), y) for own in scores)
    torch.testing.assert_close(loss, expected)


def test_a_loss_of_ones_own_may_take_any_targets_of_numbers():
    seen = []

    def loss_fn(scores, y):
        seen.append(scores.shape)
        return scores.square().mean()

    scores = (torch.randn(6, 1), torch.randn(6))
    for y in ({"y": 1}, torch.randn(6, 2), torch.randn(3)):
        sffx.sff_loss(scores, y, loss_fn, task=tasks.Regression())
    assert seen == [(6, 1), (6,)] * 3
