"""Cut every model of a zoo and verify the result, one process for each model.

    python -m tools.zoo --jobs 2                     # all zoos that are installed, then the table
    python -m tools.zoo --zoo timm --only vit --again
    python -m tools.zoo --zoo monai --install        # fetch a package first, into build/zoo
    python -m tools.zoo --table                      # the table alone, from the records

A zoo is a package of models: one module of `tools/zoo/packages`. Those that are no dependency of
this project install on demand, into `build/zoo`, and leave the environment as it is.

A model with a record is skipped. A model is verified when all of this holds (`verify_model`):

- `sffx.transform` cuts it by the default policy, with no exception made for it. Two feature blocks
  or more come out, or the plan says why not.
- `sffx.check` finds no difference: the trunk computes the same as the original, in train and in
  eval mode, for other batch sizes and other sizes, with the same gradients and buffers, and the
  original comes back. Weights that start as constants (zeroed heads, layer scales) are drawn anew,
  and BN is calibrated before. Outputs must differ between samples.
- In eval mode no sample changes the scores of another, at any block.
- Each trainable parameter that backpropagation reaches has a gradient from exactly one block's
  loss, and has it after a `local_loss` step.
- For a sample of families, the ONNX file agrees with torch.

A verified model is *well cut* if no block and no leaf holds more than a third of the parameters. A
single layer that holds more than a third by itself does not count, since no cut can divide it. Nor
does a single residual block, with one join where its layers run once.

A model is *refused* if the error is one of sffx, with a hint. Everything else is *wrong*: another
error, an error without a hint, a difference, the end of the process, no answer in time.

Models are built with 10 classes and random weights. They run at the smallest image size that they
accept.
"""
