"""The entries that trainings put into checkpoints beside the weights."""

from __future__ import annotations

ACCURACY_KEY = "sffx_accuracy"  # accuracies by block and readout, as `sffx.evaluate(net, loader).accuracy` has them
CUT_KEY = "sffx_cut"  # how the model was cut, as `net.plan.record()` says it; "after" names the output of each block
PLATEAU_KEY = "sffx_plateau"  # the state of a `BlockPlateau`
