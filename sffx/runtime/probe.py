"""A linear classifier on the outputs of several blocks: what a net that learned has learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sffx.blocks import Block, BlockPlan
from sffx.checks import positive_integer, require_block_names
from sffx.errors import InputError
from sffx.inputs import batch_size, bind
from sffx.kernels.precision import widened
from sffx.learning.norms import feature_norm
from sffx.learning.pooling import features_of, num_features
from sffx.net import cut_model, plan_of
from sffx.parts import is_trial
from sffx.runtime.walk import run_blocks
from sffx.tasks import CLASSIFICATION


class LinearProbe(nn.Module):
    """A linear softmax on the normalised outputs of some blocks (arXiv 2212.13345, section 3.2).

    The output of each block is pooled, as `regions` says, and then normalised by the objective's
    norm. The features of all blocks are concatenated, and one linear layer gives the logits. The
    net computes the features in eval mode and without gradients, so an ordinary loop over
    `probe.parameters()` trains the linear layer alone. With labels in the input (`objective="ff"`)
    the features are those of the neutral label.

    The net is no submodule of the probe: the probe's state dict and `probe.to(...)` concern the
    linear layer only.

    Args:
        net: what `transform` returned, with any objective; its weights are used as they are.
        blocks: names of blocks; None for all but those that the objective's ensemble leaves out.
        regions: to which images and volumes are pooled, along each axis of space. Tokens are
            averaged, flat values are taken as they are.

    Attributes:
        blocks: names of the blocks, in order.
        linear: the layer that learns.

    Raises:
        InputError: `net` is no cut model or does not tell classes of a sample apart, a block is not
            there, or a block holds instances of samples.
    """

    def __init__(
        self, net: nn.Module, blocks: Sequence[str] | None = None, *, regions: int = 2
    ) -> None:
        super().__init__()
        cut = cut_model(net)
        plan = cut.plan
        if plan.task != CLASSIFICATION:
            raise InputError(
                f"a linear probe tells classes of a sample apart, not sffx.tasks.{plan.task!r}. "
                "Hint: evaluate shows what each block knows"
            )
        chosen = _chosen(plan, blocks)
        self.blocks = tuple(block.target for block in chosen)
        self.regions = positive_integer("regions", regions)
        self.activation = plan.objective.probe_activation()
        self.norm = feature_norm(plan.objective.norm)
        # In a tuple, so that the net does not become a submodule.
        self._net = (cut,)
        features = 0
        for block in chosen:
            features += num_features(block.channels, len(block.shape) - 1, self.regions)
        like = next(p for p in cut.parameters() if p.is_floating_point())
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.linear = nn.Linear(features, plan.num_classes, device=like.device, dtype=dtype)

    def forward(self, x: Any) -> Tensor:
        """Return the logits, (B, J).

        Args:
            x: the input of the net.
        """
        logits: Tensor = self.linear(self.features(x))
        return logits

    @torch.no_grad()
    def features(self, x: Any) -> Tensor:
        """Return the features of a batch, (B, features), without gradient.

        They do not change while the probe learns. So a loop may compute them once, and train
        `linear` on them.

        Args:
            x: the input of the net.
        """
        net = self._net[0]
        plan = plan_of(net)
        inputs = bind(plan, x)
        samples = batch_size(inputs)
        single = plan.objective.feature_inputs(inputs, plan.num_classes)
        features: dict[str, Tensor] = {}
        last = 0
        handles = []
        try:
            for index, block in enumerate(plan):
                if block.target in self.blocks:
                    last = index
                    mask = _mask(plan, block, inputs)
                    keep = self._keeping(features, block, mask, samples)
                    part = net.get_submodule(block.target)
                    handles.append(part.register_forward_hook(keep))
            with _without_trials(net):
                run_blocks(net, single, last)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([features[name] for name in self.blocks], dim=1)

    def _keeping(
        self, features: dict[str, Tensor], block: Block, mask: Tensor | None, samples: int
    ) -> Callable[..., None]:
        """Return a forward hook of a block that keeps its features.

        Args:
            features: by the name of the block; the hook adds the block's.
            block: its plan.
            mask: (B, T), nonzero at real tokens, if it has one.
            samples: B. An objective may run further rows.
        """

        def keep(module: nn.Module, args: Any, returned: Any) -> None:
            # A block with side values returns a tuple.
            output = returned[0] if block.sides else returned
            channels_first = widened(output[:samples]).movedim(block.channel_axis, 1)
            if self.activation is not None:
                channels_first = self.activation(channels_first)
            spatial = channels_first.ndim - 2
            pooled = features_of(channels_first, mask, spatial, self.regions)
            features[block.target] = self.norm(pooled)

        return keep

    def extra_repr(self) -> str:
        """Return what the module's `repr` shows of it."""
        return f"blocks={list(self.blocks)}, regions={self.regions}"


def _chosen(plan: BlockPlan, names: Sequence[str] | None) -> list[Block]:
    """Return the blocks of some names, in order.

    Raises:
        InputError: a block is not there, none is named, or one holds instances of samples.
    """
    skips = min(plan.objective.skips, len(plan) - 1)
    if names is None:
        names = [block.target for block in plan.blocks[skips:]]
    require_block_names(names, [block.target for block in plan])
    chosen = [block for block in plan if block.target in names]
    for block in chosen:
        if block.is_folded:
            raise InputError(
                f"{block.target} ({block.name}) holds instances of samples, which have no "
                "features of one sample. Hint: choose other blocks"
            )
    return chosen


def _mask(plan: BlockPlan, block: Block, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return the mask of the real tokens in a block's output, None where it has none."""
    for each in plan.inputs:
        if block.mask and block.mask in (each.name, each.value):
            mask: Tensor = inputs[each.name]
            return mask
    return None


@contextmanager
def _without_trials(net: fx.GraphModule) -> Iterator[None]:
    """Let each sample run once: in train mode, trials and choices return what they are given."""
    trials = [module for name, module in net.named_children() if is_trial(name)]
    modes = [module.training for module in trials]
    try:
        for module in trials:
            module.training = True
        yield
    finally:
        for module, mode in zip(trials, modes, strict=True):
            module.training = mode
