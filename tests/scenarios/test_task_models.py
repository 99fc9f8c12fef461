"""Models of torchvision and transformers with other tasks than classes of a sample."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sffx
from sffx import tasks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
LABELS = {**SMALL, "num_labels": 4}
DISTILBERT = {
    "vocab_size": 50,
    "num_labels": 4,
    "dim": 16,
    "n_layers": 3,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 32,
}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 1}


def made(name: str, config: dict[str, Any]) -> nn.Module:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    return kind(kind.config_class(**config))


def padded() -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(2, 50, (3, 7)), "attention_mask": mask}


MODELS = {
    "BERT, tokens": ("BertForTokenClassification", LABELS, tasks.TokenClassification()),
    "DistilBERT, tokens": ("DistilBertForTokenClassification", DISTILBERT, None),
    "ELECTRA, tokens": (
        "ElectraForTokenClassification",
        {**LABELS, "embedding_size": 16},
        tasks.TokenClassification(),
    ),
    "GPT-2": ("GPT2LMHeadModel", GPT2, tasks.LanguageModel()),
    "Llama, tied": (
        "LlamaForCausalLM",
        {**SMALL, "tie_word_embeddings": True},
        tasks.LanguageModel(),
    ),
    "BERT, a number": (
        "BertForSequenceClassification",
        {**SMALL, "num_labels": 1},
        tasks.Regression(),
    ),
    "BERT, labels": (
        "BertForSequenceClassification",
        {**LABELS, "problem_type": "multi_label_classification"},
        tasks.MultiLabel(),
    ),
}
TARGETS = {
    tasks.TokenClassification: lambda x: x["input_ids"] % 4,
    tasks.LanguageModel: lambda x: x["input_ids"],
    tasks.Regression: lambda x: x["input_ids"].float().mean(1),
    tasks.MultiLabel: lambda x: (x["input_ids"][:, :4] > 25).float(),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers_tell_their_task(name):
    kind, config, task = MODELS[name]
    x = padded()
    model = made(kind, config)
    net = sffx.transform(model, "module", x, check=True)
    assert net.plan.task == (task or tasks.TokenClassification())
    assert any("the task is inferred" in note for note in net.plan.notes)
    assert len(net.plan) > 1
    y = TARGETS[type(net.plan.task)](x)
    loss = sffx.local_loss(net.train(), x, y)
    loss.backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_padding_counts_for_nothing():
    net = sffx.transform(made("BertForTokenClassification", LABELS), "module", padded()).eval()
    x = padded()
    y = x["input_ids"] % 4
    other = {**x, "input_ids": x["input_ids"].masked_fill(x["attention_mask"] == 0, 3)}
    evaluation = sffx.evaluate(net, [(x, y)])
    spoilt = y.masked_fill(x["attention_mask"] == 0, 1)
    assert sffx.evaluate(net, [(other, spoilt)]).loss == pytest.approx(evaluation.loss)
    left_out = y.masked_fill(x["attention_mask"] == 0, -100)
    assert sffx.evaluate(net, [(x, left_out)]) == evaluation


def test_the_trainer_of_transformers_takes_tokens():
    x = padded()
    wrapped = sffx.KeywordLoss(sffx.transform(made("GPT2LMHeadModel", GPT2), "module", x))
    y = x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)
    for mode in (True, False):
        found = wrapped.train(mode)(labels=y, **x)
        assert found["logits"].shape == (3, 7, 50)
        assert found["loss"].isfinite()
    logits = found["logits"]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())
    torch.testing.assert_close(found["loss"], expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["BERT, tokens", "GPT-2", "BERT, a number", "BERT, labels"])
@pytest.mark.filterwarnings("ignore")  # of transformers, on its own code
def test_a_run_of_the_trainer_reports_what_evaluate_reports(name, tmp_path):
    kind, config, task = MODELS[name]
    x = padded()
    net = sffx.transform(made(kind, config), "module", x, check=False)
    y = TARGETS[type(task)](x)
    before = sffx.evaluate(net, [(x, y)]).loss["ensemble"]
    samples = []
    for i in range(3):
        samples.append({"labels": y[i], **{key: value[i] for key, value in x.items()}})
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        per_device_eval_batch_size=3,
        max_steps=3,
        learning_rate=1e-2,
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        sffx.KeywordLoss(net), options, train_dataset=samples, eval_dataset=samples
    )
    trainer.train()
    reported = trainer.evaluate()["eval_loss"]
    after = sffx.evaluate(net, [(x, y)]).loss["ensemble"]
    assert reported == pytest.approx(after, rel=1e-4)
    assert after < before


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_with_a_vocabulary_of_32000_the_peak_is_below_backpropagation(name):
    is_tied = name == "GPT-2"
    kind, config, task = MODELS["GPT-2" if is_tied else "Llama, tied"]
    config = {**config, "vocab_size": 32_000, "tie_word_embeddings": is_tied}
    ids = torch.randint(0, 32_000, (2, 32))
    net = sffx.transform(
        made(kind, config), "stages(1)", {"input_ids": ids}, goodness="shared", check=False
    )
    assert net.plan.task == task
    # With a batch of 32 the scores are 125 MiB; the embeddings are 2 MiB.
    predicted = sffx.footprint(net, 32)
    assert predicted.backpropagation is not None
    assert predicted.peak < predicted.backpropagation


def test_a_segmentation_of_torchvision_is_cut_in_its_backbone():
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=5
    )
    x = torch.randn(2, 3, 32, 48)
    net = sffx.transform(model, "stages(2)", x, check=False).train()
    assert net.plan.task == tasks.Segmentation()
    assert [tuple(scores.shape[:2]) for scores in net(x)] == [(2, 5)] * 3
    assert net.eval()(x).shape == (2, 5, 32, 48)
    y = torch.randint(0, 5, (2, 32, 48))
    sffx.local_loss(net.train(), x, y).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_a_detector_of_torchvision_is_refused_with_a_recipe():
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )
    with pytest.raises(sffx.SffxError, match=r"backbone.*by classification.*put the trained"):
        sffx.plan(model, example_input=torch.zeros(1, 3, 64, 64))


class Backbone(nn.Module):
    """Returns what may be scores, or features."""

    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output
        self.embedding = nn.Embedding(9, 6)
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, ids: Tensor) -> Any:
        x = self.layers(self.embedding(ids))
        return {"last_hidden_state": x} if self.output == "mapping" else x


@pytest.mark.parametrize("output", ["mapping", "tensor"])
def test_features_of_tokens_are_not_taken_for_scores(output):
    ids = torch.zeros(1, 5, dtype=torch.int64)
    with pytest.raises(sffx.TraceError, match=r"pass task=sffx\.tasks\.TokenClassification\(\)"):
        sffx.plan(Backbone(output), "layer", ids)
    said = sffx.plan(Backbone("tensor"), "layer", ids, task=tasks.TokenClassification())
    assert said.num_classes == 6
