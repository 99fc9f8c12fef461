"""The entries that trainings put into checkpoints, and that `sffx-viz --checkpoint` and `sffx-export` read."""

from __future__ import annotations

ACCURACY_KEY = "sffx_accuracy"  # accuracies by block and readout, as `sffx.evaluate(net, loader).accuracy` has them
CUT_KEY = "sffx_cut"  # how the model was cut, `sffx.export.checkpoint.describe`; its "after" are the nodes after which
PLATEAU_KEY = "sffx_plateau"  # the state of a `BlockPlateau`
