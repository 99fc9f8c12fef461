from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import sffx
from sffx.errors import InputError
from sffx.runtime.evaluate import block_scores
from tests.toys import Chain, Residual, TwoInputs


@pytest.fixture
def net():
    torch.manual_seed(0)
    return sffx.transform(Residual()).train()


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(n, 3, 8, 8, generator=generator),
            torch.randint(0, 4, (n,), generator=generator),
        )
        for n in sizes
    ]


def test_accuracy_and_loss_by_hand(net):
    loader = batches(5, 3, 8)
    result = sffx.evaluate(net, loader)
    x, y = (torch.cat(parts) for parts in zip(*loader, strict=True))
    net.eval()
    scores = block_scores(net, x).detach()
    named = {f"block_{i}": scores[i] for i in range(3)} | {
        "ensemble": scores[:3].mean(0),
        "last": scores[2],
        "classifier": scores[3],
    }
    assert result.samples == 16
    assert list(result.accuracy) == [
        "block_0",
        "block_1",
        "block_2",
        "ensemble",
        "last",
        "classifier",
    ]
    for name, s in named.items():
        assert result.accuracy[name] == float((s.argmax(1) == y).float().mean())
        assert result.loss[name] == pytest.approx(float(F.cross_entropy(s, y)), rel=1e-5)


def test_it_prints_as_a_table(net):
    lines = str(sffx.evaluate(net, batches(4))).splitlines()
    assert lines[0].split() == ["accuracy", "loss", "(4", "samples)"]
    assert lines[4].split()[0] == "ensemble"
    assert len(lines) == 7


def test_modes_and_statistics_are_left_as_they_were(net):
    net.block_1.eval()
    before = {name: b.clone() for name, b in net.named_buffers()}
    modes = [m.training for m in net.modules()]
    sffx.evaluate(net, batches(4))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(b, before[name]) for name, b in net.named_buffers())
    with pytest.raises(InputError, match="labels run from"):
        sffx.evaluate(net, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 9]))])
    assert [m.training for m in net.modules()] == modes


def test_several_inputs():
    net = sffx.transform(TwoInputs(), "layer", (torch.zeros(1, 6), torch.zeros(1, 5)))
    image, text, y = torch.randn(4, 6), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    by_position = sffx.evaluate(net, [((image, text), y)])
    assert by_position == sffx.evaluate(net, [({"text": text, "image": image}, y)])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader yielded no samples"),
        ([torch.zeros(2, 3, 8, 8)], r"the loader yielded a Tensor, not a pair \(x, y\)"),
        ([(1, 2, 3)], r"the loader yielded a tuple of int, int, int, not a pair \(x, y\)"),
        ([(torch.zeros(2, 3, 8, 8), [0, 1])], "a tuple of Tensor, list, .* with a tensor y"),
    ],
)
def test_loaders_that_cannot_be_used(net, loader, message):
    with pytest.raises(InputError, match=message):
        sffx.evaluate(net, loader)


def test_a_plain_model_is_refused():
    with pytest.raises(InputError, match="net is a Chain, not a cut model"):
        sffx.evaluate(Chain(), batches(2))


def test_a_compiled_model_is_evaluated(net):
    loader = batches(5)
    expected = sffx.evaluate(net, loader)
    net.compile(backend="eager")
    with torch.no_grad():
        net.eval()(loader[0][0])
    assert sffx.evaluate(net, loader) == expected


def test_several_threads_may_evaluate_one_model(net):
    x = batches(6)[0][0]
    expected = block_scores(net.eval(), x)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: block_scores(net, x), range(60)):
            assert torch.equal(found, expected)


def test_metrics_that_fail_are_told_with_the_block_its_scores_and_targets(net, monkeypatch):
    x, y = next(iter(batches(1)))
    # Labels that an own task would have passed.
    monkeypatch.setattr(type(net.plan.task), "check_labels", lambda *given: None)
    message = r"the loss of block_0 failed on scores .* and y \(\d+,\) of torch.float32: .*Hint: "
    with pytest.raises(InputError, match=message) as caught:
        sffx.evaluate(net, [(x, y.float())])
    assert type(caught.value.__cause__) is RuntimeError


def test_the_default_device_does_not_matter(net):
    loader = batches(5, 3)
    expected = sffx.evaluate(net, loader)
    with torch.device("meta"):
        assert sffx.evaluate(net, loader) == expected
