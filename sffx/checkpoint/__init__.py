"""Write and read checkpoints. No other module knows their format.

A checkpoint is a mapping in a file of `torch.save`. Its entries are

- "net": the state dict of the model;
- "optimizer": the state dict of the optimizer;
- "sffx_accuracy": the accuracy of each readout, as `sffx.evaluate(net, loader).accuracy`;
- "sffx_cut": how the model was cut, as `net.plan.record()`; plain models have none;
- "sffx_versions": the versions of sffx and of torch that wrote the file;
- "sffx_layers": the kind and the options of each layer of the model that was cut;
- "sffx_calls": what the forward of that model calls, in order;
- "sffx_readout": the readout of the cut model, `net.readout.mode`;
- any other entry that the user wants to keep.

The reader also accepts checkpoints of Lightning and files with nothing but a state dict.
"""

from sffx.checkpoint.load import Checkpoint, load_checkpoint
from sffx.checkpoint.save import save_checkpoint

__all__ = ["Checkpoint", "load_checkpoint", "save_checkpoint"]
