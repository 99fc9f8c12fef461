"""The Lightning modules against plain loops.

A Trainer adds nothing to the arithmetic and loses nothing over an interruption.
"""

from __future__ import annotations

import copy
import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.data import DataLoader, TensorDataset

import sffx
from sffx.plots.history import epochs
from tests.toys import Residual, kept

pytest.importorskip("sklearn")
lightning = pytest.importorskip("lightning.pytorch")

from sffx.lightning import BPModule, SFFModule  # noqa: E402 (needs lightning)

pytestmark = [
    # Lightning's own call to a part of torch that torch has since deprecated.
    pytest.mark.filterwarnings(
        "ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"
    ),
    # The data sets are tensors in memory, which worker processes would only slow down.
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    # The epochs are a few steps long, and some have no validation, on purpose.
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings(
        "ignore:You defined a `validation_step` but have no `val_dataloader`"
    ),
]

OPTIONS: dict[str, Any] = {"lr": 3e-3, "classifier_lr": 1e-2, "weight_decay": 0.05}
BLOCKS = ["block_0", "block_1", "block_2"]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """240 handwritten digits, (240, 3, 8, 8)."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:240], dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return x.expand(-1, 3, -1, -1).contiguous(), torch.tensor(labels[:240])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small gain nothing from threads, and wait for them where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@kept
def cut_model(dropout: float = 0.2) -> fx.GraphModule:
    torch.manual_seed(0)
    model = Residual(classes=10)
    model.drop.p = dropout
    return sffx.transform(model, example_input=torch.zeros(1, 3, 8, 8))


def batches(digits: tuple[Tensor, Tensor], size: int) -> DataLoader:
    return DataLoader(TensorDataset(*digits), batch_size=size)


def trainer(folder: Path, **options: Any) -> Any:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    chosen = {"num_sanity_val_steps": 0, **quiet, **options}
    return lightning.Trainer(accelerator="cpu", default_root_dir=folder, **chosen)


def train_plainly(
    net: nn.Module, groups: Any, loss_of: Any, loader: DataLoader, clip: float | None = None
) -> nn.Module:
    optimizer = torch.optim.AdamW(groups, weight_decay=OPTIONS["weight_decay"])
    net.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss_of(net, x, y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    return net


def train_locally(net: fx.GraphModule, loader: DataLoader, clip: float | None = None) -> nn.Module:
    return train_plainly(
        net,
        sffx.parameter_groups(net, OPTIONS["lr"], OPTIONS["classifier_lr"]),
        sffx.local_loss,
        loader,
        clip,
    )


def assert_same_state(
    found: nn.Module, expected: nn.Module, start: nn.Module, **tolerance: float
) -> None:
    torch.testing.assert_close(
        found.state_dict(), expected.state_dict(), **{"rtol": 0, "atol": 0, **tolerance}
    )
    moved = [
        not torch.equal(p, q) for p, q in zip(found.parameters(), start.parameters(), strict=True)
    ]
    assert all(moved)


def test_numbers_of_numpy_in_a_checkpoint_can_be_read_again(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    rate = np.logspace(-4, -3, 3)[1]
    module = SFFModule(cut_model(), lr=rate, classifier_lr=np.float32(0.5))
    fitted = trainer(tmp_path, max_steps=1)
    fitted.fit(module, batches(digits, 80))
    fitted.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = sffx.load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint.rates == {
        "block_0": rate,
        "block_1": rate,
        "block_2": rate,
        "classifier": 0.5,
    }
    assert checkpoint.more["hyper_parameters"]["lr"] == rate


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_trainer_trains_as_a_plain_loop_does(
    digits: tuple[Tensor, Tensor], tmp_path: Path, clip: float | None
) -> None:
    net = cut_model()
    loader = batches(digits, 80)
    start = copy.deepcopy(net)
    torch.manual_seed(1)  # of the dropout
    expected = train_locally(copy.deepcopy(net), loader, clip)
    torch.manual_seed(1)
    trainer(tmp_path, max_epochs=1, gradient_clip_val=clip).fit(SFFModule(net, **OPTIONS), loader)
    assert_same_state(net, expected, start)


def test_two_accumulated_half_batches_are_one_batch(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    x, y = digits[0].double(), digits[1]
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )  # no BN, no dropout
    net = sffx.transform(nn.Sequential(*layers).double(), "layer", example_input=x[:1])
    start = copy.deepcopy(net)
    expected = train_locally(copy.deepcopy(net), batches((x, y), 120))
    trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(
        SFFModule(net, **OPTIONS), batches((x, y), 60)
    )
    assert_same_state(net, expected, start, rtol=1e-9, atol=1e-12)


def test_backpropagation_is_the_plain_loop_too(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = Residual(classes=10)
    loader = batches(digits, 80)
    start = copy.deepcopy(net)
    twin = copy.deepcopy(net)
    torch.manual_seed(1)
    groups = [{"params": twin.parameters(), "lr": 3e-3}]
    expected = train_plainly(twin, groups, lambda model, x, y: F.cross_entropy(model(x), y), loader)
    torch.manual_seed(1)
    module = BPModule(net, lr=3e-3, weight_decay=OPTIONS["weight_decay"], plateau={"patience": 3})
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, loader, loader)
    assert_same_state(net, expected, start)
    assert set(run.callback_metrics) == {"train_loss", "val_loss", "val_acc", "lr/model"}


def test_the_logs_are_what_evaluate_says(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    net = cut_model()
    validation = batches((digits[0][:100], digits[1][:100]), 64)  # the second batch is smaller
    logger = lightning.loggers.CSVLogger(tmp_path, name="logs", version="")
    module = SFFModule(net, **OPTIONS, plateau={"patience": 3})
    run = trainer(tmp_path, max_epochs=1, logger=logger, log_every_n_steps=1)
    run.fit(module, batches(digits, 80), validation)

    readouts = [*BLOCKS, "last", "classifier"]
    validated = {
        "val_loss",
        "val_acc",
        *(f"{metric}/{name}" for metric in ("val_loss", "val_acc") for name in readouts),
    }
    rates = {f"lr/{name}": OPTIONS["lr"] for name in BLOCKS} | {
        "lr/classifier": OPTIONS["classifier_lr"]
    }
    assert set(run.callback_metrics) == {"train_loss", *validated, *rates}

    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    evaluation = sffx.evaluate(net, validation)
    accuracy = evaluation.accuracy
    loss = evaluation.loss
    for name in readouts:
        assert logged[f"val_acc/{name}"] == pytest.approx(accuracy[name], abs=1e-6)
        assert logged[f"val_loss/{name}"] == pytest.approx(loss[name], rel=1e-5)
    assert logged["val_acc"] == pytest.approx(accuracy["ensemble"], abs=1e-6)
    assert logged["val_loss"] == pytest.approx(loss["ensemble"], rel=1e-5)
    assert {name: logged[name] for name in rates} == pytest.approx(rates)
    with open(tmp_path / "logs" / "metrics.csv") as file:
        assert validated | set(rates) | {"train_loss"} <= set(next(csv.reader(file)))
    assert net.training  # as it was before


def test_a_checkpoint_and_the_log_hold_what_a_drawing_shows(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    net = cut_model()
    validation = batches((digits[0][:100], digits[1][:100]), 64)
    logger = lightning.loggers.CSVLogger(tmp_path, name="logs", version="")
    run = trainer(tmp_path, max_epochs=2, logger=logger)
    run.fit(SFFModule(net, **OPTIONS), batches(digits, 80), validation)
    run.save_checkpoint(tmp_path / "last.ckpt")

    evaluation = sffx.evaluate(net, validation)
    rates = dict.fromkeys(BLOCKS, OPTIONS["lr"]) | {"classifier": OPTIONS["classifier_lr"]}
    checkpoint = sffx.load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint.accuracy == pytest.approx(evaluation.accuracy, abs=1e-6)
    assert checkpoint.rates == pytest.approx(rates)
    assert checkpoint.cut == net.plan.record()
    first, second = epochs(tmp_path / "logs" / "metrics.csv")
    assert second.accuracy == pytest.approx(evaluation.accuracy, abs=1e-6)
    assert second.loss == pytest.approx(evaluation.loss, rel=1e-5)
    assert (first.number, second.number, second.lr) == (0, 1, pytest.approx(rates))


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    # Nothing counts as an improvement, so each rate falls after the second epoch without one. The
    # run is interrupted before that epoch.
    plateau = {"factor": 0.1, "patience": 1, "threshold": 100.0, "threshold_mode": "abs"}
    loader = batches(digits, 120)
    size = 3

    def fit(epochs: int, ckpt_path: Path | None = None) -> tuple[SFFModule, Any]:
        # Lightning's checkpoints do not hold the random state of dropout.
        module = SFFModule(cut_model(dropout=0.0), **OPTIONS, plateau=plateau)
        run = trainer(tmp_path, max_epochs=epochs)
        run.fit(module, loader, loader, ckpt_path=ckpt_path)
        return module, run

    whole, _ = fit(size)
    fit(size - 1)[1].save_checkpoint(tmp_path / "half.ckpt")
    resumed, run = fit(size, tmp_path / "half.ckpt")

    assert run.current_epoch == size
    assert resumed.plateau.state_dict() == whole.plateau.state_dict()
    rates = {group["name"]: group["lr"] for group in resumed.optimizers().param_groups}
    assert rates == pytest.approx(
        {**dict.fromkeys(BLOCKS, OPTIONS["lr"] / 10), "classifier": OPTIONS["classifier_lr"] / 10}
    )
    assert_same_state(resumed.net, whole.net, cut_model())


def test_only_the_epochs_of_training_step_the_plateau(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    loader = batches(digits, 120)
    module = SFFModule(cut_model(), plateau={"patience": 5})
    # A Trainer makes two steps of validation as a sanity check by default.
    run = trainer(tmp_path, max_epochs=1, num_sanity_val_steps=2)
    run.fit(module, loader, loader)
    run.validate(module, loader, verbose=False)
    assert {state["last_epoch"] for state in module.plateau.state_dict().values()} == {1}


def test_predictions_are_the_scores_of_the_ensemble(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    net = cut_model()
    run = trainer(tmp_path)
    pairs = torch.cat(run.predict(SFFModule(net), batches(digits, 100)))
    alone = torch.cat(run.predict(SFFModule(net), DataLoader(digits[0], batch_size=100)))
    inputs = DataLoader(TensorDataset(digits[0]), batch_size=100)
    in_lists = torch.cat(run.predict(SFFModule(net), inputs))
    with torch.no_grad():
        expected = net.eval()(digits[0])
    assert pairs.shape == (240, 10)
    torch.testing.assert_close(pairs, expected)
    torch.testing.assert_close(alone, expected)
    torch.testing.assert_close(in_lists, expected)


def test_a_checkpoint_brings_weights_and_options_back(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    module = SFFModule(cut_model(), **OPTIONS, plateau={"patience": 2})
    run = trainer(tmp_path, max_steps=1)
    run.fit(module, batches(digits, 120), batches(digits, 120))
    run.save_checkpoint(tmp_path / "net.ckpt")
    loaded = SFFModule.load_from_checkpoint(tmp_path / "net.ckpt", net=cut_model())
    torch.testing.assert_close(loaded.net.state_dict(), module.net.state_dict(), rtol=0, atol=0)
    assert dict(loaded.hparams) == {**OPTIONS, "plateau": {"patience": 2}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: SFFModule(Residual()),
            "net is a Residual, not a cut model. Hint: pass what sffx.transform returned",
        ),
        (
            lambda: BPModule(cut_model()),
            "net is a cut model. Hint: pass the model that it was cut from, or use SFFModule",
        ),
        (
            lambda: SFFModule(cut_model()).training_step(torch.zeros(2, 3, 8, 8), 0),
            "the loader yielded a Tensor, not a pair",
        ),
        (lambda: SFFModule(cut_model(), lr="1e-3"), "lr is '1e-3'. Hint: "),
        (lambda: SFFModule(cut_model(), classifier_lr=-1), "classifier_lr is -1. Hint: "),
        (lambda: SFFModule(cut_model(), weight_decay=None), "weight_decay is None. Hint: "),
        (lambda: SFFModule(cut_model(), plateau=3), "plateau is 3. Hint: "),
        (lambda: BPModule(Residual(), lr=float("nan")), "lr is nan. Hint: "),
    ],
)
def test_what_cannot_be_trained_is_refused(make: Any, message: str) -> None:
    with pytest.raises(sffx.InputError) as caught:
        make()
    assert str(caught.value).startswith(message)


def test_a_plateau_without_validation_is_refused(digits: tuple[Tensor, Tensor]) -> None:
    """It would never be stepped, and nobody would be told."""
    x, y = digits
    loader = DataLoader(TensorDataset(x[:8], y[:8]), 4)
    trainer = lightning.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    with pytest.raises(sffx.InputError, match=r"there is no validation\. Hint: "):
        trainer.fit(SFFModule(cut_model(), plateau={"patience": 1}), loader)


class OwnOptimizer(SFFModule):
    """Has an optimizer of its own, whose groups have no names."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        first, *others = [group["params"] for group in self.groups()]
        rest = [p for params in others for p in params]
        return torch.optim.SGD([{"params": first}, {"params": rest, "lr": 0.2}], lr=0.1)


def test_an_optimizer_of_ones_own_logs_its_rates(
    digits: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    loader = batches((digits[0][:8], digits[1][:8]), 4)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(OwnOptimizer(cut_model()), loader, loader)
    rates = {key: float(rate) for key, rate in run.callback_metrics.items() if "lr/" in key}
    assert rates == pytest.approx({"lr/group_0": 0.1, "lr/group_1": 0.2})
    with pytest.raises(sffx.InputError, match=r"plateau is given, but .*Hint: self\.plateau = "):
        trainer(tmp_path, max_epochs=1).fit(
            OwnOptimizer(cut_model(), plateau={"patience": 1}), loader, loader
        )


@pytest.fixture
def without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "sffx.lightning")


def test_without_lightning_the_extra_is_named(without_lightning: None) -> None:
    with pytest.raises(sffx.MissingExtra, match=r"pip install 'sffx\[lightning\]'"):
        importlib.import_module("sffx.lightning")


@pytest.mark.parametrize("name", ["pixels", "regression", "next token"])
def test_other_tasks_log_what_evaluate_reports(name: str, tmp_path: Path) -> None:
    from tests.tasks.cases import CASES

    net = CASES[name].net()
    loader = DataLoader(TensorDataset(*CASES[name].batch(6)), batch_size=4)
    expected = sffx.evaluate(net, loader)
    run = trainer(tmp_path)
    module = SFFModule(net)
    run.validate(module, loader, verbose=False)
    for metric, values in expected.metrics.items():
        assert float(run.callback_metrics[f"val_{metric}"]) == pytest.approx(values["ensemble"])
        of_block = run.callback_metrics[f"val_{metric}/block_0"]
        assert float(of_block) == pytest.approx(values["block_0"])
    assert float(run.callback_metrics["val_loss"]) == pytest.approx(expected.loss["ensemble"])
    trainer(tmp_path, max_epochs=1).fit(module, loader, loader)


@pytest.mark.parametrize("name", ["pixels", "next token"])
def test_a_batch_in_which_no_position_counts_has_no_weight(name: str, tmp_path: Path) -> None:
    from tests.tasks.cases import CASES

    net = CASES[name].net()
    x, y = CASES[name].batch(6)
    y[4:] = net.plan.task.ignore_index
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    expected = sffx.evaluate(net, loader)
    run = trainer(tmp_path)
    run.validate(SFFModule(net), loader, verbose=False)
    logged = {key: float(figure) for key, figure in run.callback_metrics.items()}
    assert logged["val_loss"] == pytest.approx(expected.loss["ensemble"])
    assert logged["val_acc/block_0"] == pytest.approx(expected.accuracy["block_0"])


class Tagger(nn.Module):
    """Tags tokens; the mask of an encoder comes second."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = torch.relu(self.hidden(self.embed(input_ids)))
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.head(x)


@pytest.mark.parametrize("form", ["mapping", "tuple"])
def test_backpropagation_counts_the_tokens_that_local_learning_counts(form: str) -> None:
    torch.manual_seed(0)
    model = Tagger()
    tokens, y = torch.randint(0, 7, (4, 5)), torch.randint(0, 3, (4, 5))
    mask = (torch.arange(5) < torch.tensor([[5], [3], [2], [4]])).long()
    named = {"input_ids": tokens, "attention_mask": mask}
    x: Any = named if form == "mapping" else (tokens, mask)
    task = sffx.tasks.TokenClassification()
    net = sffx.transform(model, ["relu"], named, task=task)
    plain, local = BPModule(model, task=task), SFFModule(net)
    is_real = mask.bool()
    expected = F.cross_entropy(model(**named)[is_real], y[is_real])
    assert torch.equal(plain.loss(x, y), expected)
    assert torch.equal(plain.without_padding(x, y), local.without_padding(x, y))
    assert torch.equal(plain.without_padding(tokens, y), y)


class Exits(nn.Module):
    """Returns the logits of two layers, or says which of them are its logits."""

    def __init__(self, *, named: bool) -> None:
        super().__init__()
        self.first, self.second, self.named = nn.Linear(4, 3), nn.Linear(4, 3), named

    def forward(self, x: Tensor) -> Any:
        logits, other = self.second(x), self.first(x)
        return {"other": other, "logits": logits} if self.named else [other, logits]


def test_backpropagation_does_not_guess_which_of_several_exits_is_meant() -> None:
    x, y = torch.randn(2, 4), torch.tensor([0, 2])
    with pytest.raises(sffx.InputError, match=r"2 values of shape \(2, 3\).*Hint: pass a wrapper"):
        BPModule(Exits(named=False)).loss(x, y)
    model = Exits(named=True)
    expected = F.cross_entropy(model.second(x), y)
    assert torch.equal(BPModule(model).loss(x, y), expected)
