"""Checkpoints: what is saved comes back, and what cannot be understood is refused by name."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.checkpoint.content import FIRST_BLOCK
from sffx.errors import InputError
from tests import toys
from tests.toys import kept

EXAMPLE = torch.zeros(1, 3, 8, 8)
ACCURACY = {"block_0": 0.5, "block_1": 0.75, "classifier": 1.0, "ensemble": 0}
GROUPS = [
    {"name": "block_0", "lr": 1e-4, "params": [0]},
    {"name": "block_1", "lr": 1e-2, "params": [1]},
]
# All that the file of a bare state dict does not record.
OPTIONS = {"policy": "residual", "example_input": EXAMPLE, "goodness": "sff", "norm": "layer"}


def plain(classes: int = 5) -> nn.Module:
    return toys.Residual(classes=classes)


@kept
def trained(policy: Any = "residual", **options: Any) -> fx.GraphModule:
    """Return a cut model whose statistics have seen a batch, in eval mode."""
    torch.manual_seed(0)
    net = sffx.transform(plain(), policy, EXAMPLE, **options)
    net(torch.randn(16, 3, 8, 8))
    return net.eval()


def assert_same(found: fx.GraphModule, net: fx.GraphModule) -> None:
    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(found.eval()(x), net.eval()(x))
    assert found.plan == net.plan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.pt"


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_everything_that_is_saved_comes_back(path: Path) -> None:
    net = trained("stages(2)")
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=1e-3, classifier_lr=1e-4))
    sffx.local_loss(net.train(), torch.randn(4, 3, 8, 8), torch.arange(4)).backward()
    optimizer.step()
    more = {"epoch": 3, "rng": torch.get_rng_state(), "plateau": {"block_0": [1, 2.0, None]}}
    assert sffx.save_checkpoint(path, net, optimizer, ACCURACY, **more) == path

    checkpoint = sffx.load_checkpoint(path)
    assert checkpoint.accuracy == ACCURACY
    assert checkpoint.cut == net.plan.record()
    assert checkpoint.rates == {"block_0": 1e-3, "block_1": 1e-3, "classifier": 1e-4}
    assert set(checkpoint.versions) == {"sffx", "torch"}
    assert checkpoint.more.keys() == more.keys()
    assert torch.equal(checkpoint.more["rng"], more["rng"])
    assert checkpoint.more["plateau"] == more["plateau"]

    other = checkpoint.net(plain())
    resumed = torch.optim.AdamW(sffx.parameter_groups(other, lr=1.0))
    resumed.load_state_dict(checkpoint.optimizer)
    assert_same(other, net)
    found, expected = resumed.state_dict(), optimizer.state_dict()
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("stages(2)", {"kernel_size": 3}),
        ("residual", {"norm": "none", "goodness": "cwc"}),
        ("layer", {"goodness": "cosine(4)"}),
        ("residual", {"goodness": "mlp(64)"}),
        ("residual", {"goodness": "mlp(64, 3)"}),
    ],
    ids=["kernels of 3", "CwC without norms", "cosine", "hidden layer", "3 x 3 regions"],
)
def test_the_model_is_cut_as_it_was(policy: str, options: dict[str, Any], path: Path) -> None:
    net = trained(policy, **options)
    sffx.save_checkpoint(path, net)
    assert_same(sffx.load_checkpoint(path).net(plain()), net)


def test_places_of_a_policy_of_one_s_own_are_kept(path: Path) -> None:
    def second_half(analysis: Any) -> list[str]:
        return [sffx.plan(plain(), "residual", EXAMPLE).blocks[1].output]

    net = trained(second_half)
    sffx.save_checkpoint(path, net)
    assert_same(sffx.load_checkpoint(path).net(plain()), net)
    assert net.plan.policy == "second_half"


def test_weights_of_blocks_come_back(path: Path) -> None:
    net = trained()
    sffx.weigh(net, [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)])
    sffx.save_checkpoint(path, net)
    found = sffx.load_checkpoint(path).net(plain())
    assert found.readout.mode == "weighted"
    assert_same(found, net)


@pytest.mark.parametrize("mode", ["last", "classifier", "ensemble"])
def test_the_readout_comes_back(path: Path, mode: Any) -> None:
    net = trained()
    sffx.weigh(net, [(torch.randn(8, 3, 8, 8), torch.arange(8) % 5)])
    net.readout.mode = mode
    sffx.save_checkpoint(path, net)
    assert_same(sffx.load_checkpoint(path).net(plain()), net)


@kept
def table() -> fx.GraphModule:
    """Return a cut model with a buffer that is not saved."""
    return sffx.transform(Table(), "layer", torch.zeros(1, 6))


class Table(nn.Sequential):
    """Adds a buffer that is not saved, and is computed anew."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
        self.register_buffer("table", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_come_back(path: Path, dtype: torch.dtype) -> None:
    net = table().to(dtype).eval()
    sffx.save_checkpoint(path, net)
    found = sffx.load_checkpoint(path).net(Table()).eval()
    x = torch.randn(3, 6, dtype=dtype)
    torch.testing.assert_close(found(x), net(x), rtol=0, atol=0)
    assert sffx.extract(found).table.dtype == dtype


def test_single_layers_keep_their_dtypes(path: Path) -> None:
    net = trained("stages(2)")
    net.get_submodule("head_0").double()
    sffx.save_checkpoint(path, net)
    found = sffx.load_checkpoint(path).net(plain())
    dtypes = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in found.state_dict().items()} == dtypes
    assert torch.float64 in dtypes.values()


def test_a_model_on_the_meta_device_is_refused(path: Path) -> None:
    sffx.save_checkpoint(path, trained())
    with torch.device("meta"):
        model = plain()
    with pytest.raises(
        sffx.InputError, match=r"stem\.0\.weight of the model is on the meta device"
    ):
        sffx.load_checkpoint(path).net(model)


def test_a_path_of_bytes_is_a_path(path: Path) -> None:
    assert sffx.save_checkpoint(str(path).encode(), plain()) == path


def test_a_plain_model_has_no_cut(path: Path) -> None:
    torch.manual_seed(0)
    model = plain()
    sffx.save_checkpoint(path, model, accuracy={"model": 0.5})
    checkpoint = sffx.load_checkpoint(path)
    assert (checkpoint.cut, checkpoint.optimizer) == (None, None)
    other = plain()
    other.load_state_dict(checkpoint.state)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    with pytest.raises(sffx.InputError, match=r"holds no weights of a cut model, but stem\.0\."):
        checkpoint.net(plain())


def test_names_of_a_plain_model_are_left_as_they_are(path: Path) -> None:
    layers = OrderedDict(head=nn.Linear(1, 1), block_0=nn.Linear(1, 1))
    model = nn.Sequential(OrderedDict(features=nn.Sequential(layers), last=nn.Linear(1, 1)))
    sffx.save_checkpoint(path, model)
    assert any(FIRST_BLOCK in name for name in model.state_dict())
    assert list(sffx.load_checkpoint(path).state) == list(model.state_dict())


# torch.compile imports parts of torch that torch has since deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_saved_without_its_wrapper(path: Path) -> None:
    net = trained()
    sffx.save_checkpoint(path, torch.compile(net))
    assert_same(sffx.load_checkpoint(path).net(plain()), net)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: state,
        lambda state: {"model": state, "epoch": 3},
        lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}},
    ],
    ids=["a state dict", "a checkpoint of a script", "a checkpoint of Lightning over DDP"],
)
def test_weights_of_others_need_the_options(wrapped: Any, path: Path) -> None:
    net = trained()
    checkpoint = sffx.load_checkpoint(saved(path, wrapped(net.state_dict())))
    assert_same(checkpoint.net(plain(), **OPTIONS), net)
    for name in OPTIONS:
        given = {key: value for key, value in OPTIONS.items() if key != name}
        with pytest.raises(sffx.InputError, match=rf"Hint: pass {name}=\.\.\. as in the training"):
            checkpoint.net(plain(), **given)
    with pytest.raises(
        sffx.InputError,
        match=r"'.*run\.pt' does not record all of how its model was cut\. "
        r"Hint: pass policy=\.\.\., example_input=\.\.\., goodness=\.\.\., norm=\.\.\. "
        r"as in the training; sffx\.save_checkpoint records them",
    ):
        checkpoint.net(plain())


def pooled(block: sffx.Block, num_classes: int) -> nn.Module:
    """Return a goodness of one's own: a linear layer on the mean over space."""
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(block.channels, num_classes))


def batch_free(block: sffx.Block) -> nn.Module:
    """Return a norm of one's own."""
    return nn.InstanceNorm2d(block.channels)


def test_a_goodness_of_one_s_own_must_be_passed_again(path: Path) -> None:
    net = trained(goodness=pooled, norm=batch_free)
    sffx.save_checkpoint(path, net)
    checkpoint = sffx.load_checkpoint(path)
    assert_same(checkpoint.net(plain(), goodness=pooled, norm=batch_free), net)
    with pytest.raises(
        sffx.InputError,
        match=r"Hint: pass norm=tests\.test_checkpoint\.batch_free as in the training",
    ):
        checkpoint.net(plain(), goodness=pooled)


def test_options_win_over_the_record(path: Path) -> None:
    net = trained()
    sffx.save_checkpoint(path, net)
    found = sffx.load_checkpoint(path).net(plain(), example_input=torch.zeros(1, 3, 16, 16))
    assert found.plan.inputs[0].shape == (3, 16, 16)
    assert [block.output for block in found.plan] == [block.output for block in net.plan]


def test_states_of_optimizers_of_lightning_are_read(path: Path) -> None:
    state = {"state": {}, "param_groups": [*GROUPS, {"lr": 1.0, "params": [2]}]}
    content = {"optimizer_states": [state], "sffx_accuracy": ACCURACY}
    checkpoint = sffx.load_checkpoint(saved(path, content))
    assert checkpoint.rates == {"block_0": 1e-4, "block_1": 1e-2}
    assert (checkpoint.state, checkpoint.more) == ({}, {})
    with pytest.raises(sffx.InputError, match="no weights of a cut model, but none at all"):
        checkpoint.net(plain())


def test_runs_from_one_checkpoint_begin_alike(path: Path) -> None:
    net = trained("stages(2)").train()
    optimizer = torch.optim.AdamW(sffx.parameter_groups(net, lr=0.1))
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    sffx.local_step(net, x, y, optimizer)
    sffx.save_checkpoint(path, net, optimizer)
    checkpoint = sffx.load_checkpoint(path)
    ends = []
    for _ in range(2):
        again = checkpoint.net(plain()).train()
        resumed = torch.optim.AdamW(sffx.parameter_groups(again, lr=0.1))
        resumed.load_state_dict(checkpoint.optimizer)
        torch.manual_seed(0)  # of the dropout
        for _ in range(2):
            sffx.local_step(again, x, y, resumed)
        ends.append((again.state_dict(), resumed.state_dict()["state"]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_an_entry_of_one_s_own_stays_whatever_its_name(path: Path) -> None:
    """Names that mean something in the files of others, and what a file without weights has."""
    names = ("state_dict", "model_state_dict", "model", "optimizer_states")
    more: dict[str, Any] = {name: [{"lr": 1.0}] for name in names}
    sffx.save_checkpoint(path, trained("stages(2)"), **more)
    checkpoint = sffx.load_checkpoint(path)
    assert checkpoint.more == more
    assert checkpoint.optimizer is None


@cache
def plan_of_plain() -> sffx.BlockPlan:
    """Return one plan for all records, since they are made while the tests are collected."""
    return sffx.plan(plain(), example_input=EXAMPLE)


def record(**changes: Any) -> dict[str, Any]:
    """Return the record of a cut, with entries changed; an entry that is None is left out."""
    changed = {**plan_of_plain().record(), **changes}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"sffx_cut": "residual"}, "the entry 'sffx_cut' is a str, not a mapping"),
        ({"sffx_cut": record(after=None)}, "lacks 'after', the names of the nodes after which"),
        ({"sffx_cut": record(after=["a", 1])}, r"has \['a', 1\] for 'after', not the names of"),
        ({"sffx_cut": record(after=[])}, r"has \[\] for 'after'"),
        ({"sffx_cut": record(inputs=None)}, "lacks 'inputs', the shape and the dtype of each"),
        ({"sffx_cut": record(inputs={"x": [3, 8, 8]})}, "for 'inputs', not the shape"),
        (
            {"sffx_cut": record(inputs={"x": {"shape": [3, 0], "dtype": "float32"}})},
            "for 'inputs', not the shape",
        ),
        (
            {"sffx_cut": record(inputs={"x": {"shape": [3], "dtype": "load"}})},
            "for 'inputs', not the shape",
        ),
        ({"sffx_cut": record(num_classes="5")}, "has '5' for 'num_classes', not the number"),
        ({"sffx_cut": record(goodness=1)}, "has 1 for 'goodness', not the name of a goodness"),
        ({"sffx_cut": record(kernel_size=0)}, "has 0 for 'kernel_size'"),
        ({"sffx_cut": record(norm=["layer"])}, "for 'norm', not the name of a norm"),
        ({"sffx_cut": record(custom=["loss"])}, r"has \['loss'\] for 'custom', not which of"),
        ({"sffx_cut": record(policy=3)}, "has 3 for 'policy', not the name of a policy"),
        ({"sffx_accuracy": [0.5]}, "the entry 'sffx_accuracy' is a list, not accuracies by name"),
        ({"sffx_accuracy": {"block_0": 50.0}}, "has 50.0 for 'block_0', not an accuracy between"),
        ({"optimizer": [1]}, "the entry 'optimizer' is a list, not a state dict"),
        (
            {"optimizer": {"param_groups": [3]}},
            r"the entry 'optimizer' has \[3\] as its 'param_groups'",
        ),
        ({"sffx_cut": record(custom=[["norm"]])}, r"has \[\['norm'\]\] for 'custom', not which of"),
        ({"sffx_versions": 3}, "the entry 'sffx_versions' is 3, not versions by the package's"),
        ({"sffx_versions": {"torch": 2}}, "'sffx_versions' is {'torch': 2}, not versions by"),
        (
            {"sffx_layers": ["ReLU()"]},
            r"'sffx_layers' is \['ReLU\(\)'\], not layers by their",
        ),
        ({"sffx_calls": {"0": "relu"}}, "the entry 'sffx_calls' is {'0': 'relu'}, not a list of"),
        (torch.zeros(2), "holds a Tensor, not weights by name"),
        ([1, 2], "holds a list, not weights by name"),
    ],
)
def test_an_entry_that_is_wrong_is_named(content: Any, message: str, path: Path) -> None:
    with pytest.raises(sffx.InputError, match=rf"run\.pt'.*{message}.*Hint: "):
        sffx.load_checkpoint(saved(path, content))


class Executed:
    """Writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_in_a_checkpoint_is_executed_unless_it_is_trusted(path: Path) -> None:
    mark = path.parent / "executed"
    saved(path, {"sffx_accuracy": ACCURACY, "other": Executed(mark)})
    with pytest.raises(sffx.InputError, match=r"holds Python objects.* run code.*Hint: .*trust"):
        sffx.load_checkpoint(path)
    assert not mark.exists()
    assert sffx.load_checkpoint(path, trust=True).accuracy == ACCURACY
    assert mark.exists()


@pytest.mark.parametrize("trust", [False, True])
def test_files_that_are_no_checkpoints_are_refused(path: Path, trust: bool) -> None:
    with pytest.raises(sffx.InputError, match=r"there is no file '.*run\.pt'"):
        sffx.load_checkpoint(path, trust=trust)
    with pytest.raises(sffx.InputError, match=r"is a folder. Hint: name the file in it"):
        sffx.load_checkpoint(path.parent, trust=trust)
    path.write_bytes(b"")
    with pytest.raises(sffx.InputError, match="it is empty, or ends too early"):
        sffx.load_checkpoint(path, trust=trust)
    path.write_text("not a checkpoint")
    with pytest.raises(sffx.InputError, match=r"run\.pt' is no checkpoint of torch"):
        sffx.load_checkpoint(path, trust=trust)


def test_a_whole_model_is_loaded_only_where_it_is_trusted(path: Path) -> None:
    net = trained()
    torch.save(net, path)
    with pytest.raises(sffx.InputError, match=r"run code that lies in it\. Hint: "):
        sffx.load_checkpoint(path)
    checkpoint = sffx.load_checkpoint(path, trust=True)
    assert_same(checkpoint.net(), net)
    with pytest.raises(sffx.InputError, match="so model, policy would be passed over"):
        checkpoint.net(plain(), policy="layer")
    torch.save(plain(), path)
    with pytest.raises(sffx.InputError, match=r"Residual, which is not cut\. Hint: "):
        sffx.load_checkpoint(path, trust=True).net()


def test_weights_of_another_model_or_cut_are_refused(path: Path) -> None:
    sffx.save_checkpoint(path, trained())
    checkpoint = sffx.load_checkpoint(path)
    with pytest.raises(
        sffx.InputError, match=r"of '.*run\.pt' do not fit Residual, cut by 'stages\(2\)': Missing"
    ):
        checkpoint.net(plain(), policy="stages(2)")
    with pytest.raises(sffx.InputError, match=r"size mismatch for block_0\.stem\.0\.weight"):
        checkpoint.net(toys.Residual(16, classes=5))
    with pytest.raises(sffx.InputError, match="num_classes is 5, but the model returns 4 logits"):
        checkpoint.net(plain(classes=4))
    with pytest.raises(sffx.InputError, match=r"weights without their model. Hint: pass the model"):
        checkpoint.net()


def _without_end() -> list[Any]:
    """Return a list that holds itself."""
    own: list[Any] = [1]
    own.append((own,))
    return own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"accuracy": {"block_0": 93.0}}, "has 93.0 for 'block_0', not an accuracy between"),
        ({"folder": Path()}, "the entry 'folder' holds Python objects"),
        ({"callback": lambda: None}, "the entry 'callback' holds Python objects"),
        ({"history": _without_end()}, "the entry 'history' holds itself"),
        ({"by_name": {"all": _without_end()}}, "the entry 'by_name' holds itself"),
        ({"sffx_cut": {}}, "save_checkpoint writes the entry 'sffx_cut' itself"),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(
    arguments: dict[str, Any], message: str, path: Path
) -> None:
    path.write_text("an older file")
    with pytest.raises(sffx.InputError, match=message):
        sffx.save_checkpoint(path, trained(), **arguments)
    assert path.read_text() == "an older file"


def test_numbers_of_numpy_can_be_read_again(path: Path) -> None:
    task = sffx.tasks.Segmentation(ignore_index=np.int64(255))
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 1))
    net = sffx.transform(
        model, "layer", EXAMPLE, num_classes=np.int64(5), kernel_size=np.int64(3), task=task
    )
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, np.float64(0.1)), momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: np.cos(epoch / 9))
    optimizer.step()
    schedule.step()
    accuracy = {"block_0": np.float32(0.5), "classifier": np.float64(0.25)}
    sffx.save_checkpoint(path, net, optimizer, accuracy, losses=[np.float32(2), {"n": np.int64(3)}])
    checkpoint = sffx.load_checkpoint(path)
    assert checkpoint.rates == {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert checkpoint.accuracy == accuracy
    assert checkpoint.more == {"losses": [2.0, {"n": 3}]}
    assert checkpoint.net(model).plan.task == net.plan.task


class Noted(nn.Linear):
    """Adds something to the state dict."""

    note: Any = None

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


def test_the_state_that_a_module_adds_is_saved_or_refused(path: Path) -> None:
    model = nn.Sequential(Noted(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    net = sffx.transform(model, "layer", torch.zeros(1, 4))
    (noted,) = (module for module in net.modules() if isinstance(module, Noted))
    noted.note = {"scale": np.float32(0.5), "history": torch.arange(3)}
    sffx.save_checkpoint(path, net)
    again = sffx.load_checkpoint(path).net(model)
    (found,) = (module for module in again.modules() if isinstance(module, Noted))
    assert found.note["scale"] == 0.5
    assert found.note["history"].tolist() == [0, 1, 2]
    options = {**OPTIONS, "policy": "layer", "example_input": torch.zeros(1, 4)}
    alone = path.with_name("weights.pt")
    torch.save({f"module.{name}": value for name, value in again.state_dict().items()}, alone)
    found = sffx.load_checkpoint(alone, trust=True).net(model, **options)
    (found,) = (module for module in found.modules() if isinstance(module, Noted))
    assert found.note["history"].tolist() == [0, 1, 2]
    noted.note = Path()
    with pytest.raises(sffx.InputError, match=r"the state 'block_0\..*' holds Python objects"):
        sffx.save_checkpoint(path, net)
    assert sffx.load_checkpoint(path).state


def test_an_optimizer_that_could_not_be_read_again_is_refused(path: Path) -> None:
    net = trained()
    optimizer = torch.optim.SGD(sffx.parameter_groups(net, 0.1))
    optimizer.param_groups[0]["rule"] = lambda: None
    with pytest.raises(sffx.InputError, match="the entry 'optimizer' holds Python objects"):
        sffx.save_checkpoint(path, net, optimizer)
    assert not path.exists()


@pytest.mark.parametrize("content", [{0: torch.zeros(1)}, {"net": {0: torch.zeros(1)}}])
def test_weights_without_names_are_refused(path: Path, content: Any) -> None:
    with pytest.raises(sffx.InputError, match=r"run\.pt': it holds 0 in the place of a weight's"):
        sffx.load_checkpoint(saved(path, content))


def test_a_save_that_fails_leaves_the_older_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("an older file")
    state = trained()

    def fail(content: Any, draft: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        sffx.save_checkpoint(path, state)
    assert path.read_text() == "an older file"
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(sffx.InputError, match=re.escape("nowhere")):
        sffx.save_checkpoint(path.parent / "nowhere" / "run.pt", state)


def test_tensors_are_on_the_cpu(path: Path) -> None:
    sffx.save_checkpoint(path, trained(), scale=torch.ones(1))
    checkpoint = sffx.load_checkpoint(path)
    tensors: list[Tensor] = [*checkpoint.state.values(), checkpoint.more["scale"]]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_a_checkpoint_in_which_one_bit_has_flipped_is_refused_or_the_same(tmp_path: Path) -> None:
    sffx.save_checkpoint(tmp_path / "net.pt", trained())
    whole = (tmp_path / "net.pt").read_bytes()
    expected = sffx.load_checkpoint(tmp_path / "net.pt")
    refused = 0
    for place in range(0, len(whole), len(whole) // 60):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        (tmp_path / "net.pt").write_bytes(changed)
        try:
            found = sffx.load_checkpoint(tmp_path / "net.pt")
        except InputError:
            refused += 1
            continue
        # Some bytes are padding.
        assert found.cut == expected.cut
        torch.testing.assert_close(found.state, expected.state, rtol=0, atol=0)
    assert refused > 20


def layers(second: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), second, nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))


@pytest.mark.parametrize(
    ("second", "note"),
    [
        (nn.ReLU(), ""),
        (nn.Tanh(), "1 was ReLU() and is Tanh()"),
    ],
)
def test_weights_of_a_model_with_another_layer_are_noted(
    second: nn.Module, note: str, tmp_path: Path
) -> None:
    x = torch.zeros(1, 5)
    sffx.save_checkpoint(tmp_path / "net.pt", sffx.transform(layers(nn.ReLU()), "layer", x))
    net = sffx.load_checkpoint(tmp_path / "net.pt").net(layers(second))
    of_layers = [each for each in net.plan.notes if "other layers" in each]
    assert [note in each for each in of_layers] == ([True] if note else [])


class Calls(nn.Module):
    """A model of functions, which weights of another one fit."""

    def __init__(self, inside: Callable[[Tensor], Tensor], join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)])
        self.inside = inside
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        x = self.join(x, self.inside(self.layers[1](x)))
        return self.layers[2](x)


def halves(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[:, :3], b[:, 3:]], dim=1)


def twice(x: Tensor) -> Tensor:
    return F.relu(F.relu(x))


@pytest.mark.parametrize(
    ("inside", "join", "note"),
    [
        (F.relu, torch.add, ""),
        (F.gelu, torch.add, "relu(-1, inplace=False) is gelu(-1) now"),
        (partial(F.leaky_relu, negative_slope=0.1), torch.add, "is leaky_relu(-1, "),
        (F.relu, torch.sub, "add(-3, -1) is sub(-3, -1) now"),
        (F.relu, lambda a, b: torch.add(b, a), "add(-3, -1) is add(-1, -3) now"),
        (F.relu, partial(torch.add, alpha=2), "add(-3, -1) is add(-3, -1, alpha=2) now"),
        (twice, torch.add, "relu was called 1x and is called 2x now"),
        (F.relu, halves, "cat was called 0x and is called 1x now"),
    ],
)
def test_weights_of_a_model_that_calls_other_functions_are_noted(
    inside: Any, join: Any, note: str, path: Path
) -> None:
    x = torch.zeros(1, 5)
    sffx.save_checkpoint(path, sffx.transform(Calls(F.relu, torch.add), ["layers_0"], x))
    checkpoint = sffx.load_checkpoint(path)
    notes = [each for each in checkpoint.net(Calls(inside, join)).plan.notes if "calls" in each]
    assert [note in each for each in notes] == ([True] if note else [])
    # An older file has no such entry.
    assert not replace(checkpoint, calls=None).net(Calls(inside, join)).plan.notes


def test_calls_that_another_torch_writes_with_other_arguments_are_the_same(path: Path) -> None:
    x = torch.zeros(1, 5)
    sffx.save_checkpoint(path, sffx.transform(Calls(F.relu, torch.add), ["layers_0"], x))
    content = torch.load(path)
    content["sffx_versions"]["torch"] = "2.0"
    content["sffx_calls"] = [each.replace("inplace=False", "") for each in content["sffx_calls"]]
    checkpoint = sffx.load_checkpoint(saved(path, content))
    assert not checkpoint.net(Calls(F.relu, torch.add)).plan.notes
    assert "gelu" in str(checkpoint.net(Calls(F.gelu, torch.add)).plan.notes)


def test_the_name_of_the_recorded_objective_keeps_its_options(tmp_path: Path) -> None:
    """Labels of "waves" were predicted with labels in pixels, without a word."""
    objective = sffx.objectives.ForwardForward(labels="waves", reduction="mean")
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    net = sffx.transform(model, "layer", torch.zeros(2, 1, 8, 8), objective=objective, check=False)
    sffx.save_checkpoint(tmp_path / "run.pt", net)
    checkpoint = sffx.load_checkpoint(tmp_path / "run.pt")
    assert checkpoint.options(objective="ff")["objective"] == objective
    own = sffx.objectives.ForwardForward()
    assert checkpoint.options(objective=own)["objective"] == own
