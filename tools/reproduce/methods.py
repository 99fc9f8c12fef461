"""The ways to train that are compared, each from the same network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.learning.objectives.records import objective_named
from sffx.net import CutModel, cut_model
from sffx.objectives import SCFF, ForwardForward
from sffx.runtime.evaluate import block_scores
from sffx.runtime.modes import evaluating
from tools.reproduce import recipes
from tools.reproduce.data import Split
from tools.reproduce.networks import classifier_of
from tools.reproduce.readouts import LONG_PROBE, SHORT_PROBE, ProbeRecipe


@dataclass(frozen=True)
class Method:
    """How a network is trained.

    Attributes:
        heads: whether it has the blocks and heads of a cut model.
        local: whether no gradient crosses a cut. With heads and without this, it is backpropagation
            with deep supervision.
        readout: judges a run. The search maximises it, and it decides when to stop.
        options: of `sffx.transform`.
        spans: the epochs of each block, (first, end), the classifier's last; None lets all blocks
            learn in all epochs.
        probe: how linear probes learn that are trained afterwards, and are more readouts: on all
            blocks that predict, and on the last one. None for no probes.
        addition: a recipe of the field, which then gives the options; None for none.
        strengths: of the recipe, among which the search chooses.
        cuts: names of the nodes behind which it is cut; None for the experiment's policy.
    """

    heads: bool = True
    local: bool = True
    readout: str = "ensemble"
    options: Mapping[str, Any] = field(default_factory=dict)
    spans: tuple[tuple[int, int], ...] | None = None
    probe: ProbeRecipe | None = None
    addition: recipes.Addition | None = None
    strengths: tuple[float, ...] = ()
    cuts: tuple[str, ...] | None = None

    @property
    def trains_classifier(self) -> bool:
        """Whether the model's own classifier learns. With labels in the input it does not."""
        return objective_named(self.options.get("objective", "sff")).trains_classifier

    def at(self, strength: float | None) -> Method:
        """Return the method with its recipe at a strength, itself where that is None."""
        if strength is None or self.addition is None:
            return self
        return replace(self, addition=replace(self.addition, strength=strength))

    def schedule(self, net: Any) -> sffx.BlockSchedule | None:
        """Return who learns when, None where all blocks always learn."""
        return None if self.spans is None else sffx.BlockSchedule(net, self.spans)

    def prepare(self, model: nn.Module, policy: str, example: Tensor) -> nn.Module:
        """Return the network that is trained, cut or not."""
        if not self.heads:
            return model
        options = self.options
        if self.addition is not None:
            options = self.addition.options(model, policy, example)
        cuts = policy if self.cuts is None else list(self.cuts)
        net = sffx.transform(model, policy=cuts, example_input=example, **options)
        if self.addition is not None:
            self.addition.attach(net)
        return net if self.local else joined(net)

    def begin_epoch(self, net: Any, epoch: int, epochs: int, split: Split) -> None:
        """Change what depends on the epoch, 0 for the first one of so many."""
        if self.addition is not None:
            self.addition.begin_epoch(net, epoch, epochs, split)

    def groups(self, net: nn.Module, lr: float, classifier_lr: float) -> list[dict[str, Any]]:
        """Return named parameter groups: one for each block, or features and classifier."""
        if self.heads:
            return sffx.parameter_groups(cut_model(net), lr, classifier_lr)
        classifier = list(classifier_of(net).parameters())
        own = {id(p) for p in classifier}
        features = [p for p in net.parameters() if id(p) not in own]
        return [
            {"params": features, "lr": lr, "name": "features"},
            {"params": classifier, "lr": classifier_lr, "name": "classifier"},
        ]

    def loss(self, net: Any, x: Tensor, y: Tensor, blocks: Sequence[str] | None = None) -> Tensor:
        """Return the loss of a batch; of some blocks, where no gradient crosses a cut."""
        if not self.heads:
            return F.cross_entropy(net(x), y)
        if not self.local:
            return sffx.sff_loss(net(x), y)
        if self.addition is not None:
            return self.addition.loss(net, x, y)
        return sffx.local_loss(net, x, y, blocks=blocks)

    @torch.no_grad()
    def scores(self, net: nn.Module, batches: Iterable[Tensor]) -> Tensor:
        """Return the scores of each block in eval mode, the classifier's last.

        Returns:
            The scores, (K, N, J); K is 1 without heads.
        """
        scores = []
        with evaluating(net):
            for x in batches:
                scores.append(block_scores(cut_model(net), x) if self.heads else net(x)[None])
        return torch.cat(scores, dim=1)


def joined(net: CutModel) -> CutModel:
    """Let gradients cross the cuts again, which makes it deep supervision.

    Blocks, norms, heads and losses stay the same, and are trained by backpropagation.
    """
    for node in list(net.graph.nodes):
        if node.op == "call_method" and node.target == "detach":
            node.replace_all_uses_with(node.args[0])
            net.graph.erase_node(node)
    net.graph.lint()
    net.recompile()
    return net


def _with_head(goodness: str) -> Method:
    return Method(options={"goodness": goodness})


def _supervised(goodness: str) -> Method:
    return Method(local=False, options={"goodness": goodness})


def _with(addition: type[recipes.Addition], *strengths: float, goodness: str = "mlp") -> Method:
    """Return heads with a recipe, whose strengths are tried."""
    return Method(addition=addition(strengths[0], goodness), strengths=strengths)


def _interleaved(spans: tuple[tuple[int, int], ...]) -> Method:
    """Return CwC as published: each layer ends with its BN, and learns in some epochs."""
    options = {"objective": "cwc", "norm": "none"}
    return Method(readout="classifier", options=options, spans=spans)


def _family(objective: Any, probe: ProbeRecipe = SHORT_PROBE, **more: Any) -> Method:
    return Method(options={"objective": objective}, probe=probe, **more)


# Interleaved layer training on MNIST, as published: where each layer's epochs end. All begin at 0.
# The authors list six layers; this is their list for the first four and the last one. An experiment
# may end before it.
MNIST_SPANS = ((0, 2), (0, 3), (0, 4), (0, 5), (0, 20))
# The fast list on CIFAR-10, a fifth as long, for four layers and the classifier.
FAST_SPANS = ((0, 3), (0, 4), (1, 6), (1, 8), (2, 10))
# One block after the other, as the authors of SCFF train; the classifier reads the last one.
SCFF_SPANS = ((0, 20), (20, 29), (20, 29))
SCFF_ON_MNIST = SCFF(
    positive_threshold=(4, 1), negative_threshold=(6, 1), penalty=(1e-4, 0), shift=2
)

METHODS = {
    "BP": Method(heads=False, local=False, readout="classifier"),
    "deep supervision": Method(local=False, readout="classifier"),
    "CwC": _with_head("cwc"),
    "SFF": Method(),
    "cosine": _with_head("cosine"),
    "cosine(4)": _with_head("cosine(4)"),
    "mlp": _with_head("mlp"),
    "mlp(256, 4)": _with_head("mlp(256, 4)"),
    "auto": _with_head("auto"),
    "deep supervision, mlp": _supervised("mlp"),
    "deep supervision, mlp(256, 4)": _supervised("mlp(256, 4)"),
    "deep supervision, auto": _supervised("auto"),
    "mlp, transport": _with(recipes.Transport, 0.3, 3.0),
    "mlp, alternating cuts": _with(recipes.Alternating, 1.0, 0.0),
    "mlp, coarse to fine": _with(recipes.CoarseToFine, 0.5, 1.0),
    "mlp, momentum auxiliary": _with(recipes.MomentumAuxiliary, 0.995, 0.9),
    "mlp, copied layers": _with(recipes.CopiedLayers, 1, 2),
    "mlp, contrast": _with(recipes.Contrast, 0.3, 1.0),
    "mlp, distillation": _with(recipes.Distillation, 0.3, 1.0),
    "mlp, boosting": _with(recipes.Boosting, 1.0, 0.3),
    "mlp, reconstruction": _with(recipes.Reconstruction, 5.0, 1.0),
    "mlp(256, 4), alternating cuts": _with(recipes.Alternating, 1.0, goodness="mlp(256, 4)"),
    "FF": _family("ff"),
    "FF, peers": _family(ForwardForward(peer=0.03)),
    "FF, small": _family(ForwardForward(reduction="mean", threshold=2.0)),
    # The sum of squares over an image is in the thousands, and so are the losses of wrong signs.
    "FF, spatial labels": _family(
        ForwardForward(labels="waves", reduction="mean", loss_form="symba")
    ),
    "FF, unsupervised": _family("ff-unsupervised"),
    "SCFF": _family(SCFF_ON_MNIST, LONG_PROBE, spans=SCFF_SPANS),
    # The layers of `Perceptron`, without the ReLU behind each.
    "SCFF, triangle": _family(
        replace(SCFF_ON_MNIST, triangle=True),
        LONG_PROBE,
        spans=SCFF_SPANS,
        cuts=("layer0_0", "layer1_0"),
    ),
    "CwC, ILT": _interleaved(MNIST_SPANS),
    "CwC, ILT fast": _interleaved(FAST_SPANS),
}
