"""Models by name: what is made, that it has no values, and how an unknown name is told."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch

import sffx
from sffx.cli.models import find_model
from sffx.cli.sources import _without_weights, token_example
from sffx.errors import InputError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip(
        "transformers", reason="hf: needs the package transformers, in the extra 'dev'"
    )


def test_a_configuration_gives_its_classifier_without_values() -> None:
    model = find_model("hf:BertConfig")
    assert type(model).__name__ == "BertForSequenceClassification"
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_tokens_are_given_with_their_mask() -> None:
    config = transformers.DistilBertConfig(
        n_layers=2, dim=16, n_heads=2, hidden_dim=32, vocab_size=50
    )
    model = _without_weights(lambda: transformers.DistilBertForSequenceClassification(config))
    example = token_example(model)
    assert example is not None
    assert {name: tuple(tensor.shape) for name, tensor in example.items()} == {
        "input_ids": (1, 16),
        "attention_mask": (1, 16),
    }
    assert len(sffx.plan(model, example_input=example)) == 3


def test_an_image_classifier_s_input_is_left_to_the_plan() -> None:
    model = find_model("hf:ResNetConfig")
    assert type(model).__name__ == "ResNetForImageClassification"
    assert token_example(model) is None


def test_a_classifier_that_pads_is_told_its_padding() -> None:
    assert find_model("hf:GPT2Config").config.pad_token_id == 0


def test_a_model_that_reads_its_values_gets_them() -> None:
    def make() -> torch.nn.Module:
        torch.ones(1).item()
        return torch.nn.Linear(1, 1)

    assert _without_weights(make).weight.device.type == "cpu"


def test_timm_knows_its_models_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("timm")
    model = find_model("timm:resnet18")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    # The tag chooses weights.
    assert find_model("timm:resnet18.a1_in1k", num_classes=3).fc.out_features == 3
    with pytest.raises(InputError, match=r"timm has no model 'resnet81'. Hint: .*resnet18"):
        find_model("timm:resnet81")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:BretConfig", "no configuration 'BretConfig'. Hint: .*BertConfig"),
        ("hf:pipeline", "no configuration 'pipeline'"),
        ("hf:ClapTextConfig", "no classifier of sequences, images or audio for ClapTextConfig"),
    ],
)
def test_what_transformers_does_not_have_is_told(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_model(source)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        InputError, match=r"timm:resnet18 needs the package 'timm'.*pip install timm"
    ):
        find_model("timm:resnet18")
