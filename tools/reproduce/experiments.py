"""What is run: each experiment is a network, a data set, a schedule and the methods that are compared on it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Experiment:
    """One row of a table of the paper, or one claim put to the test.

    Attributes:
        network: a name in `networks.NETWORKS`.
        data: the folder below `--data` that holds `train/` and `test/`; "digits" are scikit-learn's.
        size: images are size x size.
        samples: training and validation images together, at random; None is all of them.
        batch: batch size.
        epochs: at most so many.
        policy: where the network is cut.
        methods: what is compared, by name.
        momentum: of the batch norms; None is the network's own.
        trials: settings tried for each method, with the same budget for all.
        trial_epochs: epochs of such a trial.
        patience: epochs without improvement of a block's validation loss after which its learning rate is cut to a tenth.
        stop: epochs without a better validation accuracy after which a run ends.
        settings: the experiment whose search is used, by name; None is this one's own.
        flip: whether training images are flipped by chance.
        pretrained: where all weights but the last layer's come from: "torchvision" (ImageNet), or the name of an experiment, whose BP
            run of seed 0 is then made first. None starts from scratch.
    """

    network: str
    data: str
    size: int
    samples: int | None
    batch: int
    epochs: int
    policy: str
    methods: tuple[str, ...]
    momentum: float | None = None
    trials: int = 12
    trial_epochs: int = 20
    patience: int = 10
    stop: int = 30
    settings: str | None = None
    flip: bool = True
    pretrained: str | None = None


ALL = ("BP", "deep supervision", "CwC", "SFF", "mlp", "mlp(256, 4)")
FULL_CIFAR = Experiment("CNNB", "cifar10", 32, None, 128, 100, "batchnorm", ALL, trial_epochs=3)
SHORT_CIFAR = replace(FULL_CIFAR, epochs=10, patience=1, stop=3, trials=3, trial_epochs=2)
HEADS = (
    *("BP", "SFF", "cosine", "cosine(4)", "mlp", "mlp(256, 4)"),
    *("deep supervision, mlp", "deep supervision, mlp(256, 4)"),
)
SMALL_CIFAR = Experiment("CNNB", "cifar10", 32, 1000, 128, 100, "batchnorm", ALL)
SMALL_IMAGENETTE = Experiment(
    "MobileNetV3-small",
    "imagenette",
    96,
    1000,
    64,
    40,
    "residual",
    ("BP", "SFF", "mlp", "mlp(256, 4)", "deep supervision, mlp"),
    trials=4,
    trial_epochs=10,
)
LARGE_IMAGENETTE = replace(
    SMALL_IMAGENETTE, network="MobileNetV3-large", size=224, epochs=100, methods=ALL, trials=12
)

TABLE2 = {
    "cifar10-cnn": replace(FULL_CIFAR, network="CNN", policy="layer"),
    "cifar10-cnnb": FULL_CIFAR,
    "cifar10-resnet18": replace(FULL_CIFAR, network="ResNet18", policy="residual"),
    "cifar10-mobilenetv3": replace(FULL_CIFAR, network="MobileNetV3-large", policy="residual"),
    "imagenette-resnet18": Experiment(
        "ResNet18", "imagenette", 224, None, 64, 100, "residual", ALL, trial_epochs=10
    ),
    "imagenette-mobilenetv3": Experiment(
        "MobileNetV3-large", "imagenette", 224, None, 64, 100, "residual", ALL, trial_epochs=10
    ),
}

EXPERIMENTS = {
    # Table 2: all training images.
    **{f"table2-{name}": experiment for name, experiment in TABLE2.items()},
    # The same with a tenth of the epochs, patience and early stopping, and a short search, for a machine without a GPU.
    "table2-short-cifar10-cnn": replace(SHORT_CIFAR, network="CNN", policy="layer"),
    "table2-short-cifar10-cnnb": SHORT_CIFAR,
    # Table 3: 1,000 training images at random.
    "table3-cifar10-cnnb": SMALL_CIFAR,
    "table3-imagenette-mobilenetv3": LARGE_IMAGENETTE,
    "table3-imagenette-mobilenetv3-momentum0.1": replace(
        LARGE_IMAGENETTE, momentum=0.1, settings="small-imagenette-momentum0.1"
    ),
    # Claim 1: small data, and the momentum of the batch norms.
    "small-imagenette-momentum0.01": replace(
        SMALL_IMAGENETTE, momentum=0.01, settings="small-imagenette-momentum0.1"
    ),
    "small-imagenette-momentum0.1": replace(SMALL_IMAGENETTE, momentum=0.1),
    # Table 4: the same, pretrained. Where ImageNet's weights cannot be had, on small images of CIFAR-10, enlarged.
    **{
        f"table4-{name}": replace(TABLE2[f"imagenette-{name}"], pretrained="torchvision")
        for name in ("resnet18", "mobilenetv3")
    },
    "pretrain-cifar10-mobilenetv3": replace(
        SMALL_IMAGENETTE,
        data="cifar10",
        samples=10_000,
        epochs=6,
        momentum=0.1,
        methods=("BP",),
        settings="small-imagenette-momentum0.1",
    ),
    "table4-small": replace(
        SMALL_IMAGENETTE, momentum=0.1, pretrained="pretrain-cifar10-mobilenetv3"
    ),
    # Better than the paper: heads that are not the paper's, on two networks and two data sets, and above on MobileNetV3 and Imagenette.
    "heads-cifar10-cnnb": replace(SMALL_CIFAR, epochs=40, trials=4, trial_epochs=12, methods=HEADS),
    "heads-digits-resnet18": Experiment(
        "ResNet18/4",
        "digits",
        16,
        500,
        32,
        20,
        "residual",
        HEADS,
        trials=4,
        trial_epochs=6,
        flip=False,
    ),
    # Claim 4: accuracy against depth, the same network in 2, 4 and 9 blocks.
    **{
        f"depth-{n}": Experiment(
            "ResNet18/4",
            "cifar10",
            32,
            1000,
            64,
            20,
            f"stages({n})",
            ("SFF", "mlp", "mlp(256, 4)"),
            trials=4,
            trial_epochs=5,
            settings="depth-4",
        )
        for n in (2, 4, 9)
    },
    "depth-1": Experiment(
        "ResNet18/4", "cifar10", 32, 1000, 64, 20, "residual", ("BP",), trials=4, trial_epochs=5
    ),
}
