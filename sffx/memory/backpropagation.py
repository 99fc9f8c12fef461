"""The peak memory of a step of backpropagation, the rival of a block-local step."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from sffx.compiler.fake import fake_copy, need_no_values
from sffx.extraction import fill
from sffx.inputs import constant_batch
from sffx.learning.losses import block_loss
from sffx.memory.count import count_memory
from sffx.net import CutModel
from sffx.plain import logits_of


@torch.inference_mode(False)
@torch.enable_grad()
def backpropagation_peak(net: CutModel, batch_size: int) -> int | None:
    """Return the peak of a step of the plain model by backpropagation with AdamW, in bytes.

    It is counted in the steady state, on fake tensors, as a user would train the model without
    sffx: no heads, no norms between blocks, no memory-saving rewrites.

    Args:
        net: what `transform` returned; it is not touched.
        batch_size: B.

    Returns:
        None if the plain model has no parameter to train, or does not run on fake tensors.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    probe = fake_copy(net, mode)
    model: nn.Module = probe.origin.model
    with FakeCopyMode(mode):
        fill(model, probe)
    # Some objectives cut another model than the user's.
    model = net.plan.objective.restored(model)
    need_no_values(model)
    model.train()
    with mode:
        device = next(model.parameters()).device
        x = constant_batch(net.plan.inputs, batch_size, device)
        plan = net.plan
        y = plan.task.example_targets((batch_size, *plan.classifier.shape), device)
        names = [each.name for each in net.plan.inputs]
        args, kwargs = net.plan.call_arguments(dict(zip(names, x, strict=True)))
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            return None  # the heads may learn on a frozen model
        optimizer = torch.optim.AdamW(trainable)

        def step() -> None:
            # In one expression, because a name for the logits would hold them in the backward pass.
            block_loss(
                logits_of(model(*args, **kwargs), plan.task, plan.num_classes, plan.output_keys),
                y,
                task=plan.task,
            ).backward()
            optimizer.step()
            optimizer.zero_grad()

        try:
            # The first step makes the optimizer's state.
            step()
            return count_memory(step, model=model, optimizer=optimizer).peak
        except Exception:
            # The trace settled what fake tensors have no answer for, such as a branch on values.
            return None
