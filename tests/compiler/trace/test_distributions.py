"""Distributions and shapes in the forward of the model itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Size, Tensor, nn
from torch import distributions as D

import sffx


class _Calls(nn.Module):
    def __init__(self, code) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.code = code

    def forward(self, x: Tensor) -> Tensor:
        x = self.code(self.first(x).relu())
        return self.last(self.second(x).relu())


def _of_distribution(make):
    """Return code that draws in train mode, and takes a mean."""

    def code(x: Tensor) -> Tensor:
        given = make(x)
        return (given.rsample() if given.has_rsample else given.sample()) + given.mean

    return code


_DISTRIBUTIONS = {
    "normal": lambda x: D.Normal(x, F.softplus(x)),
    "checked": lambda x: D.Normal(x, 1.0, validate_args=True),
    "independent": lambda x: D.Independent(D.Normal(x, torch.ones_like(x)), 1),
    "multivariate": lambda x: D.MultivariateNormal(x, torch.eye(8)),
    "bernoulli": lambda x: D.Bernoulli(logits=x),
    "one hot": lambda x: D.OneHotCategorical(logits=x),
    "laplace": lambda x: D.Laplace(x, 1.0),
}
_SHAPES = {
    "categorical": lambda x: x * D.Categorical(logits=x).entropy()[:, None],
    "density": lambda x: D.Normal(torch.zeros(8), torch.ones(8)).log_prob(x),
    "divergence": lambda x: x + D.kl_divergence(D.Normal(x, 1.0), D.Normal(0.0, 1.0)),
    "tuple": lambda x: x.view(torch.Size((x.shape[0], 2, 4))).flatten(1),
    "generator": lambda x: x.view(torch.Size(size // 1 for size in x.shape)),
    "imported": lambda x: x + torch.zeros(Size([x.shape[0], 8])),
    "sum": lambda x: x.view(x.shape[:1] + torch.Size((2, 4))).flatten(1),
    "kind": lambda x: x * 2 if isinstance(x.shape, torch.Size) else x,
    "type": lambda x: x * 2 if type(x.shape) is torch.Size else x,
    "no kind": lambda x: x * 2 if isinstance(x.shape[0], torch.Size) else x,
    "count": lambda x: x / torch.Size((x.shape[1], 2)).numel(),
}


@pytest.mark.sampled(9)
@pytest.mark.parametrize(
    "code",
    [*map(_of_distribution, _DISTRIBUTIONS.values()), *_SHAPES.values()],
    ids=[*_DISTRIBUTIONS, *_SHAPES],
)
def test_code_in_the_forward_of_the_model_is_traced(code):
    model = _Calls(code)
    net = sffx.transform(model, "layer", torch.zeros(2, 6), check=False)
    assert len(net.plan) == 2
    assert sffx.check(model, net).difference is None


def test_a_note_says_that_the_values_of_arguments_are_not_checked(monkeypatch):
    # torch.compile switches the checks off for the rest of the process.
    monkeypatch.setattr(D.Distribution, "_validate_args", True)
    plan = sffx.plan(_Calls(lambda x: D.Normal(x, 1.0).mean), "layer", torch.zeros(2, 6))
    assert plan.notes == (
        "torch.distributions does not check the values of its arguments in the cut model",
    )
    with pytest.raises(ValueError, match="Expected parameter scale"):
        D.Normal(0.0, -1.0)
