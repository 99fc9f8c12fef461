"""No function of torch takes a proxy for a tensor with data: that would end the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from tests.compiler.trace.oracle import Applies, assert_same_logits, cut_without_norms, leaf_names
from tests.toys import around

_PARTS = 4  # of the functions, each tried in a process of its own
# Tries every function and method of torch on a proxy beside numbers, in the forward of a model.
_SWEEP = """
import sys
import warnings
import torch
from torch import nn
from sffx.compiler.trace.trace import trace
from sffx.errors import TraceError

warnings.simplefilter("ignore")
NEVER = ("set_", "resize", "apply_", "map_", "map2_", "share_memory", "cuda", "save", "load",
         "profiler", "set_default", "use_deterministic", "pin_memory", "ipu", "xpu", "mtia",
         "register", "init", "multiprocess", "__reduce", "__setstate__", "rpc", "storage")
calls = {}
for owner in (torch, torch.nn.functional, torch.special, torch.linalg, torch.fft, torch.Tensor):
    for name in dir(owner):
        function = getattr(owner, name, None)
        if callable(function) and not isinstance(function, type):
            if not any(part in name for part in NEVER):
                calls[id(function)] = function

first, step = map(int, sys.argv[1:])
tried = list(calls.values())[first::step]

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        y = self.inner(x)
        tries = ((y,), (y, 2), (0.5, y), (y, y, 2), (y > 0, y, 0.0), (y, 1, y), ([y, y], 1))
        for function in tried:
            for arguments in tries:
                try:
                    function(*arguments)
                except Exception:
                    pass
        return y

try:
    trace(Net(), torch.zeros(1, 6))
except TraceError:
    pass
print("tried", len(tried))
"""


@pytest.mark.sampled(1)
@pytest.mark.parametrize("first", range(_PARTS))
def test_the_process_lives_whatever_a_proxy_is_passed_to(first):
    command = [sys.executable, "-c", _SWEEP, str(first), str(_PARTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 1000 // _PARTS


@pytest.mark.parametrize(
    "code",
    [
        lambda m, x: torch.pow(x, 2),
        lambda m, x: torch.where(x > 0, x, 0.0),
        lambda m, x: torch.remainder(x, 2),
        lambda m, x: torch.xlogy(x.relu(), 2.0),
        lambda m, x: x.to(torch.result_type(x, 2)),
        lambda m, x: torch.add(x, 2, alpha=3),
    ],
)
def test_functions_of_a_tensor_and_a_number_are_traced(code):
    model = around(Applies(code))
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    assert_same_logits(net, model)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.cumsum(1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.flip(1).cumsum(1).flip(1)


class _Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return -gradient


# Bound here, before a trace replaces `Function.apply`.
_scan, _same = _Scan.apply, _Same.apply


@pytest.mark.parametrize("function", [_scan, _same])
def test_an_autograd_function_bound_at_import_makes_a_leaf(function):
    model = around(Applies(lambda m, x: function(x)))
    net = cut_without_norms(model).train()
    assert leaf_names(net) == ["2"]
    assert_same_logits(net, model)


def test_items_of_a_tensor_made_in_the_forward_are_assigned():
    def masked(m: nn.Module, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[1], device=x.device)
        mask[x.shape[1] // 2 :] = 1.0
        x[:, 0] = 2.0
        return x * mask

    model = around(Applies(masked))
    net = cut_without_norms(model).train()
    assert not net.plan.leaves
    assert_same_logits(net, model)
