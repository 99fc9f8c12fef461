"""The parts of the experiments against plain references, and one small experiment as a whole."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import sffx
from tools.reproduce import __main__ as command
from tools.reproduce import sweeps
from tools.reproduce.data import Images, Split, load, paired, split
from tools.reproduce.experiments import EXPERIMENTS, Experiment, Recipe
from tools.reproduce.methods import METHODS, joined
from tools.reproduce.networks import NETWORKS, build, classifier_of, example
from tools.reproduce.readouts import SHORT_PROBE, readouts
from tools.reproduce.render import READOUTS, reduced_precision, table
from tools.reproduce.search import GRID, candidates, search
from tools.reproduce.training import Run, Setting

SMALL = Experiment(
    network="CNNB",
    data="toys",
    size=16,
    samples=40,
    batch=8,
    epochs=3,
    policy="batchnorm",
    methods=("BP", "SFF"),
    trials=2,
    trial_epochs=1,
)


def images(count: int, seed: int) -> Images:
    """Images whose class is the brightest of their three channels."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (count,), generator=generator)
    x = torch.randint(0, 120, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    x[torch.arange(count), y] += 100
    return Images(x, y)


def small_split() -> Split:
    return split(images(40, 0), images(20, 1), None, 0)


@pytest.fixture
def folder(tmp_path):
    """A folder with images below data/toys."""
    for part, count in (("train", 40), ("test", 20)):
        drawn = images(count, 0)
        for i in range(count):
            place = tmp_path / "data" / "toys" / part / f"class{int(drawn.y[i])}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(drawn.x[i].permute(1, 2, 0).numpy()).save(place / f"{i}.png")
    return tmp_path


def command_line(folder: Path, name: str) -> list[str]:
    """Return the arguments that run an experiment with one seed in a folder."""
    options = {"--data": folder / "data", "--runs": folder / "runs", "--out": folder / "out"}
    arguments = [name, "--seeds", "1"]
    for option, value in options.items():
        arguments += [option, str(value)]
    return arguments


def new_run(method: str = "SFF") -> Run:
    return Run(SMALL, method, Setting(3e-3, 1e-3, 1e-2), 0, small_split())


def test_joined_has_the_gradients_of_plain_autograd_through_the_whole_chain():
    torch.manual_seed(0)
    model = build("CNNB", 3, 16).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    net = joined(sffx.transform(model, policy="batchnorm", example_input=example(16).double()))
    net.train()
    x, y = torch.randn(4, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    sffx.sff_loss(net(x), y).backward()

    model.train()
    parts = [model.layer0, model.layer1, model.layer2, model.layer3]
    heads = [net.get_submodule(f"head_{i}") for i in range(4)]
    loss, h = 0.0, x
    for i, (part, head) in enumerate(zip(parts, heads, strict=True)):
        h = part(h)
        goodness = F.conv2d(h, head.weight, head.bias).square().mean((2, 3))
        loss = loss + F.cross_entropy(goodness, y)
        h = F.layer_norm(h, h.shape[1:])
        if i == 3:
            loss = loss + F.cross_entropy(model.classifier(h.flatten(1)), y)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    targets = [*(f"block_{i}" for i in range(4)), "classifier"]
    found = [p for target in targets for p in net.get_submodule(target).parameters()]
    assert [torch.equal(p, q) for p, q in zip(found, model.parameters(), strict=True)] == [
        True
    ] * len(expected)
    for parameter, gradient in zip(found, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


def test_groups_of_backpropagation_part_the_classifier_from_the_features():
    model = build("CNNB", 3, 16)
    features, classifier = METHODS["BP"].groups(model, 1e-3, 1e-2)
    assert [p.shape for p in classifier["params"]] == [
        p.shape for p in classifier_of(model).parameters()
    ]
    assert len(features["params"]) + len(classifier["params"]) == len(list(model.parameters()))
    assert (features["lr"], classifier["lr"]) == (1e-3, 1e-2)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_small_images_and_are_cut(name):
    is_perceptron = name.startswith("MLP")
    shape = example(32, channels=1 if is_perceptron or "grey" in name else 3)
    policy = "layer" if is_perceptron or "CNN" in name else "residual"
    classes = 10 if "CFSE" in name else 7  # they divide the channels
    model = build(name, classes, 32, momentum=0.5)
    *_, last = classifier_of(model).parameters()
    assert last.shape == (classes,)  # the bias of the last layer
    assert model.eval()(shape).shape == (1, classes)
    assert all(m.momentum == 0.5 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    blocks = len(sffx.plan(model, policy, shape))
    assert blocks >= {"CNN 7 x 7, grey": 3}.get(name, 2 if is_perceptron else 4)


def test_the_layers_of_cfse_extract_and_separate_in_turn():
    model = build("CFSE", 100, 32)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert [each.groups for each in convolutions] == [1, 20, 1, 20, 1, 100]
    assert [each.out_channels for each in convolutions] == [60, 120, 240, 400, 800, 1600]
    objective = sffx.objectives.CwC(superclasses=(20, 20, 20, 20))
    plan = sffx.plan(model, "batchnorm", example(32), objective=objective, norm="none")
    assert [block.name for block in plan] == [f"layer{i}" for i in range(6)]


def test_unit_images_lie_between_zero_and_one():
    parts = split(images(24, 0), images(20, 1), None, 0, held_out=1 / 12, scale="unit")
    assert (len(parts.train), len(parts.validation)) == (22, 2)
    torch.testing.assert_close(parts.scaled(parts.test.x), parts.test.x / 255)


def test_a_recipe_is_not_searched_for_and_cools_down(tmp_path):
    recipe = Recipe("SGD", lr=1e-3, weight_decay=0.01, cooldown=True)
    experiment = replace(SMALL, epochs=4, recipes=(("SFF", recipe),))
    setting = command.find_setting("no search", experiment, "SFF", None)
    run = Run(experiment, "SFF", setting, 0, small_split())
    assert isinstance(run.optimizer, torch.optim.SGD)
    run.train(4)
    rates = [epoch["lr"][0] for epoch in run.curve]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])


def test_a_recipe_lowers_the_rate_of_a_block_by_the_steps_that_it_learnt(monkeypatch):
    spans = ((0, 2), (2, 4), (2, 4), (2, 4), (2, 4))
    monkeypatch.setitem(METHODS, "SFF", replace(METHODS["SFF"], spans=spans))
    steps = math.ceil(len(small_split().train) / SMALL.batch)
    recipe = Recipe("AdamW", lr=1.0, lrs=(1.0, 0.5), decays=((0.1, steps), (0.1, steps + 1)))
    experiment = replace(SMALL, recipes=(("SFF", recipe),))
    run = Run(experiment, "SFF", Setting(1.0, 0.25, 0.0), 0, small_split())
    used = []
    step = run.optimizer.step

    def noted() -> None:
        used.append([group["lr"] for group in run.optimizer.param_groups])
        for group in run.optimizer.param_groups:
            group["lr"] = 0.0  # the weights stay finite
        step()

    monkeypatch.setattr(run.optimizer, "step", noted)
    run.train(4)
    first, second, *_, classifier = zip(*used, strict=True)
    assert first[: 2 * steps] == pytest.approx([1.0] * steps + [0.1] * steps)
    assert second[2 * steps :] == pytest.approx([0.5] * (steps + 1) + [0.05] * (steps - 1))
    assert set(classifier) == {0.25}


def test_blocks_learn_in_the_epochs_of_a_method(monkeypatch):
    spans = ((0, 1), (0, 2), (1, 2), (1, 3), (2, 4))
    monkeypatch.setitem(METHODS, "SFF", replace(METHODS["SFF"], spans=spans))
    run = Run(SMALL, "SFF", Setting(1e-3, 1e-3, 0.0), 0, small_split())
    changed = []
    for epoch in range(1, 5):
        before = {name: p.clone() for name, p in run.net.named_parameters()}
        run.train(epoch)
        after = dict(run.net.named_parameters())
        moved = {
            name.split(".")[0] for name in before if not torch.equal(before[name], after[name])
        }
        changed.append(sorted(name for name in moved if not name.startswith("head")))
    assert changed == [
        ["block_0", "block_1"],
        ["block_1", "block_2", "block_3"],
        ["block_3", "classifier"],
        ["classifier"],
    ]
    run.train(9)
    assert len(run.curve) == 4
    assert run.result()["best_epoch"] == 4


def test_split_parts_by_seed_without_overlap():
    source = images(50, 0)
    source.x[:, 0, 0, 0] = torch.arange(50, dtype=torch.uint8)  # a number for each image
    one, again, other = (split(source, source, 40, seed) for seed in (3, 3, 4))
    numbers = [set(part.x[:, 0, 0, 0].tolist()) for part in (one.train, one.validation)]
    assert [len(n) for n in numbers] == [32, 8]
    assert not numbers[0] & numbers[1]
    assert torch.equal(one.train.x, again.train.x)
    assert not torch.equal(one.train.y, other.train.y)


def test_pairs_have_both_digits_side_by_side_and_each_digit_once():
    shades = torch.tensor([10, 20, 30, 40, 50], dtype=torch.uint8)
    digits = Images(
        shades[:, None, None, None].expand(-1, 1, 28, 28), torch.tensor([3, 7, 0, 9, 1])
    )
    pairs = paired(digits, 16)
    assert pairs.x.shape == (2, 3, 16, 16)  # the fifth digit has no partner
    assert pairs.y.tolist() == [37, 9]
    assert pairs.x[:, :, :, :8].amax((1, 2, 3)).tolist() == [10, 30]
    assert pairs.x[:, :, :, 8:].amin((1, 2, 3)).tolist() == [20, 40]


def test_load_says_where_images_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="unzip the data there"):
        load(tmp_path / "nothing", tmp_path / "cache", 16)


def test_readouts_of_two_blocks_by_hand():
    scores = torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]], [[1.0, 0.0]]])
    found = readouts(scores, scores, torch.tensor([1]))
    assert found["ensemble"].tolist() == [[1.0, 2.0]]
    assert found["last"].tolist() == [[0.0, 4.0]]
    assert found["classifier"].tolist() == [[1.0, 0.0]]
    assert torch.allclose(
        found["weighted"].exp(), scores[1].softmax(1), atol=1e-3
    )  # the second block alone knows the label


@pytest.mark.parametrize("method", ["BP", "SFF"])
def test_interrupted_run_goes_on_as_if_nothing_had_been(method, tmp_path):
    whole = new_run(method)
    whole.train(3)
    first = new_run(method)
    first.train(1, tmp_path / "run.pt")
    second = new_run(method)
    second.train(3, tmp_path / "run.pt")

    def timeless(run):
        return [
            {key: value for key, value in epoch.items() if key != "seconds"} for epoch in run.curve
        ]

    assert len(second.curve) == 3
    assert timeless(second) == timeless(whole)
    assert second.result()["test"] == whole.result()["test"]


def test_run_that_diverges_ends_with_what_was_best_before():
    run = new_run()
    run.train(1)
    best = run.best["accuracy"]
    with torch.no_grad():
        run.net.get_submodule("head_0").bias.fill_(float("nan"))
    run.train(10)
    assert len(run.curve) == 2
    assert run.result()["diverged"]
    assert run.result()["validation"]["ensemble"] == pytest.approx(best)


def test_interrupted_search_makes_the_same_trials(tmp_path, monkeypatch):
    parted = small_split()
    experiment = replace(SMALL, trials=3)
    tried = []
    train = Run.train

    def broken(run, *args, **options):
        tried.append(run.setting)
        if len(tried) == 2:
            raise KeyboardInterrupt
        train(run, *args, **options)

    monkeypatch.setattr(Run, "train", broken)
    with pytest.raises(KeyboardInterrupt):
        search("toys", experiment, "SFF", parted, tmp_path)
    search("toys", experiment, "SFF", parted, tmp_path)
    first, second, third = (Setting(**each) for each in candidates(3))
    assert tried == [first, second, second, third]
    search("toys", experiment, "SFF", parted, tmp_path)
    assert len(tried) == 4


def test_candidates_begin_with_every_learning_rate_and_end_with_the_grid():
    assert sorted(setting["lr"] for setting in candidates(4)) == sorted(GRID["lr"])
    everything = candidates(100)
    assert len({tuple(setting.values()) for setting in everything}) == len(everything) == 24


def test_run_ends_when_nothing_improves():
    run = new_run()
    run.experiment = replace(SMALL, stop=2)
    run.best["accuracy"] = 1.1
    run.train(50)
    assert len(run.curve) == 2


@pytest.fixture
def pretrained(folder, monkeypatch):
    """Two experiments, the second of which starts from the weights of the first.

    Returns:
        The arguments that run the second, and a list that collects the start of each run: the name
        of the experiment that its weights come from, and its weights.
    """
    monkeypatch.setitem(EXPERIMENTS, "before", replace(SMALL, methods=("BP",)))
    monkeypatch.setitem(
        EXPERIMENTS, "after", replace(SMALL, methods=("BP", "SFF"), pretrained="before", epochs=1)
    )
    begun = []
    train = Run.train

    def watched(run, *args, **options):
        weights = {name: value.clone() for name, value in run.net.state_dict().items()}
        begun.append((run.experiment.pretrained, weights))
        return train(run, *args, **options)

    monkeypatch.setattr(Run, "train", watched)
    return command_line(folder, "after"), begun


def test_weights_but_for_the_last_layer_come_from_the_run_that_trained_them(folder, pretrained):
    arguments, begun = pretrained
    command.main(arguments)
    checkpoint = torch.load(folder / "runs" / "before" / "BP-0.pt", weights_only=False)
    weights = checkpoint["best"]["state"]
    starts = [state for source, state in begun if source == "before"]
    assert len(starts) == 6  # two methods, two trials and a run each
    for start in starts:
        for name, value in weights.items():
            same = [v for v in start.values() if v.shape == value.shape and torch.equal(v, value)]
            assert bool(same) == (not name.startswith("classifier")), name
    assert {path.stem for path in (folder / "out" / "before").glob("*.json")} == {"BP-0"}


def test_pretraining_that_was_interrupted_goes_on_and_what_is_done_is_left_alone(
    folder, pretrained, monkeypatch
):
    arguments, begun = pretrained
    checkpoint = folder / "runs" / "before" / "BP-0.pt"

    def interrupted(run):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "result", interrupted)  # trained, and not yet recorded
        with pytest.raises(KeyboardInterrupt):
            command.main(arguments)
    assert checkpoint.exists()
    command.main(arguments)
    record = json.loads((folder / "out" / "before" / "BP-0.json").read_text())
    assert record["epochs"] == SMALL.epochs
    checkpoint.unlink()
    done = len(begun)
    command.main(arguments)
    assert len(begun) == done


def test_a_record_fits_whatever_other_methods_and_later_fields_there_are(tmp_path):
    made = replace(SMALL, recipes=(("SFF", Recipe("Adam", lr=1e-3)), ("CwC", Recipe("SGD", 1))))
    config = asdict(made)
    del config["precision"]  # an older record
    del config["recipes"][0][1]["decays"]
    record = tmp_path / "SFF-0.json"
    record.write_text(json.dumps({"method": "SFF", "config": config}))

    another = replace(made, methods=("SFF",), recipes=made.recipes[:1])
    command.require_same(record, another)
    for changed in (
        replace(made, precision="bfloat16"),
        replace(made, recipes=(("SFF", Recipe("Adam", lr=1e-2)),)),
        replace(made, recipes=()),
    ):
        with pytest.raises(SystemExit, match="instead of"):
            command.require_same(record, changed)


def test_the_setting_of_another_seed_is_taken_from_its_record(tmp_path, monkeypatch):
    folders = command.Folders(tmp_path, tmp_path, tmp_path)
    record = folders.record("small", "SFF", 0)
    record.parent.mkdir()
    setting = {"lr": 0.5, "classifier_lr": 0.25, "weight_decay": 0.0}
    content = {"method": "SFF", "config": asdict(SMALL), "setting": setting}
    record.write_text(json.dumps(content))
    assert command.find_setting("small", SMALL, "SFF", folders) == Setting(0.5, 0.25, 0.0)

    # So is that of an experiment whose search serves this one.
    monkeypatch.setitem(EXPERIMENTS, "small", SMALL)
    larger = replace(SMALL, size=64, settings="small")
    assert command.find_setting("larger", larger, "SFF", folders) == Setting(0.5, 0.25, 0.0)
    with pytest.raises(SystemExit, match="trials"):
        command.find_setting("larger", replace(larger, trials=99), "SFF", folders)


def test_trials_of_other_lengths_are_not_mixed(tmp_path):
    parted = small_split()
    search("toys", SMALL, "SFF", parted, tmp_path)
    with pytest.raises(SystemExit, match="had epochs 1, not 2"):
        search("toys", replace(SMALL, trial_epochs=2), "SFF", parted, tmp_path)


def test_a_method_with_probes_reads_all_blocks_and_the_last_one(monkeypatch):
    monkeypatch.setitem(METHODS, "SFF", replace(METHODS["SFF"], probe=SHORT_PROBE))
    run = new_run()
    run.train(1)
    result = run.result()
    assert set(result["test"]) == set(READOUTS)
    chance = 1 / 3
    assert result["validation"]["linear probe"] > chance


@pytest.mark.parametrize(
    ("reduced", "text"),
    [((), ""), (("BP",), ", bfloat16 (BP)"), (("BP", "SFF"), ", bfloat16")],
)
def test_the_caption_names_the_methods_that_trained_in_bfloat16(reduced, text):
    methods = {}
    for name in ("BP", "SFF"):
        methods[name] = [{"config": {"precision": "bfloat16"} if name in reduced else {}}]
    assert reduced_precision(methods) == text


def test_a_classifier_that_does_not_learn_has_no_accuracy_in_the_table():
    runs = {}
    for method in ("FF, spatial labels", "SFF"):
        run = new_run(method)
        run.train(2)  # without a recipe, so learning rates follow the losses of the blocks
        result = run.result()
        assert set(result["test"]) >= {"classifier", "all and classifier", "last"}
        runs[method] = [result]
    _, _, of_labels, of_sff = table(runs, {}).splitlines()
    place = {
        name: 1 + READOUTS.index(name) for name in ("classifier", "all and classifier", "last")
    }
    dashes = {name for name in place if of_labels.split(" | ")[place[name]] == "–"}
    assert dashes == {"classifier", "all and classifier"}
    assert "–" not in [of_sff.split(" | ")[each] for each in place.values()]


def test_command_runs_an_experiment_to_its_table_and_does_not_run_it_twice(
    folder, monkeypatch, capsys
):
    monkeypatch.setitem(EXPERIMENTS, "toys", SMALL)
    arguments = command_line(folder, "toys")
    assert command.main(arguments) == 0
    record = folder / "out" / "toys" / "SFF-0.json"
    facts = json.loads(record.read_text())
    assert facts["config"]["network"] == "CNNB"
    assert facts["method"] == "SFF"
    assert set(facts["test"]) == set(READOUTS) - {"linear probe", "probe of the last"}
    assert len(facts["curve"]) == 3
    table = (folder / "out" / "tables.md").read_text()
    assert "## toys" in table
    assert f"{100 * facts['test']['ensemble']:.2f}" in table
    assert (folder / "out" / "toys.png").stat().st_size > 0
    before = record.read_bytes()
    assert command.main(arguments) == 0
    assert record.read_bytes() == before
    with pytest.raises(SystemExit, match="epochs 3 instead of 1"):
        command.main([*arguments, "--epochs", "1"])
    with pytest.raises(SystemExit, match="precision 'float32' instead of 'bfloat16'"):
        command.main([*arguments, "--precision", "bfloat16"])
    with pytest.raises(SystemExit):
        command.main(["no-such-table"])
    assert "table3-cifar10-cnnb" in capsys.readouterr().err


def test_a_sweep_has_the_readout_of_each_method_over_the_number_of_blocks(tmp_path):
    def runs(*accuracies):
        return [{"test": {"ensemble": each, "classifier": each / 2}} for each in accuracies]

    uncut = ({"BP": runs(0.9)}, {"BP": {"peak": 1.0, "time": 1.0}})
    in_two = ({"SFF": runs(0.5, 0.6), "mlp": runs(0.7)}, {"SFF": {"peak": 0.7, "time": 1.1}})
    in_four = ({"SFF": runs(0.4)}, {})
    experiments = {1: uncut, 2: in_two, 4: in_four}
    assert sweeps.accuracies("SFF", experiments) == {
        2: (pytest.approx(55), pytest.approx(50**0.5)),
        4: (pytest.approx(40), 0),
    }
    assert sweeps.accuracies("BP", experiments) == {1: (pytest.approx(45), 0)}
    sweeps.plot("sweep", experiments, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 500


def test_a_sweep_is_of_one_network_with_one_setting():
    for experiments in sweeps.SWEEPS.values():
        first, *others = (EXPERIMENTS[name] for name in experiments.values())
        for other in others:
            for field in ("network", "data", "size", "samples", "batch", "epochs", "precision"):
                assert getattr(other, field) == getattr(first, field)
