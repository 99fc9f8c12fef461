"""The experiments: each is a network, a data set, a schedule, and the methods to compare."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Recipe:
    """How a method is optimised where its authors say so. Such a method is not searched for.

    Attributes:
        optimizer: "AdamW", "Adam" or "SGD".
        lr: learning rate of the blocks.
        lrs: of each block, where they differ.
        classifier_lr: of the classifier.
        weight_decay: of all.
        momentum: of SGD.
        cooldown: whether the learning rates fall linearly to zero in the second half.
        decays: of each block, a factor and a number of steps. After each such number of steps that
            the block learns, its rate is multiplied by the factor. Empty keeps the rates.
    """

    optimizer: str
    lr: float
    classifier_lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    cooldown: bool = False
    lrs: tuple[float, ...] = ()
    decays: tuple[tuple[float, int], ...] = ()

    def first_rate(self, group: int, given: float) -> float:
        """Return the rate of a parameter group, by its place, where `given` is that of all."""
        return self.lrs[group] if group < len(self.lrs) else given

    def factor(self, group: int, epoch: int, epochs: int, steps: int) -> float:
        """Return the factor of a group's first rate.

        Args:
            group: its place. The classifier's is the last, and its rate does not decay.
            epoch: 0 for the first one of so many.
            epochs: that the experiment has.
            steps: in which the group has learnt before.
        """
        factor = 1.0
        if self.cooldown:
            factor = min(2 * (epochs - epoch) / epochs, 1.0)
        if group < len(self.decays):
            decay, period = self.decays[group]
            factor *= decay ** (steps // period)
        return factor


@dataclass(frozen=True)
class Experiment:
    """One row of a table of the paper, or one claim put to the test.

    Attributes:
        network: a name in `networks.NETWORKS`.
        data: the folder below `--data` that holds `train/` and `test/`; "digits" are
            scikit-learn's, "mnist" is torchvision's, and "mnist-pairs" are two of it side by side,
            100 classes.
        size: images are size x size.
        samples: number of training and validation images, taken at random; None takes all.
        batch: batch size.
        epochs: at most so many.
        policy: where the network is cut.
        methods: the names of the methods that are compared.
        momentum: of the batch norms; None keeps the network's own.
        trials: settings tried for each method, with the same budget for all.
        trial_epochs: epochs of such a trial.
        patience: epochs without improvement of a block's validation loss after which its learning
            rate is cut to a tenth.
        stop: epochs without a better validation accuracy after which a run ends.
        settings: the name of the experiment whose search is used; None searches anew.
        flip: whether training images are flipped by chance.
        shift: whether training images are shifted by chance.
        channels: of the images, 3 or 1.
        scale: "normalised" by channel, or "unit", between 0 and 1.
        held_out: share of the training images that validate.
        recipes: of the methods that are not searched for, pairs of a name and a recipe. They run to
            the last epoch, even where nothing improves.
        precision: "float32", or "bfloat16", in which autocast runs products and convolutions.
        pretrained: the source of all weights but the last layer's: "torchvision" (ImageNet), or the
            name of an experiment. Its BP run of seed 0 is then made first. None starts from
            scratch.
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
    shift: bool = True
    channels: int = 3
    scale: str = "normalised"
    held_out: float = 0.2
    recipes: tuple[tuple[str, Recipe], ...] = ()
    precision: str = "float32"

    @property
    def classes(self) -> int:
        """J, of the data."""
        return 100 if self.data == "mnist-pairs" else 10

    def recipe(self, method: str) -> Recipe | None:
        """Return the recipe of a method, None where its setting is searched for."""
        return dict(self.recipes).get(method)


ALL = ("BP", "deep supervision", "CwC", "SFF", "mlp", "mlp(256, 4)")
HEADS = (
    "BP",
    "SFF",
    "cosine",
    "cosine(4)",
    "mlp",
    "mlp(256, 4)",
    "auto",
    "deep supervision, mlp",
    "deep supervision, mlp(256, 4)",
)

FULL_CIFAR = Experiment(
    network="CNNB",
    data="cifar10",
    size=32,
    samples=None,
    batch=128,
    epochs=100,
    policy="batchnorm",
    methods=ALL,
    trial_epochs=3,
)
# A tenth of the epochs, patience and early stopping, and a short search: no GPU is needed.
SHORT_CIFAR = replace(FULL_CIFAR, epochs=10, patience=1, stop=3, trials=3, trial_epochs=2)
# The paper's schedule with the settings of the short search.
LONG_CIFAR = replace(
    FULL_CIFAR,
    methods=("BP", "SFF", "mlp(256, 4)"),
    trials=SHORT_CIFAR.trials,
    trial_epochs=SHORT_CIFAR.trial_epochs,
    settings="table2-short-cifar10-cnnb",
)
SMALL_CIFAR = replace(FULL_CIFAR, samples=1000, trial_epochs=20)
FULL_IMAGENETTE = Experiment(
    network="ResNet18",
    data="imagenette",
    size=224,
    samples=None,
    batch=64,
    epochs=100,
    policy="residual",
    methods=ALL,
    trial_epochs=10,
)
SMALL_IMAGENETTE = Experiment(
    network="MobileNetV3-small",
    data="imagenette",
    size=96,
    samples=1000,
    batch=64,
    epochs=40,
    policy="residual",
    methods=("BP", "SFF", "mlp", "mlp(256, 4)", "deep supervision, mlp"),
    trials=4,
    trial_epochs=10,
)
LARGE_IMAGENETTE = replace(
    SMALL_IMAGENETTE, network="MobileNetV3-large", size=224, epochs=100, methods=ALL, trials=12
)
DIGITS = Experiment(
    network="ResNet18/4",
    data="digits",
    size=16,
    samples=500,
    batch=32,
    epochs=20,
    policy="residual",
    methods=HEADS,
    trials=4,
    trial_epochs=6,
    flip=False,
)
DEPTH = Experiment(
    network="ResNet18/4",
    data="cifar10",
    size=32,
    samples=1000,
    batch=64,
    epochs=20,
    policy="residual",
    methods=("SFF", "mlp", "mlp(256, 4)"),
    trials=4,
    trial_epochs=5,
    settings="depth-4",
)

# Table 2: all training images.
TABLE2 = {
    "table2-cifar10-cnn": replace(FULL_CIFAR, network="CNN", policy="layer"),
    "table2-cifar10-cnnb": FULL_CIFAR,
    "table2-cifar10-resnet18": replace(FULL_CIFAR, network="ResNet18", policy="residual"),
    "table2-cifar10-mobilenetv3": replace(
        FULL_CIFAR, network="MobileNetV3-large", policy="residual"
    ),
    "table2-imagenette-resnet18": FULL_IMAGENETTE,
    "table2-imagenette-mobilenetv3": replace(FULL_IMAGENETTE, network="MobileNetV3-large"),
    "table2-short-cifar10-cnn": replace(SHORT_CIFAR, network="CNN", policy="layer"),
    "table2-short-cifar10-cnnb": SHORT_CIFAR,
    "table2-long-cifar10-cnn": replace(
        LONG_CIFAR, network="CNN", policy="layer", settings="table2-short-cifar10-cnn"
    ),
    "table2-long-cifar10-cnnb": LONG_CIFAR,
}

# Table 3: 1,000 training images at random.
TABLE3 = {
    "table3-cifar10-cnnb": SMALL_CIFAR,
    "table3-imagenette-mobilenetv3": LARGE_IMAGENETTE,
    "table3-imagenette-mobilenetv3-momentum0.1": replace(
        LARGE_IMAGENETTE, momentum=0.1, settings="small-imagenette-momentum0.1", trials=4
    ),
}

# Small data, and the momentum of the batch norms.
MOMENTUM = {
    "small-imagenette-momentum0.01": replace(
        SMALL_IMAGENETTE, momentum=0.01, settings="small-imagenette-momentum0.1"
    ),
    "small-imagenette-momentum0.1": replace(SMALL_IMAGENETTE, momentum=0.1),
}

# BP of `small-imagenette-momentum0.1` has a peak of 205 MiB, and these have at most that. They
# spend it on larger images: local methods with the same batches and settings, BP with small ones.
LARGER_IMAGES = replace(SMALL_IMAGENETTE, momentum=0.1, settings="small-imagenette-momentum0.1")
MEMORY = {
    "memory-imagenette-160": replace(LARGER_IMAGES, size=160, methods=("mlp(256, 4)",)),
    "memory-imagenette-176": replace(LARGER_IMAGES, size=176, methods=("SFF",)),
    "memory-imagenette-192": replace(LARGER_IMAGES, size=192, methods=("mlp",)),
    "memory-imagenette-192-batch16": replace(
        LARGER_IMAGES, size=192, batch=16, methods=("BP",), settings=None
    ),
    # What small batches do without larger images.
    "memory-imagenette-96-batch16": replace(
        LARGER_IMAGES, batch=16, methods=("BP", "mlp(256, 4)"), settings=None
    ),
}

# Table 4: pretrained. Without ImageNet's weights, on small images of CIFAR-10, enlarged.
TABLE4 = {
    "table4-resnet18": replace(FULL_IMAGENETTE, pretrained="torchvision"),
    "table4-mobilenetv3": replace(
        FULL_IMAGENETTE, network="MobileNetV3-large", pretrained="torchvision"
    ),
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
}

# Heads that are not the paper's, on two networks and two data sets.
OTHER_HEADS = {
    "heads-cifar10-cnnb": replace(SMALL_CIFAR, epochs=40, trials=4, trial_epochs=12, methods=HEADS),
    "heads-digits-resnet18": DIGITS,
}

# What the field adds to local learning, each beside `mlp` alone: the schedule, the trials and the
# seeds of the experiments on heads. Every block of CNNB changes the shape of its input, so nothing
# there is a transport.
ADDITIONS = (
    "mlp, alternating cuts",
    "mlp, coarse to fine",
    "mlp, momentum auxiliary",
    "mlp, copied layers",
    "mlp, contrast",
    "mlp, distillation",
    "mlp, boosting",
    "mlp, reconstruction",
)
BESIDE = ("SFF", "mlp", "deep supervision, mlp")
RECIPES = {
    "recipes-cifar10-cnnb": replace(
        OTHER_HEADS["heads-cifar10-cnnb"], methods=(*BESIDE, *ADDITIONS)
    ),
    "recipes-digits-resnet18": replace(DIGITS, methods=(*BESIDE, "mlp, transport", *ADDITIONS)),
    # 100 classes, for which coarse to fine was made.
    "recipes-pairs-resnet18": replace(
        DIGITS,
        data="mnist-pairs",
        size=28,
        samples=10_000,
        batch=64,
        epochs=12,
        policy="stages(4)",
        methods=("BP", "mlp", "deep supervision, mlp", "mlp, coarse to fine"),
        trial_epochs=2,
        precision="bfloat16",
    ),
}

# Accuracy against the number of blocks: the same network in 2, 4 and 9 blocks, and uncut.
BLOCKS = {
    "depth-2": replace(DEPTH, policy="stages(2)"),
    "depth-4": replace(DEPTH, policy="stages(4)"),
    "depth-9": replace(DEPTH, policy="stages(9)"),
    "depth-1": replace(DEPTH, methods=("BP",), settings=None),
}

# The same on all training images, with a short schedule. Four blocks are searched for, for all. An
# epoch takes two thirds of the time in bfloat16.
FULL_DEPTH = replace(
    SHORT_CIFAR,
    network="ResNet18/4",
    policy="stages(4)",
    epochs=8,
    trial_epochs=1,
    settings="depth-full-4",
    precision="bfloat16",
    methods=(
        "SFF",
        "mlp",
        "mlp(256, 4)",
        "deep supervision, mlp(256, 4)",
        "mlp(256, 4), alternating cuts",
    ),
)
# The second network. Its convolutions of one channel each are slow in bfloat16.
FULL_MOBILENET = replace(
    FULL_DEPTH,
    network="MobileNetV3-small",
    momentum=0.1,
    precision="float32",
    settings="depth-mobilenetv3-4",
    methods=(
        "SFF",
        "auto",
        "mlp(256, 4)",
        "deep supervision, auto",
        "deep supervision, mlp(256, 4)",
    ),
)
FULL_BLOCKS = {
    "depth-full-1": replace(FULL_DEPTH, policy="residual", methods=("BP",), settings=None),
    "depth-full-2": replace(FULL_DEPTH, policy="stages(2)"),
    "depth-full-4": FULL_DEPTH,
    "depth-full-9": replace(FULL_DEPTH, policy="stages(9)"),
    "depth-mobilenetv3-1": replace(
        FULL_MOBILENET, policy="residual", methods=("BP",), settings=None
    ),
    "depth-mobilenetv3-4": FULL_MOBILENET,
    "depth-mobilenetv3-13": replace(FULL_MOBILENET, policy="residual"),
}

# The Forward-Forward family, beside SFF and backpropagation on the same network. The recipes are
# those of the authors, or of a known reimplementation. A CPU with bfloat16 is two to three times as
# fast with it.
RIVALS = ("SFF", "mlp(256, 4)", "BP", "deep supervision, mlp(256, 4)")

# Of github.com/loeweX/Forward-Forward; its linear classifier learns at 1e-2.
LOEWEX = Recipe("SGD", lr=1e-3, classifier_lr=1e-2, weight_decay=3e-4, cooldown=True)
# Of github.com/neurophysics-cnrsthales/contrastive-forward-forward, config.json.
SCFF_AUTHORS = Recipe(
    "AdamW",
    lr=3e-3,
    classifier_lr=3e-3,
    weight_decay=1e-4,
    lrs=(3e-3, 2e-3),
    decays=((0.9, 1000), (0.6, 1500)),
)
MNIST = Experiment(
    network="MLP 3 x 1000",
    data="mnist",
    size=28,
    samples=None,
    batch=100,
    epochs=60,
    policy="layer",
    methods=("FF", "FF, peers", "FF, unsupervised", *RIVALS),
    trials=4,
    trial_epochs=2,
    patience=4,
    stop=12,
    flip=False,
    shift=False,
    channels=1,
    scale="unit",
    held_out=1 / 12,
    recipes=tuple((name, LOEWEX) for name in ("FF", "FF, peers", "FF, unsupervised")),
    precision="bfloat16",
)
CFSE_MNIST = replace(
    MNIST,
    network="CFSE/2, grey",
    policy="batchnorm",
    batch=128,
    epochs=6,
    scale="normalised",
    methods=("CwC, ILT", *RIVALS),
    trials=2,
    trial_epochs=1,
    recipes=(("CwC, ILT", Recipe("Adam", lr=0.01, classifier_lr=0.01)),),
)
FF_SHORT = replace(MNIST, epochs=20, methods=("FF, unsupervised",))
FAMILY = {
    "family-mnist-ff": MNIST,
    # The authors' network without labels, and the narrow one, with a third of the epochs.
    "family-mnist-ff-wide": replace(FF_SHORT, network="MLP 4 x 2000"),
    "family-mnist-ff-short": FF_SHORT,
    "family-mnist-small": replace(
        MNIST,
        network="MLP 2 x 500",
        epochs=30,
        methods=("FF, small", *RIVALS),
        recipes=(("FF, small", Recipe("Adam", lr=1e-3)),),
    ),
    "family-mnist-scff": replace(
        MNIST,
        network="MLP 2 x 2000",
        epochs=29,
        methods=("SCFF", "SCFF, triangle", *RIVALS),
        recipes=(("SCFF", SCFF_AUTHORS), ("SCFF, triangle", SCFF_AUTHORS)),
    ),
    "family-mnist-spatial": replace(
        MNIST,
        network="CNN 7 x 7, grey",
        epochs=15,
        methods=("FF, spatial labels", *RIVALS),
        recipes=(("FF, spatial labels", Recipe("Adam", lr=1e-3)),),
    ),
    # Half the channels of the authors, to compare; all of them for their own method alone.
    "family-mnist-cfse": CFSE_MNIST,
    # What the authors have more of: channels, and epochs.
    "family-mnist-cfse-wide": replace(CFSE_MNIST, network="CFSE, grey", methods=("CwC, ILT",)),
    "family-mnist-cfse-long": replace(CFSE_MNIST, epochs=20, methods=("CwC, ILT",)),
    # As the short table 2, which has SFF, CwC and BP of this network.
    "family-cifar10-cnnb": replace(
        SHORT_CIFAR,
        methods=("CwC, ILT fast", "FF, spatial labels"),
        recipes=(
            ("CwC, ILT fast", Recipe("Adam", lr=0.01, classifier_lr=0.01)),
            ("FF, spatial labels", Recipe("Adam", lr=1e-3)),
        ),
    ),
}

# What the authors or a known reimplementation report, test accuracy in per cent and how.
PUBLISHED = {
    ("family-mnist-ff", "FF"): "98.64, with four layers of 2,000",
    ("family-mnist-ff", "FF, peers"): "98.55, by a linear probe after 100 epochs",
    ("family-mnist-ff", "FF, unsupervised"): "98.63, by a linear probe, with layers of 2,000",
    ("family-mnist-ff-short", "FF, unsupervised"): "98.63, by a linear probe, layers of 2,000",
    ("family-mnist-ff-wide", "FF, unsupervised"): "98.63, by a linear probe",
    ("family-mnist-small", "FF, small"): "93.16",
    ("family-mnist-scff", "SCFF"): "98.7, by a linear probe",
    ("family-mnist-scff", "SCFF, triangle"): "98.7, by a linear probe",
    ("family-mnist-spatial", "FF, spatial labels"): "99.16, with another network",
    ("family-mnist-cfse", "CwC, ILT"): "99.42, with six layers and twice the channels",
    ("family-mnist-cfse-wide", "CwC, ILT"): "99.42, with six layers",
    ("family-mnist-cfse-long", "CwC, ILT"): "99.42, with six layers and twice the channels",
    ("family-cifar10-cnnb", "CwC, ILT fast"): "78.11, with CFSE",
}

EXPERIMENTS = {
    **TABLE2,
    **TABLE3,
    **MOMENTUM,
    **MEMORY,
    **TABLE4,
    **OTHER_HEADS,
    **RECIPES,
    **BLOCKS,
    **FULL_BLOCKS,
    **FAMILY,
}
