"""The model and the trunk as copies that go through the same calls."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from sffx.comparison.runs import Outcome, Run, run_model, run_trunk
from sffx.comparison.state import HookCalls
from sffx.comparison.trunk import Trunk
from sffx.comparison.weights import drop_nothing, state_of
from sffx.errors import InputError
from sffx.net import plan_of
from sffx.tensors import copied


class Pair:
    """A copy of a model and the trunk of its cut model.

    Args:
        model: the plain model.
        net: the cut model.
        weights: other values of parameters and buffers, by name, which both get.
        drops: whether dropout layers drop.
    """

    def __init__(
        self, model: nn.Module, net: fx.GraphModule, weights: dict[str, Tensor], drops: bool
    ) -> None:
        self.model = copied_model(model)
        self.trunk = Trunk(net)
        notes = " ".join(plan_of(net).notes)
        # What the plan says is left out, is left out here as well.
        if "the hooks of the model itself" in notes:
            self.model._forward_hooks.clear()
            self.model._forward_pre_hooks.clear()
        held = self.trunk.state()
        own = state_of(self.model)
        with torch.no_grad():
            for name, value in weights.items():
                own[name].copy_(value)
                for tensor in held.get(name, []):
                    tensor.copy_(value)
        if not drops:
            drop_nothing(self.model)
            drop_nothing(self.trunk)

    def run(self, run: Run) -> tuple[Outcome, Outcome]:
        """Return the outcomes of the model and of the trunk."""
        expected = run_model(self.model, run, self.trunk.plan)
        if expected.failure is not None:
            self._restore_model()
            return expected, Outcome()
        return expected, run_trunk(self.trunk, run)

    def _restore_model(self) -> None:
        """Give the model, of which a call has failed, the state of the trunk, which did not run."""
        own = state_of(self.model)
        with torch.no_grad():
            for name, tensors in self.trunk.state().items():
                if name in own:
                    # Not by `copy_`: a state of each sample has the shape of the last batch.
                    own[name].data = tensors[0].detach().clone()


def copied_model(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises:
        InputError: it cannot be copied.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is a {type(model).__name__}, not a model. Hint: pass the one that was cut"
        )
    try:
        return copied(model)
    except Exception as cause:
        raise InputError(
            f"{type(model).__name__} cannot be copied: {cause}. Hint: a check runs on copies"
        ) from cause


def watch_hooks(pair: Pair) -> tuple[HookCalls, HookCalls]:
    """Count the calls of hooks in the model and in the trunk; the model's own do not count."""
    in_model, in_net = HookCalls(), HookCalls()
    for name, module in pair.model.named_modules():
        if name:
            in_model.watch(name, module)
    for name, module in pair.trunk.modules_by_name():
        in_net.watch(name, module)
    return in_model, in_net
