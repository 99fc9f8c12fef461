"""What the field adds to local learning: each recipe beside heads as they are.

They are written as a user would write them: by `loss_fn`, or by an objective or heads of one's own.
Two need more. A head does not see the input of its block, so `Transport` has a hook. No step lets a
gradient cross some of the cuts, so `Alternating` walks over the blocks by itself. Where a
publication leaves something open, the docstring says what was taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sffx
from sffx.inputs import bind
from sffx.net import CutModel, plan_of
from sffx.objectives import Objective, Place
from sffx.runtime.modes import evaluating
from sffx.runtime.stage import stages_of
from sffx.runtime.walk import input_values, walk_attached
from tools.reproduce.data import Split
from tools.reproduce.recipe_heads import (
    ContrastHead,
    DeepHead,
    GroupedHead,
    MomentumHead,
    ReconstructionHead,
    TransportHead,
    mlp,
    supervised_contrast,
)


@dataclass(frozen=True)
class Addition:
    """What is added to heads; the base class adds nothing.

    Attributes:
        strength: a number of the recipe's own, which the search chooses.
        goodness: the heads, where the recipe does not make its own.
    """

    strength: float
    goodness: str = "mlp"

    def options(self, model: nn.Module, policy: str, example: Tensor) -> Mapping[str, Any]:
        """Return the options of `sffx.transform`."""
        return {"goodness": self.goodness}

    def attach(self, net: CutModel) -> None:
        """Change a new net, where options are not enough."""

    def begin_epoch(self, net: CutModel, epoch: int, epochs: int, split: Split) -> None:
        """Change what depends on the epoch, 0 for the first one."""

    def loss(self, net: CutModel, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss of a batch. Its backward pass gives every parameter its gradient."""
        return sffx.local_loss(net, x, y)


def heads_of(net: CutModel, kind: type[nn.Module]) -> dict[int, Any]:
    """Return the heads of a kind by the index of their block."""
    heads = {}
    for i in range(len(plan_of(net))):
        head = net.get_submodule(f"head_{i}")
        if isinstance(head, kind):
            heads[i] = head
    return heads


@dataclass(frozen=True)
class AddedColumn(Objective):
    """Cross-entropy, and the mean of the last column that a head gives in train mode."""

    goodness: ClassVar[str | None] = None

    @property
    def weight(self) -> float:
        """The factor of that mean."""
        return 1.0

    def head_shape(self, num_classes: int) -> tuple[int, ...]:
        return (num_classes + 1,)

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        return place.task.loss(scores[:, :-1], y) + self.weight * scores[:, -1].mean()


@dataclass(frozen=True)
class TransportObjective(AddedColumn):
    """Cross-entropy and `mean ||T(x) - x||^2 / (2 tau)`."""

    name: ClassVar[str] = "transport"
    tau: float = 1.0

    @property
    def weight(self) -> float:
        return 1 / (2 * self.tau)

    def make_head(self, block: sffx.Block, num_classes: int) -> nn.Module:
        return TransportHead(mlp(block, num_classes))


@dataclass(frozen=True)
class Transport(Addition):
    """Blocks that keep their shape shall move their input little (arXiv 2309.17357).

    The strength is tau. What a block moves is averaged over the values of a sample.
    """

    def options(self, model: nn.Module, policy: str, example: Tensor) -> Mapping[str, Any]:
        return {"objective": TransportObjective(self.strength)}

    def attach(self, net: CutModel) -> None:
        for i, head in heads_of(net, TransportHead).items():
            net.get_submodule(f"block_{i}").register_forward_pre_hook(head.remember)


@dataclass(frozen=True)
class ReconstructionObjective(AddedColumn):
    """Cross-entropy, and that of the pixels of a decoded image, with a weight for each block."""

    name: ClassVar[str] = "reconstruction"
    size: int = 32

    def make_head(self, block: sffx.Block, num_classes: int) -> nn.Module:
        return ReconstructionHead(block, num_classes, self.size)


@dataclass(frozen=True)
class Reconstruction(Addition):
    """Early blocks keep what restores the image, later ones learn the classes (InfoPro).

    arXiv 2101.10832. From the first block to the last, the weight of the decoder's loss falls
    linearly from the strength to 0, and that of the classes rises from 0 to 1. The authors take 5
    and end at 0 to 0.5. There the end of the network alone predicts. Here a head answers in the
    ensemble, so it learns the classes by a weight of 1, and only the block's gradient is scaled.
    """

    def options(self, model: nn.Module, policy: str, example: Tensor) -> Mapping[str, Any]:
        return {"objective": ReconstructionObjective(example.shape[-1])}

    def attach(self, net: CutModel) -> None:
        heads = heads_of(net, ReconstructionHead)
        for i, head in heads.items():
            head.share = i / (len(heads) - 1)
            head.weight = self.strength * (1 - head.share)

    def begin_epoch(self, net: CutModel, epoch: int, epochs: int, split: Split) -> None:
        for head in heads_of(net, ReconstructionHead).values():
            head.mean.copy_(split.mean)
            head.std.copy_(split.std)

    def loss(self, net: CutModel, x: Tensor, y: Tensor) -> Tensor:
        for head in heads_of(net, ReconstructionHead).values():
            head.show(x)
        return sffx.local_loss(net, x, y)


class Gate(nn.Module):
    """Stands in the place of a detach, and cuts the gradient unless it is open."""

    is_open = False

    def forward(self, y: Tensor) -> Tensor:
        """Return y, detached where the gate is shut."""
        return y if self.is_open else y.detach()


@dataclass(frozen=True)
class Alternating(Addition):
    """Two blocks learn together, and on odd steps the cuts lie one block later (Trifecta).

    On even steps these are blocks 0 and 1, 2 and 3, and so on; on odd steps 1 and 2, 3 and 4, the
    classifier counting as a block. The loss of a pair is that of its second block. The strength
    is the weight of the first one's. A pair holds the activations of two blocks.
    """

    def attach(self, net: CutModel) -> None:
        net.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        detaches = [node for node in net.graph.nodes if node.target == "detach"]
        for i, node in enumerate(detaches):
            net.add_submodule(f"gate_{i}", Gate())
            with net.graph.inserting_before(node):
                gate = net.graph.call_module(f"gate_{i}", node.args)
            node.replace_all_uses_with(gate)
            net.graph.erase_node(node)
        net.recompile()

    def loss(self, net: CutModel, x: Tensor, y: Tensor) -> Tensor:
        stages = stages_of(net)
        steps = net.get_buffer("steps")
        is_odd = int(steps) % 2
        steps += 1
        last = len(stages) - 1
        is_end = [i == last or (i + is_odd) % 2 == 1 for i in range(len(stages))]
        for i in range(last):
            gate: Any = net.get_submodule(f"gate_{i}")
            gate.is_open = not is_end[i]
        values = input_values(net, bind(plan_of(net), x))
        total = torch.zeros(())
        pair: list[Tensor] = []
        for stage, scores in walk_attached(stages, values):
            weight = 1.0 if is_end[stage.index] else self.strength
            pair.append(weight * F.cross_entropy(scores, y))
            if is_end[stage.index]:
                own = torch.stack(pair).sum()
                own.backward()  # here, so that its activations are freed
                total += own.detach()
                pair.clear()
        return total.requires_grad_()  # the gradients are there already


def group_counts(blocks: int, num_classes: int, share: float) -> list[int]:
    """Return how many groups each block learns.

    They are 2^k, and k rises with depth to log2 J, at the given share of the blocks.
    """
    counts = []
    for i in range(blocks):
        depth = min(1.0, (i + 1) / (blocks * share))
        counts.append(min(2 ** math.ceil(depth * math.log2(num_classes)), num_classes))
    return counts


def clustered(means: Tensor, count: int) -> Tensor:
    """Return the group of each class, (J,), by Ward's clustering of its mean features, (J, F)."""
    from scipy.cluster.hierarchy import fcluster, linkage

    groups = fcluster(linkage(means.numpy(), "ward"), count, criterion="maxclust")
    return torch.as_tensor(groups, dtype=torch.int64)


@dataclass(frozen=True)
class CoarseToFine(Addition):
    """Early blocks learn few groups of classes, later ones more (HCL-FF, arXiv 2605.24797).

    The groups are clusters of the class means of the last block after the first epoch, in which
    all blocks learn the classes. The strength is the share of the blocks at which the groups are
    the classes.
    """

    def options(self, model: nn.Module, policy: str, example: Tensor) -> Mapping[str, Any]:
        def make(block: sffx.Block, num_classes: int) -> nn.Module:
            return GroupedHead(mlp(block, num_classes), num_classes)

        return {"goodness": make}

    def begin_epoch(self, net: CutModel, epoch: int, epochs: int, split: Split) -> None:
        if epoch != 1:
            return
        heads = heads_of(net, GroupedHead)
        probe = sffx.LinearProbe(net, [f"block_{len(heads) - 1}"])
        features = probe.features(split.scaled(split.train.x))
        classes = len(heads[0].group_of)
        means = torch.stack([features[split.train.y == j].mean(0) for j in range(classes)])
        counts = group_counts(len(heads), classes, self.strength)
        for head, count in zip(heads.values(), counts, strict=True):
            head.group_of.copy_(clustered(means, count))


@dataclass(frozen=True)
class MomentumAuxiliary(Addition):
    """The head of a block has a slow copy of the next one's first layer (arXiv 2407.05623).

    The last block has no such layer behind it, and the head of `mlp`. The strength is the momentum.
    """

    def options(self, model: nn.Module, policy: str, example: Tensor) -> Mapping[str, Any]:
        firsts = {}
        for block, following in pairwise(sffx.plan(model, policy, example)):
            firsts[block.target] = model.get_submodule(following.modules[0])

        def make(block: sffx.Block, num_classes: int) -> nn.Module:
            layer = firsts.get(block.target)
            if layer is None:
                return mlp(block, num_classes)
            return MomentumHead(layer, block, num_classes)

        return {"goodness": make}

    def loss(self, net: CutModel, x: Tensor, y: Tensor) -> Tensor:
        # After the last step and before this one.
        for i, head in heads_of(net, MomentumHead).items():
            following = plan_of(net).blocks[i + 1]
            block = net.get_submodule(following.target)
            head.follow(block.get_submodule(following.modules[0]), self.strength)
        return sffx.local_loss(net, x, y)


@dataclass(frozen=True)
class CopiedLayers(Addition):
    """The head of a block begins with copies of the next blocks, with weights of their own.

    The strength is their number; the last blocks have fewer. AugLocal (arXiv 2402.17318) spreads
    the copied layers evenly over the rest of the network. Here they are the next ones.
    """

    def options(self, model: nn.Module, policy: str, example: Tensor) -> Mapping[str, Any]:
        net = sffx.transform(model, policy, example)
        plan = list(plan_of(net))

        def make(block: sffx.Block, num_classes: int) -> nn.Module:
            index = [each.target for each in plan].index(block.target)
            later = plan[index + 1 : index + 1 + int(self.strength)]
            if not later:
                return mlp(block, num_classes)
            layers = [net.get_submodule(each.target) for each in later]
            return DeepHead(layers, mlp(later[-1], num_classes))

        return {"goodness": make}


@dataclass(frozen=True)
class ContrastObjective(Objective):
    """Cross-entropy and the supervised contrast of the features, with a weight."""

    name: ClassVar[str] = "supervised contrast"
    goodness: ClassVar[str | None] = None
    weight: float = 1.0

    def make_head(self, block: sffx.Block, num_classes: int) -> nn.Module:
        return ContrastHead(block, num_classes)

    def head_shape(self, num_classes: int) -> tuple[int, ...]:
        return (num_classes + ContrastHead.SIZE,)

    def loss(self, scores: Tensor, y: Tensor, place: Place) -> Tensor:
        goodness, features = scores.tensor_split([place.num_classes], dim=1)
        return place.task.loss(goodness, y) + self.weight * supervised_contrast(features, y)


@dataclass(frozen=True)
class Contrast(Addition):
    """Blocks pull the samples of a class together as well (arXiv 2004.11362).

    The strength is the weight of that loss. The temperature falls linearly from 0.8 to 0.1 over
    the epochs.
    """

    def options(self, model: nn.Module, policy: str, example: Tensor) -> Mapping[str, Any]:
        return {"objective": ContrastObjective(self.strength)}

    def begin_epoch(self, net: CutModel, epoch: int, epochs: int, split: Split) -> None:
        share = epoch / max(epochs - 1, 1)
        for head in heads_of(net, ContrastHead).values():
            head.temperature.fill_(0.8 - 0.7 * share)


@dataclass(frozen=True)
class Distillation(Addition):
    """Each block also learns what the ensemble says, with the weights of the step before.

    The loss is cross-entropy and `strength * KL(ensemble || block)`. A block learns before the
    later ones have run, so the ensemble costs a prediction for each step.
    """

    def loss(self, net: CutModel, x: Tensor, y: Tensor) -> Tensor:
        with evaluating(net), torch.no_grad():
            teacher = net(x).log_softmax(1)

        def distilled(goodness: Tensor, y: Tensor) -> Tensor:
            own = goodness.log_softmax(1)
            divergence = F.kl_div(own, teacher, reduction="batchmean", log_target=True)
            return F.cross_entropy(goodness, y) + self.strength * divergence

        return sffx.local_loss(net, x, y, distilled)


@dataclass(frozen=True)
class Boosting(Addition):
    """Each block learns what the blocks before it leave wrong (BoostResNet, arXiv 1706.04964).

    Its loss is the cross-entropy of its goodness and `strength` times the sum of the earlier ones,
    detached. So the ensemble, which is the sum of all, is itself what learns. The classifier
    learns as ever. The authors train block after block; here all learn in each step.
    """

    def loss(self, net: CutModel, x: Tensor, y: Tensor) -> Tensor:
        earlier: Tensor | float = 0.0

        def boosted(goodness: Tensor, y: Tensor) -> Tensor:
            nonlocal earlier
            before = earlier
            earlier = before + goodness.detach()
            return F.cross_entropy(goodness + self.strength * before, y)

        return sffx.local_loss(net, x, y, [*[boosted] * len(plan_of(net)), None])
