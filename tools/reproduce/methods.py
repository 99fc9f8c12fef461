"""The ways to train that are compared, each from the same network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sffx
from sffx.runtime.evaluate import block_scores, evaluating
from tools.reproduce.networks import classifier_of


@dataclass(frozen=True)
class Method:
    """How a network is trained.

    Attributes:
        heads: whether it is cut, or has at least the heads of a cut model.
        local: whether no gradient crosses a cut; with heads and without this it is backpropagation with deep supervision.
        readout: by which a run is judged: what is maximised in the search and decides when to stop.
        options: of `sffx.transform`.
    """

    heads: bool = True
    local: bool = True
    readout: str = "ensemble"
    options: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, model: nn.Module, policy: str, example: Tensor) -> nn.Module:
        if not self.heads:
            return model
        net = sffx.transform(model, policy=policy, example_input=example, **self.options)
        return net if self.local else joined(net)

    def groups(self, net: nn.Module, lr: float, classifier_lr: float) -> list[dict[str, Any]]:
        """Return the parameter groups: one for each block, or features and classifier; each is named."""
        if self.heads:
            return sffx.parameter_groups(net, lr, classifier_lr)
        last = list(classifier_of(net).parameters())
        own = {id(p) for p in last}
        features = [p for p in net.parameters() if id(p) not in own]
        return [
            {"params": features, "lr": lr, "name": "features"},
            {"params": last, "lr": classifier_lr, "name": "classifier"},
        ]

    def loss(self, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if not self.heads:
            return F.cross_entropy(net(x), y)
        return sffx.local_loss(net, x, y) if self.local else sffx.sff_loss(net(x), y)

    @torch.no_grad()
    def scores(self, net: nn.Module, batches: Iterable[Tensor]) -> Tensor:
        """Return what each block says in eval mode, the classifier last, (K, N, J); K is 1 without heads."""
        with evaluating(net):
            return torch.cat(
                [block_scores(net, x) if self.heads else net(x)[None] for x in batches], dim=1
            )


def joined(net: fx.GraphModule) -> fx.GraphModule:
    """Let gradients cross the cuts again: the same blocks, norms, heads and losses, trained by backpropagation (deep supervision)."""
    for node in list(net.graph.nodes):
        if node.op == "call_method" and node.target == "detach":
            node.replace_all_uses_with(node.args[0])
            net.graph.erase_node(node)
    net.graph.lint()
    net.recompile()
    return net


METHODS = {
    "BP": Method(heads=False, local=False, readout="classifier"),
    "deep supervision": Method(local=False, readout="classifier"),
    "CwC": Method(options={"goodness": "cwc"}),
    "SFF": Method(),
    "cosine": Method(options={"goodness": "cosine"}),
    "cosine(4)": Method(options={"goodness": "cosine(4)"}),
    "mlp": Method(options={"goodness": "mlp"}),
    "mlp(256, 4)": Method(options={"goodness": "mlp(256, 4)"}),
    "deep supervision, mlp": Method(local=False, options={"goodness": "mlp"}),
    "deep supervision, mlp(256, 4)": Method(local=False, options={"goodness": "mlp(256, 4)"}),
}
