"""Each feature of the package with each task: it works, or refuses by name."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sffx
from sffx import tasks
from sffx.draw.graph import block_graph
from sffx.draw.page import page
from tests.runtime.pipeline.processes import run
from tests.tasks.cases import ALL, CASES, IGNORED, IGNORING, images

every_task = pytest.mark.parametrize("name", ALL)


def sgd(net: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(sffx.parameter_groups(net, 1e-2))


def step(net: Any, x: Any, y: Any) -> torch.Tensor:
    return sffx.local_step(net.train(), x, y, sgd(net))


def same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["one number", "labels", "pixels", "next token"])
def test_compiled_blocks_make_the_same_steps(name):
    torch.compiler.reset()
    net = ALL[name].net()
    compiled = sffx.compile(copy.deepcopy(net), backend="aot_eager")
    x, y = ALL[name].batch()
    for _ in range(2):  # the first step checks the blocks, the second one compiles them
        torch.testing.assert_close(step(compiled, x, y), step(net, x, y))
    assert set(sffx.compiled_blocks(compiled).values()) == {"compiled"}
    same_weights(compiled, net)
    if name in IGNORING:
        nothing = torch.full_like(y, IGNORED)
        assert step(compiled, x, nothing) == step(net, x, nothing) == 0
        same_weights(compiled, net)


@every_task
def test_offloaded_blocks_make_the_same_step(name):
    net = ALL[name].net()
    offloaded = copy.deepcopy(net).train()
    batch = ALL[name].batch()
    expected = step(net, *batch)
    optimizer = sgd(offloaded)
    sffx.offload(offloaded, optimizer)
    torch.testing.assert_close(sffx.local_step(offloaded, *batch, optimizer), expected)
    sffx.onload(offloaded)
    same_weights(offloaded, net)


@every_task
def test_cached_outputs_make_the_same_step(name):
    net = ALL[name].net().train()
    twin = copy.deepcopy(net)
    x, y = ALL[name].batch()
    cached = sffx.cache_outputs(net, [(x, y)], "block_0")
    ((values, targets),) = DataLoader(cached, batch_size=len(cached))
    later = ["block_1", "classifier"]
    expected = sffx.local_step(twin, x, y, sgd(twin), blocks=later)
    torch.testing.assert_close(
        sffx.local_step(net, values, targets, sgd(net), blocks=later), expected
    )
    same_weights(net, twin)


@pytest.mark.sampled(3)
@every_task
def test_an_exported_program_takes_another_batch(name, tmp_path):
    net = ALL[name].net().eval()
    sffx.export_program(net, tmp_path / "net.pt2")
    program = torch.export.load(tmp_path / "net.pt2").module()
    x, _ = ALL[name].batch(6)
    torch.testing.assert_close(program(x), net(x))


@pytest.mark.sampled(3)
@every_task
def test_an_onnx_file_gives_the_answer_of_torch(name, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = ALL[name].net().eval()
    # The export compares them as well, at other batch sizes and other sizes of the image.
    path = sffx.export_onnx(net, tmp_path / "net.onnx", dynamic_size=name == "pixels")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x, _ = ALL[name].batch(6)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x), rtol=1e-4, atol=1e-5)


@every_task
def test_a_plan_is_drawn(name):
    plan = ALL[name].net().plan
    assert "block_0" in block_graph(plan).source
    assert plan.task.count_in_words(plan.num_classes) in page(plan)


@pytest.mark.sampled(3)
@every_task
def test_the_policy_memory_keeps_the_budget(name):
    case = ALL[name]
    whole = sffx.footprint(case.net(), 16)
    net = sffx.transform(
        case.model(), sffx.policies.memory(whole.peak, 16), case.batch(2)[0], task=case.task
    )
    assert sffx.footprint(net, 16).peak <= whole.peak


@every_task
def test_keywords_give_the_local_loss_and_the_answer(name):
    case = ALL[name]
    x, y = case.batch()
    torch.manual_seed(0)
    example = {"ids" if x.ndim == 2 else "input": x}
    net = sffx.transform(case.model(), case.policy, example, task=case.task, check=False)
    twin = copy.deepcopy(net).train()
    wrapped = sffx.KeywordLoss(net)
    trained = wrapped.train()(labels=y, **example)
    torch.testing.assert_close(trained["loss"], sffx.local_loss(twin, x, y))
    answered = wrapped.eval()(labels=y, **example)
    expected = sffx.evaluate(net, [(x, y)]).loss["ensemble"]
    torch.testing.assert_close(answered["logits"], net.eval()(x))
    with pytest.raises(sffx.InputError, match="has shape"):
        wrapped.eval()(labels=y[:-1], **example)
    assert float(answered["loss"].detach()) == pytest.approx(expected, rel=1e-5)


SMALL_OUTPUT = replace(CASES["pixels"], model=lambda: images(nn.Conv2d(6, 3, 1)))


@pytest.mark.parametrize("case", [*ALL.values(), SMALL_OUTPUT], ids=[*ALL, "small output"])
@pytest.mark.filterwarnings("ignore")  # of Lightning, on its own code and on small loaders
def test_lightning_reports_what_evaluate_reports(case):
    lightning = pytest.importorskip("lightning.pytorch")
    from sffx.lightning import SFFModule

    net = case.net()
    x, y = case.batch(6)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    (logged,) = trainer.validate(SFFModule(net), loader, verbose=False)
    evaluation = sffx.evaluate(net, loader)
    for key, figure in logged.items():
        metric, _, block = key.removeprefix("val_").partition("/")
        metrics = {"acc": evaluation.accuracy, "loss": evaluation.loss, **evaluation.metrics}
        assert figure == pytest.approx(metrics[metric][block or "ensemble"], rel=1e-4), key


class Mapped(nn.Module):
    """Returns what a model returns in a mapping, as models of torchvision do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.model(x)
        return {"aux": y * 2, "out": y}


@every_task
def test_the_module_of_backpropagation_has_the_loss_of_the_task(name):
    pytest.importorskip("lightning.pytorch")
    from sffx.lightning import BPModule

    case = ALL[name]
    model = case.model()
    x, y = case.batch()
    module = BPModule(Mapped(model) if name == "pixels" else model, task=case.task)
    torch.testing.assert_close(module.loss(x, y), case.loss(model(x), y))
    with pytest.raises(sffx.InputError, match="has shape"):
        module.loss(x, y[:-1])


@pytest.mark.parametrize("space", [1, 2, 3])
def test_the_module_of_backpropagation_validates_what_it_trains(space, monkeypatch):
    pytest.importorskip("lightning.pytorch")
    from sffx.lightning import BPModule

    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[space]
    module = BPModule(conv(2, 3, 1), task=tasks.Segmentation())
    logged: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(module, "log_dict", lambda metrics, **options: logged.update(metrics))
    side = (4,) * space
    batch = torch.randn(2, 2, *side), torch.randint(0, 3, (2, *side))
    module.validation_step(batch, 0)
    assert logged["val_loss"].item() == pytest.approx(module.loss(*batch).item())


def train_in_a_pipeline(rank: int) -> dict[str, Any]:
    found = {}
    for name, case in ALL.items():
        net = case.net()
        pipe = sffx.Pipeline(net, cuts=["block_1"])
        batches = [case.batch()] if pipe.first else None
        losses = pipe.train(batches, torch.optim.SGD(pipe.parameter_groups(1e-2)))
        found[name] = (losses, pipe.evaluate(batches))
    return found


def test_a_pipeline_has_the_losses_and_metrics_of_one_process(tmp_path):
    results = run(train_in_a_pipeline, 2, tmp_path)
    for name, case in ALL.items():
        net = case.net()
        x, y = case.batch()
        total = float(step(net, x, y))
        expected = sffx.evaluate(net, [(x, y)])
        for result in results:
            assert isinstance(result, dict), result
            losses, evaluation = result[name]
            assert sum(losses.values()) == pytest.approx(total), name
            assert evaluation.loss == pytest.approx(expected.loss), name
            for metric, values in expected.metrics.items():
                assert evaluation.metrics[metric] == pytest.approx(values), name


HEADS = [(name, head) for name in IGNORING for head in ("sff", "mlp(6)", "cosine")]


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("name", "head"), [*HEADS, ("pixels", "cwc"), ("next token", "shared")])
@pytest.mark.parametrize("classes", [1024, 2])
def test_a_batch_of_nothing_but_ignored_positions_gives_zero(name, head, classes, monkeypatch):
    # With as few as 2 classes the loss takes the way of a large vocabulary.
    for module in ("entropy", "squares"):
        monkeypatch.setattr(f"sffx.kernels.{module}.MANY_CLASSES", classes)
    net = CASES[name].net(goodness=head).train()
    x, y = CASES[name].batch()
    nothing = torch.full_like(y, IGNORED)
    at_once = sffx.sff_loss(net(x), nothing, task=net.plan.task)
    at_once.backward()
    losses = [
        at_once,
        sffx.local_loss(net, x, nothing),
        *sffx.block_losses(net, x, nothing).values(),
    ]
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())
    before = copy.deepcopy(net.state_dict())
    losses.append(sffx.local_step(net, x, nothing, sgd(net)))
    assert all(loss == 0 for loss in losses)
    for name, value in net.named_parameters():
        assert torch.equal(value, before[name]), name
    assert set(sffx.evaluate(net, [(x, nothing)]).loss.values()) == {0.0}
