"""Models of tokens with an attention mask: padding changes nothing, however the model is run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import sffx
from sffx.runtime.evaluate import block_scores
from tests.toys import Tokens

LENGTHS = torch.tensor([6, 3, 1, 5])
Y = torch.tensor([0, 1, 2, 3])


def batch(padded_to: int, padding: int = 0) -> dict[str, Tensor]:
    """Four samples of `LENGTHS` tokens, with this token behind them up to a length."""
    ids = torch.randint(0, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    ids = torch.nn.functional.pad(ids, (0, padded_to - 6))
    mask = (torch.arange(padded_to) < LENGTHS[:, None]).long()
    return {"input_ids": torch.where(mask.bool(), ids, padding), "attention_mask": mask}


def cut(**options: object) -> torch.fx.GraphModule:
    torch.manual_seed(0)
    return sffx.transform(Tokens(), example_input=batch(6), **options).train()


def test_heads_and_norms_read_the_mask():
    net = cut()
    lines = [line.partition(";")[0].strip() for line in net.code.splitlines()]
    assert "goodness_1 = self.head_1(block_1, attention_mask)" in lines
    assert "norm_1 = self.norm_1(detached_1, attention_mask)" in lines
    assert [block.mask for block in net.plan] == ["attention_mask"] * 3
    assert net.plan.notes == (
        "the goodness and norm of block_0, block_1, block_2 run over the real tokens, "
        "by attention_mask",
    )


def test_padding_does_not_change_what_a_probe_reads():
    net = cut()
    probe = sffx.LinearProbe(net, ["block_0", "block_2"])
    features = probe.features(batch(6, padding=3))
    assert features.shape == (4, 16)
    torch.testing.assert_close(features, probe.features(batch(11, padding=7)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "none"},
        {"goodness": "cwc"},
        {"goodness": "mlp"},
        {"kernel_size": 3},
    ],
)
def test_padding_changes_neither_scores_nor_gradients(options):
    net, other = cut(**options), cut(**options)
    few, many = batch(6, padding=3), batch(11, padding=7)
    torch.testing.assert_close(block_scores(net, few), block_scores(other, many))
    sffx.local_loss(net, few, Y).backward()
    sffx.local_loss(other, many, Y).backward()
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_a_sample_alone_has_the_scores_that_it_has_in_a_batch():
    net = cut()
    inputs = batch(6)
    scores = block_scores(net, inputs)
    for n, length in enumerate(LENGTHS):
        sample = {name: value[n : n + 1, :length] for name, value in inputs.items()}
        torch.testing.assert_close(block_scores(net, sample), scores[:, n : n + 1])


def test_the_local_loss_is_the_loss_of_all_blocks():
    net, inputs = cut(), batch(8)
    twin = copy.deepcopy(net)
    local, whole = sffx.local_loss(net, inputs, Y), sffx.sff_loss(twin(**inputs), Y)
    local.backward(), whole.backward()
    assert torch.equal(local, whole)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_mapping_is_evaluated_and_stepped():
    net = cut()
    sffx.local_step(net, batch(6), Y, torch.optim.SGD(sffx.parameter_groups(net, lr=0.1)))
    found = sffx.evaluate(net, [(batch(6), Y), (batch(9), Y)])
    assert found.samples == 8
    assert set(found.accuracy) == {
        "block_0",
        "block_1",
        "block_2",
        "ensemble",
        "last",
        "classifier",
    }


def test_exported_with_its_mask(tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export needs the extra 'export'")
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export needs the extra 'export'")
    net, inputs = cut().eval(), batch(6)
    path = sffx.export_onnx(net, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (scores,) = session.run(["scores"], {name: value.numpy() for name, value in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(scores), net(**inputs))


def test_a_block_of_other_tokens_says_that_padding_counts():
    class Strided(Tokens):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return super().forward(input_ids[:, ::2], attention_mask[:, ::2])

    plan = sffx.plan(Strided(), example_input=batch(6))
    assert plan.notes == (
        "block_0, block_1, block_2 return other tokens than attention_mask marks: "
        "their goodness and norm run over padding as well",
    )


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_is_of_integers_or_booleans(dtype):
    inputs = {**batch(6), "attention_mask": batch(6)["attention_mask"].to(dtype)}
    plan = sffx.plan(Tokens(), example_input=inputs)
    assert all(block.mask == ("" if dtype == torch.float32 else "attention_mask") for block in plan)
