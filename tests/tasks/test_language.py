"""Language models: what a token may see, the shared output layer, tied weights, vocabularies."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx import tasks
from sffx.errors import InputError
from sffx.inputs import padding_mask
from sffx.kernels import entropy, squares
from sffx.learning.shared_output import EVERY, OutputCopy
from sffx.memory.count import count_memory
from sffx.runtime.stage import stages_of
from sffx.tables import short_number
from tests.tasks.cases import CASES, Tokens
from tests.toys import kept

NEXT = CASES["next token"]


@pytest.mark.parametrize("goodness", ["sff", "mlp(6)", "shared"])
def test_no_score_depends_on_later_tokens(goodness):
    net = NEXT.net(goodness=goodness)
    x, _ = NEXT.batch()
    changed = x.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % 6
    for before, after in zip(net.train()(x), net.train()(changed), strict=True):
        assert torch.equal(before[:, :3], after[:, :3])
        assert not torch.equal(before[:, 3:], after[:, 3:])


def output_copies(net: nn.Module) -> list[OutputCopy]:
    return [module for module in net.modules() if isinstance(module, OutputCopy)]


def test_all_heads_share_one_copy_of_the_output_layer():
    net = NEXT.net(goodness="shared").train()
    (own,) = output_copies(net)
    layer = net.get_submodule("classifier").get_submodule("output")
    assert own.weight.data_ptr() != layer.weight.data_ptr()
    assert not any("output.weight" in name for name in net.state_dict() if "head" in name)
    x, y = NEXT.batch()
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, 0.1))
    for step in range(1, EVERY + 2):
        before = own.weight.clone()
        sffx.local_step(net, x, y, optimizer)
        # Made anew before the first step and after some more, and read-only in between.
        is_new = not torch.equal(before, own.weight)
        assert is_new == (step == EVERY + 1), step
    assert torch.equal(net.eval() and own.weight, layer.weight)


def test_a_copy_of_a_net_reads_its_own_output_layer():
    net = copy.deepcopy(NEXT.net(goodness="shared"))
    (own,) = output_copies(net)
    layer = net.get_submodule("classifier").get_submodule("output")
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(net.eval() and own.weight, layer.weight)


def load(net: nn.Module, state: dict[str, Tensor]) -> None:
    net.load_state_dict(state)


def assign(net: nn.Module, state: dict[str, Tensor]) -> None:
    net.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)


def average(net: nn.Module, state: dict[str, Tensor]) -> None:
    for name, parameter in net.named_parameters():
        parameter.detach().lerp_(state[name], 0.5)


@pytest.mark.parametrize("change", [load, assign, average])
@pytest.mark.parametrize("trained", [False, True])
def test_a_net_in_eval_mode_predicts_by_the_output_layer_as_it_is(change, trained):
    net = NEXT.net(goodness="shared").train()
    x, y = NEXT.batch()
    if trained:
        sffx.local_loss(net, x, y)
    net.eval()(x)
    change(net, {name: torch.randn_like(value) for name, value in net.state_dict().items()})
    predicted = net(x)
    assert torch.equal(predicted, net.eval()(x))
    with torch.inference_mode():
        assert torch.equal(predicted, net(x))


def test_training_goes_on_with_the_output_layer_that_was_loaded():
    net = NEXT.net(goodness="shared").train()
    x, y = NEXT.batch()
    sffx.local_loss(net, x, y)
    load(net, {name: torch.randn_like(value) for name, value in net.state_dict().items()})
    sffx.local_loss(net, x, y)
    (own,) = output_copies(net)
    assert torch.equal(own.weight, net.get_parameter("classifier.output.weight"))


def test_a_model_without_a_linear_output_layer_shares_none():
    model = nn.Sequential(Tokens(6, 6), nn.Softmax(2))
    with pytest.raises(sffx.InputError, match="ends in a linear layer of 6 outputs"):
        sffx.transform(model, "module", NEXT.batch()[0], task=NEXT.task, goodness="shared")


@pytest.mark.parametrize("goodness", ["sff", "mlp(6)", "shared"])
@pytest.mark.parametrize("seen", ["by nobody", "by on_block", "by a hook"])
def test_scores_are_written_over_only_where_nobody_sees_them(monkeypatch, goodness, seen):
    # As with a large vocabulary. The gradients are those of a loss that writes over nothing.
    monkeypatch.setattr(entropy, "MANY_CLASSES", 2)
    monkeypatch.setattr(squares, "MANY_CLASSES", 2)
    net = NEXT.net(goodness=goodness).train()
    twin = copy.deepcopy(net)
    x, y = NEXT.batch()
    expected = [scores.detach().clone() for scores in twin(x)]
    sffx.sff_loss(twin(x), y, task=NEXT.task).backward()
    kept: list[Tensor] = []
    if seen == "by a hook":
        for stage in stages_of(net):
            stage.modules[-1].register_forward_hook(lambda module, args, out: kept.append(out))
    on_block = (lambda name, scores, loss: kept.append(scores)) if seen == "by on_block" else None
    sffx.local_loss(net, x, y, on_block=on_block).backward()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    assert len(kept) == (0 if seen == "by nobody" else len(expected))
    for found, scores in zip(kept, expected, strict=False):
        assert torch.equal(found, scores)


class Sharp(nn.Module):
    """A head whose last operation keeps its output for the backward pass."""

    def __init__(self, channels: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_outputs)

    def forward(self, y: Tensor) -> Tensor:
        return self.linear(y).exp()


def test_scores_that_a_head_still_needs_are_not_written_over(monkeypatch):
    monkeypatch.setattr(entropy, "MANY_CLASSES", 2)
    net = NEXT.net(goodness=lambda block, outputs: Sharp(block.channels, outputs)).train()
    twin = copy.deepcopy(net)
    x, y = NEXT.batch()
    sffx.sff_loss(twin(x), y, task=NEXT.task).backward()
    sffx.local_loss(net, x, y).backward()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


class Tied(Tokens):
    """The embedding is the output layer."""

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.output.weight = self.embedding.weight


def test_a_tied_output_layer_gets_a_weight_of_its_own_and_that_is_said():
    model = Tied()
    x, y = NEXT.batch()
    net = sffx.transform(model, "module", x, task=NEXT.task, check=True)
    assert any("output shared its weight with embedding" in note for note in net.plan.notes)
    assert len(net.plan) == 3
    assert model.output.weight is model.embedding.weight
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, 0.1))
    sffx.local_step(net.train(), x, y, optimizer)
    back = sffx.extract(net)
    assert not torch.equal(back.output.weight, back.embedding.weight)
    sffx.check(back, net)


def test_a_vocabulary_as_output_is_ambiguous():
    with pytest.raises(sffx.TraceError, match=r"LanguageModel\(\) for the next token"):
        sffx.plan(NEXT.model(), "module", NEXT.batch()[0])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("goodness", ["sff", "shared"])
def test_with_a_large_vocabulary_the_peak_of_a_step_is_below_backpropagation(goodness):
    vocabulary, tokens = 32_000, 512
    torch.manual_seed(0)
    model = Tokens(vocabulary, vocabulary)
    x = torch.randint(0, vocabulary, (4, tokens // 4))
    net = sffx.transform(
        model, "module", x, task=tasks.LanguageModel(), goodness=goodness, check=False
    )
    local = torch.optim.AdamW(sffx.parameter_groups(net.train(), 1e-3))
    plain = torch.optim.AdamW(model.parameters())
    loss = torch.nn.functional.cross_entropy

    def backpropagation() -> None:
        plain.zero_grad()
        logits: Tensor = model(x)
        loss(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
        plain.step()

    sffx.local_step(net, x, x, local)
    backpropagation()
    own = count_memory(lambda: sffx.local_step(net, x, x, local), model=net, optimizer=local)
    rival = count_memory(backpropagation, model=model, optimizer=plain)
    assert own.peak < rival.peak


class Words(nn.Module):
    """Three layers of tokens and an output layer as wide as the vocabulary."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 6)
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4), nn.GELU())
        self.output = nn.Linear(4, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.output(self.layers(self.embedding(ids)))


def cut_words(vocabulary: int, goodness: str) -> sffx.net.CutModel:
    ids = torch.zeros(2, 5, dtype=torch.long)
    task = tasks.LanguageModel()
    model = Words(vocabulary)
    return sffx.transform(model, "layer", ids, task=task, goodness=goodness, check=False)


def head_parameters(net: sffx.net.CutModel) -> int:
    heads = [net.get_submodule(f"head_{index}") for index in range(len(net.plan))]
    return sum(p.numel() for head in heads for p in head.parameters())


def test_a_plan_tells_what_heads_of_a_large_vocabulary_cost() -> None:
    own, shared = cut_words(5000, "sff"), cut_words(5000, "shared")
    (note,) = [note for note in own.plan.notes if "scores 5000 tokens" in note]
    assert f"heads with {short_number(head_parameters(own))} parameters" in note
    assert f"goodness='shared' they have {short_number(head_parameters(shared))}," in note
    assert not any("scores" in note for note in shared.plan.notes)


def test_a_small_vocabulary_has_no_such_note() -> None:
    assert not any("scores" in note for note in cut_words(4999, "sff").plan.notes)


class Translation(nn.Module):
    """Layers on one sequence, whose mean goes into layers on another one."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Embedding(9, 8), nn.Embedding(9, 8)
        self.encoder, self.decoder = nn.Sequential(), nn.Sequential()
        for layers in (self.encoder, self.decoder):
            for _ in range(4):
                layers.append(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
        self.output = nn.Linear(8, 9)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        decoder_ids: Tensor,
        decoder_attention_mask: Tensor,
    ) -> Tensor:
        shares = attention_mask / attention_mask.sum(1, keepdim=True)
        known = (self.encoder(self.read(ids)) * shares[..., None]).sum(1, keepdim=True)
        hidden = self.decoder(self.write(decoder_ids) + known)
        return self.output(hidden * decoder_attention_mask[..., None])


def sentences(length: int, other: int) -> dict[str, Tensor]:
    """Return a batch with half of the first sequence and one token of the second as padding."""
    mask, decoder_mask = torch.ones(2, length, dtype=torch.int64), torch.ones(2, other).long()
    mask[:, length // 2 :] = 0
    decoder_mask[:, -1] = 0
    return {
        "ids": torch.randint(0, 9, (2, length)),
        "attention_mask": mask,
        "decoder_ids": torch.randint(0, 9, (2, other)),
        "decoder_attention_mask": decoder_mask,
    }


def test_tokens_of_another_sequence_are_not_scored():
    x = sentences(6, 4)
    net = sffx.transform(Translation(), "layer", x, task=tasks.LanguageModel(), check=True)
    assert {block.shape[0] for block in net.plan} == {4}
    assert not any("two sequences" in note for note in net.plan.notes)
    same = sffx.plan(Translation(), "layer", sentences(6, 6), task=tasks.LanguageModel())
    (note,) = [note for note in same.notes if "two sequences" in note]
    assert "do not depend on decoder_ids" in note


class OneMask(Translation):
    """Its second sequence has no padding."""

    def forward(self, ids: Tensor, attention_mask: Tensor, decoder_ids: Tensor) -> Tensor:
        return super().forward(ids, attention_mask, decoder_ids, torch.ones_like(decoder_ids))


def test_two_sequences_of_one_length_have_their_own_masks():
    x = sentences(6, 6)
    task = tasks.LanguageModel()
    plan = sffx.plan(Translation(), "layer", x, task=task)
    encoder, decoder = "attention_mask", "decoder_attention_mask"
    assert [block.mask for block in plan] == [encoder] * 5 + [decoder] * (len(plan) - 5)
    assert torch.equal(padding_mask(plan, x), x["decoder_attention_mask"])
    del x["decoder_attention_mask"]
    plan = sffx.plan(OneMask(), "layer", x, task=task)
    assert [block.mask for block in plan] == [encoder] * 5 + [""] * (len(plan) - 5)
    assert padding_mask(plan, x) is None


@pytest.mark.parametrize("length", [4, 6])
def test_padding_is_that_of_the_sequence_that_is_predicted(length):
    x = sentences(length, 4)
    net = sffx.transform(Translation(), "layer", sentences(6, 4), task=tasks.LanguageModel())
    y = x["decoder_ids"]
    own = y.masked_fill(x["decoder_attention_mask"] == 0, -100)
    assert torch.equal(net.plan.task.without_padding(y, padding_mask(net.plan, x)), own)
    assert sffx.local_loss(net.train(), x, y) == sffx.local_loss(net, x, own)
    assert sffx.evaluate(net, [(x, y)]) == sffx.evaluate(net, [(x, own)])


@kept
def small_net() -> Any:
    """Return a language model of ten tokens."""
    layers = [nn.Embedding(10, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 10)]
    ids = torch.ones(2, 4, dtype=torch.long)
    return sffx.transform(nn.Sequential(*layers), "layer", ids, task=tasks.LanguageModel()).train()


def next_tokens(ids: Tensor, ignore: bool) -> Tensor:
    """Return the tokens after those of an input; the last is the first of the sequence, or none."""
    y = ids.roll(-1, dims=1)
    if ignore:
        y[:, -1] = -100
    return y


@pytest.mark.parametrize("ignore", [False, True])
def test_targets_that_are_shifted_already_are_refused(ignore: bool) -> None:
    net = small_net()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    y = next_tokens(ids, ignore)
    with pytest.raises(InputError, match="shifted by one token"):
        sffx.local_loss(net, ids, y)
    with pytest.raises(InputError, match="shifted by one token"):
        sffx.evaluate(net, [(ids, y)])


def test_the_first_targets_of_each_net_on_an_accelerator_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A look at values there waits for the device, and this machine has none.
    monkeypatch.setattr("sffx.inputs.has_values", lambda y: False)
    looks = []
    require = tasks.LanguageModel.require_inputs

    def counted(task: tasks.LanguageModel, y: Tensor, inputs: Sequence[Tensor]) -> None:
        looks.append(len(inputs))
        require(task, y, inputs)

    monkeypatch.setattr(tasks.LanguageModel, "require_inputs", counted)
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    for _ in range(2):
        net = small_net()
        with pytest.raises(InputError, match="shifted by one token"):
            sffx.local_loss(net, ids, next_tokens(ids, True))
        for _ in range(3):
            sffx.local_loss(net, ids, ids)
    assert looks == [1, 1]


def test_targets_without_values_or_elsewhere_are_not_compared() -> None:
    net = small_net()
    ids = torch.tensor([[1, 2, 3, 4]])
    # Not shifted targets, but those of another device are what is wrong.
    with pytest.raises(InputError, match="y is on meta, but the scores of the model are on cpu"):
        sffx.local_loss(net, ids, next_tokens(ids, True).to("meta"))


@pytest.mark.parametrize(
    "y",
    [
        torch.tensor([[1, 2, 3, 4], [7, 7, 7, 7]]),  # the input itself
        torch.tensor([[-100, 2, 3, 4], [-100, -100, 7, 7]]),  # without a prompt
        torch.tensor([[1, 2, 3, 9], [7, 7, 7, 7]]),  # other targets, for a noisy input
    ],
)
def test_other_targets_of_a_language_model_are_not_taken_for_shifted_ones(y: Tensor) -> None:
    ids = torch.tensor([[1, 2, 3, 4], [7, 7, 7, 7]])
    assert torch.isfinite(sffx.local_loss(small_net(), ids, y))
