"""A cut model behind keywords: the loss and the gradients are those of `local_loss`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.errors import InputError
from tests.toys import Residual, TwoInputs


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(6, 3, 8, 8), "labels": torch.randint(0, 4, (6,))}


def module() -> sffx.KeywordLoss:
    torch.manual_seed(0)
    net = sffx.transform(Residual(), example_input={"x": torch.zeros(1, 3, 8, 8)}).train()
    net.classifier.drop.p = 0.0
    return sffx.KeywordLoss(net)


@pytest.mark.parametrize("mode", ["ensemble", "last", "classifier"])
def test_training_is_that_of_local_loss(mode):
    model = module()
    model.net.readout.mode = mode
    twin = copy.deepcopy(model.net)
    given = batch()
    output = model(**given)
    expected = sffx.local_loss(twin, given["x"], given["labels"])
    for loss in (output["loss"], expected):
        loss.backward()
    assert torch.equal(output["loss"], expected)
    for ours, theirs in zip(model.net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    # The scores of that step, by the readout of eval mode.
    fresh = module().net
    fresh.readout.eval()
    fresh.readout.mode = mode
    torch.testing.assert_close(output["logits"], fresh(given["x"]).detach())


def test_evaluation_is_cross_entropy_of_the_scores():
    model = module().eval()
    given = batch()
    output = model(**given)
    scores = model.net(given["x"])
    assert torch.equal(output["logits"], scores)
    assert torch.equal(output["loss"], F.cross_entropy(scores, given["labels"]))
    assert list(model(x=given["x"])) == ["logits"]


def test_no_samples_have_logits_but_no_loss():
    model = module().eval()
    x, y = batch().values()
    with pytest.raises(InputError, match=r"the batch has 0 samples.*Hint: leave out"):
        model(x=x[:0], labels=y[:0])
    assert model(x=x[:0])["logits"].shape == (0, 4)


def test_a_model_with_several_inputs_and_a_loss_of_ones_own():
    torch.manual_seed(0)
    example = (torch.zeros(1, 6), torch.zeros(1, 5))
    net = sffx.transform(TwoInputs(), "layer", example).train()
    given = {"image": torch.randn(5, 6), "text": torch.randn(5, 5)}
    labels = torch.randint(0, 4, (5,))
    smooth = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    found = sffx.KeywordLoss(net, smooth)(labels=labels, **given)["loss"]
    assert torch.equal(found, sffx.sff_loss(net(**given), labels, smooth))


def test_it_survives_copies_and_pickles():
    model = module()
    given = batch()
    expected = model(**given)["loss"]
    for other in (copy.deepcopy(module()), pickle.loads(pickle.dumps(module()))):
        assert torch.equal(other(**given)["loss"], expected)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["labels"], "the batch holds labels only. Hint: .*remove_unused_columns=False"),
        (["x"], "labels are missing, which a training step needs"),
    ],
)
def test_batches_that_lack_something(keys, message):
    given = {key: value for key, value in batch().items() if key in keys}
    with pytest.raises(InputError, match=message):
        module()(**given)


def test_checkpointing_is_refused_in_words() -> None:
    """`TrainingArguments(gradient_checkpointing=True)` calls this method."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    module = sffx.KeywordLoss(sffx.transform(model, "layer", torch.zeros(1, 4)))
    with pytest.raises(sffx.InputError, match="Hint: gradient_checkpointing=False"):
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=None)


def test_a_net_that_is_given_labels_names_the_wrapper():
    net = module().net
    with pytest.raises(InputError, match=r"takes x, and not labels. Hint: .*KeywordLoss\(net\)"):
        net(**batch())
    with pytest.raises(TypeError, match="missing"):
        net()
