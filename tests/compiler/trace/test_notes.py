from __future__ import annotations

from torch import nn

from sffx.compiler.trace.trace import trace
from tests.toys import Chain, Residual


def test_hooks_of_the_model_itself_are_named():
    model = Chain()
    assert trace(model).notes == ()
    model.register_forward_hook(lambda *_: None)
    (note,) = trace(model).notes
    assert note.startswith("the hooks of the model itself are no part of the cut model")


def test_only_the_outermost_unused_modules_are_named():
    model = Residual()
    model.block1.spare = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    (note,) = trace(model).notes
    assert note == "left out, since the logits do not depend on them: block1.spare"
