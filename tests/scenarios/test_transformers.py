"""Classifiers of Hugging Face's transformers: small, random, cut, compared with the original."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from tests.test_api import rerandomised

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip(
        "transformers", reason="the models of transformers need the package, in the extra 'dev'"
    )

LAYERS = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 4,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {**LAYERS, **NO_DROPOUT, "vocab_size": 50, "max_position_embeddings": 32}
PATCHES = {**LAYERS, **NO_DROPOUT, "image_size": 16, "patch_size": 4}
DISTILBERT = {
    "vocab_size": 50,
    "num_labels": 4,
    "dim": 16,
    "n_layers": 3,
    "n_heads": 2,
    "hidden_dim": 32,
    "max_position_embeddings": 32,
}
GPT2 = {
    "vocab_size": 50,
    "num_labels": 4,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "n_positions": 32,
}
GPT2 |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SEGFORMER = {
    "num_labels": 4,
    "depths": [1] * 4,
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
}
WAV2VEC2 = {
    **LAYERS,
    "num_hidden_layers": 2,
    "conv_dim": (8, 8),
    "conv_kernel": (5, 3),
    "conv_stride": (4, 2),
    "num_feat_extract_layers": 2,
}
WAV2VEC2 |= {
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
WAV2VEC2 |= dict.fromkeys(
    ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop"),
    0.0,
)

# name: the class before "For...Classification", its configuration, the kind of input, the number
# of feature blocks.
MODELS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    # Embeddings, then each encoder layer.
    "bert": ("Bert", BERT, "text", 4),
    "distilbert": (
        "DistilBert",
        {**DISTILBERT, "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0},
        "text",
        4,
    ),
    "roberta": ("Roberta", BERT, "text", 4),
    "electra": ("Electra", {**BERT, "embedding_size": 12}, "text", 4),
    # Embeddings, then all uses of the one layer.
    "albert": ("Albert", {**BERT, "embedding_size": 12, "classifier_dropout_prob": 0.0}, "text", 2),
    "albert, two groups": (
        "Albert",
        {**BERT, "num_hidden_groups": 2, "embedding_size": 12, "classifier_dropout_prob": 0.0},
        "text",
        4,  # the second group has one layer, whose attention and feed-forward part are blocks
    ),
    "gpt2": ("GPT2", {**GPT2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "text", 4),
    "vit": ("ViT", PATCHES, "image 16", 4),
    "deit": ("DeiT", PATCHES, "image 16", 4),
    # Embeddings, two layers, the merging of patches, two layers.
    "swin": (
        "Swin",
        {
            "num_labels": 4,
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        }
        | {"drop_path_rate": 0.0},
        "image 32",
        6,
    ),
    # Stem, five layers, three downsamplings.
    "convnext": (
        "ConvNext",
        {"num_labels": 4, "hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 2, 1]},
        "image 32",
        9,
    ),
    "resnet": (
        "ResNet",
        {
            "num_labels": 4,
            "embedding_size": 8,
            "hidden_sizes": [8, 12, 16, 20],
            "depths": [1] * 4,
            "layer_type": "basic",
        },
        "image 32",
        5,
    ),
    "mobilenet_v2": (
        "MobileNetV2",
        {"num_labels": 4, "depth_multiplier": 0.25, "classifier_dropout_prob": 0.0},
        "image 32",
        23,
    ),
    # A patch embedding and a layer, four times.
    "segformer": (
        "Segformer",
        {**SEGFORMER, **NO_DROPOUT, "classifier_dropout_prob": 0.0, "drop_path_rate": 0.0},
        "image 32",
        8,
    ),
    # Features, the sum with the positions, two layers, the projector.
    "wav2vec2": ("Wav2Vec2", {**WAV2VEC2, "apply_spec_augment": False}, "signal", 5),
    # Positions that rotate, which every layer reads.
    "llama": (
        "Llama",
        {
            **LAYERS,
            "vocab_size": 50,
            "num_key_value_heads": 1,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        "text",
        4,
    ),
    # Dropout as it is by default: attention reads its mode for a number.
    "bert, dropout": (
        "Bert",
        {**BERT, "attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1},
        "text",
        4,
    ),
    "distilbert, dropout": ("DistilBert", DISTILBERT, "text", 4),
    "gpt2, dropout": ("GPT2", GPT2, "text", 4),
    "bert, eager attention": ("Bert", {**BERT, "attn_implementation": "eager"}, "text", 4),
}


def build(name: str) -> nn.Module:
    kind, options, inputs, _ = MODELS[name]
    task = "Image" if inputs.startswith("image") else "Sequence"
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options)
    return rerandomised(getattr(transformers, f"{kind}For{task}Classification")(config)).train()


def batch(kind: str, size: int, length: int = 8) -> dict[str, Tensor]:
    if kind == "signal":
        return {"input_values": torch.randn(size, 8 * length)}
    if kind != "text":
        side = int(kind.split()[1])
        return {"pixel_values": torch.randn(size, 3, side, side)}
    lengths = torch.randint(2, length + 1, (size, 1))
    return {
        "input_ids": torch.randint(2, 50, (size, length)),
        "attention_mask": (torch.arange(length) < lengths).long(),
    }


def run(module: nn.Module, inputs: dict[str, Tensor]) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        return module(**inputs)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", MODELS)
def test_cut_equals_the_original_and_every_parameter_learns_in_one_block(name):
    _, _, kind, blocks = MODELS[name]
    model = build(name)
    net = sffx.transform(model, example_input=batch(kind, 2), norm="none")
    assert len(net.plan) == blocks
    assert not net.plan.leaves
    net.readout.mode = "classifier"
    for training in (True, False):  # train mode first, so that BN has statistics to evaluate with
        model.train(training), net.train(training)
        for inputs in (batch(kind, 5), batch(kind, 3, 12)):
            expected, found = run(model, inputs).logits, run(net, inputs)
            assert expected.abs().max() > 1e-3
            error = (found[-1] if training else found) - expected
            assert error.abs().max() <= 1e-5 * expected.abs().max()
    assert learning(net, batch(kind, 4)) == reached(model, batch(kind, 4))


def learning(net: torch.fx.GraphModule, inputs: dict[str, Tensor]) -> list[str]:
    """Return the parameters of the original that have gradient from `local_loss`.

    `transform` has checked that it is the gradient of one block.
    """
    sffx.local_loss(net.train(), inputs, torch.tensor([0, 1, 2, 3])).backward()
    owned = [
        (name.partition(".")[2], p)
        for name, p in net.named_parameters()
        if not name.startswith("head_")
    ]
    assert len({name for name, _ in owned}) == len(owned)
    return sorted(name for name, p in owned if p.grad is not None)


def reached(model: nn.Module, inputs: dict[str, Tensor]) -> list[str]:
    """Return the parameters that plain backpropagation reaches."""
    F.cross_entropy(model.train()(**inputs).logits, torch.tensor([0, 1, 2, 3])).backward()
    return sorted(name for name, p in model.named_parameters() if p.grad is not None)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_padding_changes_no_goodness(name):
    net = sffx.transform(build(name), example_input=batch("text", 2)).train()
    few = batch("text", 3)
    many = {
        "input_ids": F.pad(few["input_ids"], (0, 4)),
        "attention_mask": F.pad(few["attention_mask"], (0, 4)),
    }
    for inputs in (few, many):  # gpt2 and llama look for padding in the tokens themselves
        inputs["input_ids"] = inputs["input_ids"] * inputs["attention_mask"]
    assert all(block.mask == "attention_mask" for block in net.plan)
    torch.testing.assert_close(net(**few), net(**many), rtol=1e-4, atol=1e-4)


def test_what_a_tokenizer_returns_is_an_input():
    encoded = transformers.BatchEncoding(batch("text", 4))
    net = sffx.transform(build("bert"), example_input=encoded).train()
    y = torch.tensor([0, 1, 2, 3])
    torch.testing.assert_close(sffx.local_loss(net, encoded, y), sffx.sff_loss(net(**encoded), y))
    assert sffx.evaluate(net, [(encoded, y)]).samples == 4


def test_an_optional_input_that_is_none_stays_so():
    net = sffx.transform(build("bert"), example_input={**batch("text", 2), "token_type_ids": None})
    assert [i.name for i in net.plan.inputs] == ["input_ids", "attention_mask"]


def test_bert_is_exported(tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs the extra 'export'")
    config = transformers.BertConfig(**{**BERT, "num_hidden_layers": 1})
    net = sffx.transform(
        transformers.BertForSequenceClassification(config), example_input=batch("text", 2)
    ).eval()
    assert sffx.export_onnx(net, tmp_path / "bert.onnx").stat().st_size > 0


def test_layers_dropped_at_random_are_a_leaf_and_that_is_said():
    kind, options, inputs, _ = MODELS["wav2vec2"]
    config = getattr(transformers, f"{kind}Config")(**{**options, "layerdrop": 0.1})
    plan = sffx.plan(
        getattr(transformers, f"{kind}ForSequenceClassification")(config),
        example_input=batch(inputs, 2),
    )
    assert [leaf.qualname for leaf in plan.leaves] == ["wav2vec2.encoder"]
    assert "random numbers" in plan.leaves[0].reason
