"""`Pipeline`: the blocks of a cut model on several processes, which train at the same time.

A process owns a range of blocks. It receives the detached, normed output of the blocks before,
sends its own on, and learns from its own losses meanwhile. Nothing comes back. A block needs the
output of the block before at the same step and nothing else, so the result is exactly that of
`local_step` in one process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from sffx.checks import require_callable
from sffx.errors import InputError, shown
from sffx.kernels.precision import widened
from sffx.learning.losses import LossFunctions, check_targets, loss_functions
from sffx.net import CutModel
from sffx.runtime.evaluate import Evaluation, Totals, scores_by_name
from sffx.runtime.learn import (
    Lesson,
    OnBlock,
    learning_stages,
    require_train_mode,
)
from sffx.runtime.modes import evaluating
from sffx.runtime.optimizers import groups_of_stages
from sffx.runtime.pipeline.checks import (
    checked_depth,
    checked_timeout,
    device_of,
    require_learning,
    require_loader,
    require_values,
    usable,
)
from sffx.runtime.pipeline.division import divided
from sffx.runtime.pipeline.epoch import Batch, Epoch
from sffx.runtime.pipeline.forward import Forward
from sffx.runtime.pipeline.gather import (
    beside_tensors,
    gathered_tensors,
    load_beside_tensors,
    with_tensors,
)
from sffx.runtime.pipeline.losses import Report, mean_losses
from sffx.runtime.pipeline.ownership import (
    materialize,
    release,
    require_same_everywhere,
    summary,
    tensors_of,
)
from sffx.runtime.pipeline.places import find_place
from sffx.runtime.pipeline.ranks import Ranks
from sffx.runtime.pipeline.steps import Steps
from sffx.runtime.pipeline.training import Training
from sffx.runtime.randomness import block_seeds, mixed
from sffx.runtime.residency import Residency
from sffx.runtime.stage import Stage, stages_of
from sffx.runtime.step import Optimizers
from sffx.runtime.views import losses_of, require_no_loss

LOGGER = logging.getLogger("sffx")


class Pipeline:
    """The blocks of a cut model on several processes, which train at the same time.

        # torchrun --nproc-per-node 4 train.py
        torch.distributed.init_process_group()
        net = sffx.transform(model, example_input=x)
        pipe = sffx.Pipeline(net)
        optimizer = torch.optim.AdamW(pipe.parameter_groups(lr=1e-3))
        for epoch in range(30):
            losses = pipe.train(train_loader if pipe.first else None, optimizer)
            result = pipe.evaluate(val_loader if pipe.first else None)

    The weights, losses and accuracies are exactly those of `local_step` and `evaluate` in one
    process. Dropout draws the numbers of `block_seeds`, so it does not depend on the number of
    processes either.

    Every process must make the pipeline, with the same model. It takes the model over: the blocks
    of other processes lose their memory. A loader is given to the first stage only, and targets
    travel with the activations.

    Args:
        net: what `transform` returned, the same on every process. Its parameters may be on the meta
            device. Layers then draw new weights on the process that owns them.
        cuts: names of the blocks that begin the second stage, the third, and so on; or None to
            measure how long each block takes, and to balance the stages.
        group: the processes, all if None; or a device mesh with the axes stage and replica.
        replicas: copies of each stage. They train on batches of their own and average their
            gradients, as `DistributedDataParallel` does. The processes number stages x replicas,
            those of the first stage first.
        device: that this process computes on. None takes the model's own; for a model on the meta
            device, the present GPU, or the CPU.
        depth: how many batches may be on the way to the next stage. Each costs the memory of what
            crosses the cut.
        loss_fn: a block's loss from its goodness and y, or one for each block by name or in order,
            as `sff_loss` takes it; cross-entropy if None.
        example_input: a batch to measure blocks with, as the loader's x; None takes 32 random
            samples. Only the first process uses it.
        timeout: how long processes wait for one that does nothing, before all end with an error
            that names it; half an hour if None.

    Attributes:
        net: the cut model. The blocks of other processes have meta tensors.
        module: the own blocks, heads and norms, under their names in the cut model.
        place: the stage and the replica of this process.
        blocks: the names of the own blocks.
        seconds: what each block took when the stages were balanced, by name; empty with `cuts`.
        bytes_sent: to the next stage, so far.

    Raises:
        InputError: there is no process group; there are more processes than blocks; processes have
            different models; the model is offloaded, sharded or compiled, or its objective makes
            views; a weight is used by blocks of two stages; or an argument is not as
            described.
        ProcessError: another process failed.
    """

    def __init__(
        self,
        net: nn.Module,
        cuts: Iterable[str] | None = None,
        *,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        replicas: int | None = None,
        device: torch.device | str | int | None = None,
        depth: int = 2,
        loss_fn: LossFunctions | None = None,
        example_input: Any = None,
        timeout: timedelta | float | None = None,
    ) -> None:
        self.place = find_place(group, replicas)
        self._ranks = Ranks(self.place, checked_timeout(timeout))
        self.bytes_sent = 0
        # All that may fail in one process alone comes in here, or the others would wait for ever.
        with self._ranks.watch.reporting():
            self.net = usable(net)
            self.device = device_of(self.net, device)
            self._depth = checked_depth(depth)
            plan = self.net.plan
            require_no_loss(plan.objective, loss_fn)
            self._functions = loss_functions(loss_fn, len(plan.all_blocks))
            self._losses = losses_of(plan, self._functions)
            self._ranks.connect(self.device)
            require_same_everywhere(self._ranks.from_everyone(summary(self.net)))
            self._division = divided(self.net, cuts, example_input, self._ranks)
            self._stages = self._division.stages(self.place.stage)
            self._own_parts()
        self._forward = Forward(self.net, self.module)
        # `usable` has refused models with another residency.
        self._residency = Residency(self.net)

    @property
    def first(self) -> bool:
        """Whether this process is in the first stage, and so must have the loader."""
        return self.place.first

    @property
    def last(self) -> bool:
        """Whether this process is in the last stage."""
        return self.place.last

    @property
    def seconds(self) -> dict[str, float]:
        """What each block took when the stages were balanced, by name."""
        return self._division.seconds

    @property
    def blocks(self) -> list[str]:
        """The names of the blocks of this process, in order."""
        return [stage.name for stage in self._stages]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters of this process."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this process with their names in the cut model."""
        return self.module.named_parameters()

    def parameter_groups(
        self, lr: float, classifier_lr: float | None = None
    ) -> list[dict[str, Any]]:
        """Return a parameter group for each own block, as `sffx.parameter_groups` does.

        Args:
            lr: learning rate of the feature blocks and their heads.
            classifier_lr: learning rate of the classifier, `lr` where None.
        """
        learning = learning_stages(self.net, None)
        own = [stage for stage in self._stages if stage in learning]
        return groups_of_stages(own, lr, classifier_lr)

    def train(
        self,
        loader: Iterable[Any] | None,
        optimizer: Optimizers | None,
        *,
        accumulate: int = 1,
        blocks: Collection[str] | None = None,
        on_block: OnBlock | None = None,
    ) -> dict[str, float]:
        """Train on all batches of a loader, and return the mean loss of each block by name.

        All processes call it, and all get the losses of all blocks. Autocast works as around
        `local_step`. A hook of the optimizer (`register_step_pre_hook`) sees one block at a time,
        and can clip its gradients.

        Args:
            loader: yields (x, y) as `local_step` takes them; None on all but the first stage. Its
                replicas must have as many batches each.
            optimizer: over `parameter_groups`, or a mapping with an optimizer for each own block by
                name; None if no parameter of this process learns.
            accumulate: batches for each step of the optimizer, which uses the mean of their
                gradients. The last step of the loader may have fewer.
            blocks: names of the blocks that learn, the same on all processes, as
                `BlockSchedule.learning` returns them; all if None. Other blocks before the last of
                these run in eval mode and without gradients. Those behind it do not run.
            on_block: called with the name of each own block, its scores, (B, J) for classes, and
                its loss, both detached, before the block's parameters change.

        Returns:
            The losses of the blocks that learn by name: "block_0", ..., "classifier", each the mean
            over the samples.

        Raises:
            InputError: the loader is missing, empty, or on the wrong process; the loaders of
                replicas differ in length; or the batch, the model or the optimizer does not fit, as
                for `local_step`.
            ProcessError: another process failed.
        """
        with self._ranks.watch.reporting():
            require_loader(self.place, loader)
            require_values(self.net, self._parts, self._empty)
            require_train_mode(self.net)
            learning = learning_stages(self.net, blocks)
            require_learning(learning)
            lessons = self._lessons(learning, on_block)
            watch = self._ranks.watch
            replicas = self._ranks.connections.replicas
            steps = Steps(list(lessons), optimizer, accumulate, replicas, watch)
            names = None if blocks is None else [stage.name for stage in learning]
            seed = self._seed(accumulate, names)
            training = Training(self._forward, lessons, steps, self._residency)
            start = time.monotonic()
            waited_before = watch.waited
            self._train_epoch(loader, learning[-1], seed, training)
            steps.finish()
            seconds = time.monotonic() - start
            busy = 1 - (watch.waited - waited_before) / seconds
            return self._together(training.sums.report(busy))

    def _train_epoch(
        self, loader: Iterable[Any] | None, last: Stage, seed: int, training: Training
    ) -> None:
        """Learn from all batches.

        Args:
            loader: of the first stage, None elsewhere.
            last: the last stage that learns, in whatever process.
            seed: of the dropout, the same in all processes.
            training: learns from each batch.
        """
        # Processes behind the last block that learns have nothing to do.
        if self._stages[0].index > last.index:
            return
        epoch = self._epoch(loader, self._check_targets, trains=True, last=last)
        for step, batch in enumerate(epoch):
            with block_seeds(mixed(seed, step)):
                training.learn(batch, epoch)
        self.bytes_sent += epoch.bytes_sent

    @torch.no_grad()
    def evaluate(self, loader: Iterable[Any] | None) -> Evaluation:
        """Evaluate in eval mode, and return the same as `sffx.evaluate`, on all processes.

        Args:
            loader: yields (x, y) as `sffx.evaluate` takes them; None on all but the first stage.
                The samples of all replicas count. A replica may have fewer than others, or none.

        Raises:
            InputError: as for `sffx.evaluate`; or the loader is missing or on the wrong process.
            ProcessError: another process failed.
        """
        with self._ranks.watch.reporting(), evaluating(self.module):
            require_loader(self.place, loader)
            require_values(self.net, self._parts, self._empty)
            self._ranks.require_same_action("evaluates")
            totals = Totals(self.net)
            last = stages_of(self.net)[-1]
            epoch = self._epoch(loader, self._check_labels, trains=False, last=last)
            for batch in epoch:
                self._evaluate_batch(batch, epoch, totals)
            self.bytes_sent += epoch.bytes_sent
            together = Totals(self.net)
            for other in self._ranks.from_everyone(totals):
                together.merge(other)
            if not together.samples:
                raise InputError("the loader yielded no samples. Hint: pass data to evaluate on")
            return together.evaluation()

    def _evaluate_batch(self, batch: Batch, epoch: Epoch, totals: Totals) -> None:
        """Compute the scores of the own stages. The last process has those of all, and adds up."""
        for stage in self._stages:
            batch.scores.append(self._forward.scores(stage, batch.values))
            stage.hand_on(batch.values)
        if epoch.hands_over:
            epoch.send(batch)
            return
        scores = self.net.plan.task.gathered([widened(each) for each in batch.scores])
        totals.add(scores_by_name(self.net, scores), batch.y)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights and buffers of this process, by their names in the cut model.

        Those of all stages together are the state dict of the whole cut model.

        Returns:
            A mapping of names to tensors, which `torch.distributed.checkpoint` can save.
        """
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the weights of this process; entries of other processes are passed over.

        Args:
            state: what `state_dict` returned, or the state dict of the whole cut model.

        Raises:
            InputError: an entry of this process is missing, or has another shape.
        """
        # The names of other processes begin with their parts, such as "block_3".
        own = {}
        for name, value in state.items():
            if name.partition(".")[0] in self._parts:
                own[name] = value
        try:
            self.module.load_state_dict(own)
        except RuntimeError as error:
            raise InputError(
                f"the state does not fit {', '.join(self.blocks)}: {error}. "
                "Hint: pass the state of the same cut model, with its entries for these blocks"
            ) from error

    def optimizer_state_dict(self, optimizer: Optimizers | None) -> dict[str, Any]:
        """Return the state of the optimizer of this process, by names of the cut model.

        The keys of all stages are different ones. So the entries go into one distributed
        checkpoint, which loads into another number of processes as well.

        Args:
            optimizer: as `train` takes it.
        """
        # Not above, since it takes a second to import.
        from sffx.runtime.pipeline.optimizer_state import state_by_name

        return state_by_name(self.module, optimizer)

    def load_optimizer_state_dict(
        self, optimizer: Optimizers | None, state: dict[str, Any]
    ) -> None:
        """Load the state of an optimizer into that of this process.

        Args:
            optimizer: as `train` takes it.
            state: what `optimizer_state_dict` returned, loaded from a checkpoint.
        """
        from sffx.runtime.pipeline.optimizer_state import load_by_name

        load_by_name(self.module, optimizer, state)

    def gather(self, dst: int = 0) -> CutModel | None:
        """Return the whole cut model with the trained weights on one process, None on the others.

        It is on the CPU, and is an ordinary cut model: it can be saved, exported and extracted.

        Args:
            dst: rank of the process that gets it.

        Raises:
            InputError: `dst` is no rank of the pipeline.
            ProcessError: another process failed.
        """
        with self._ranks.watch.reporting():
            if dst not in self.place.everyone:
                raise InputError(f"dst is {shown(dst)}. Hint: the ranks are {self.place.everyone}")
            self._ranks.require_same_action(f"gathers the model in rank {dst}")
            received = gathered_tensors(self.net, self._division.parts(), dst, self._ranks)
            own_state = self._ranks.from_everyone(beside_tensors(self.module))
            if self.place.rank != dst:
                return None
            whole = with_tensors(self.net, received)
            load_beside_tensors(whole, own_state)
            return whole

    def __repr__(self) -> str:
        return f"Pipeline({self._ranks.name_of(self.place.rank)}, {self.device})"

    def _own_parts(self) -> None:
        """Keep the own parts on the device, and let go of those of others."""
        for index, parts in enumerate(self._division.parts()):
            if index == self.place.stage:
                self._parts = parts
            else:
                release(self.net, parts)
        self._empty = materialize(self.net, self._parts, self.device)
        self.module = nn.Module()
        for part in self._parts:
            self.module.add_module(part, self.net.get_submodule(part))
        # Layers that drew their weights have drawn other ones in each replica. Sharing counts as
        # writing, so what has no values is left out.
        own = tensors_of(self.net, self._parts)
        drawn = [tensor for name, tensor in own.items() if name not in self._empty]
        self._ranks.share_with_replicas(drawn)
        self._ranks.name_stages(self._division.blocks())

    # What follows happens in each epoch.

    def _epoch(
        self,
        loader: Iterable[Any] | None,
        check: Callable[[Tensor, int], None],
        *,
        trains: bool,
        last: Stage,
    ) -> Epoch:
        """Return the batches of a loader, as this process gets them and sends them on.

        Args:
            loader: of the first stage, None elsewhere.
            check: called with the targets of each batch and the number of its samples.
            trains: whether the stages learn.
            last: the last stage that runs, in whatever process.
        """
        return Epoch(
            self.net,
            [stage for stage in self._stages if stage.index <= last.index],
            self._ranks,
            self._depth,
            loader,
            check,
            trains=trains,
            sends=self._stages[-1].index < last.index,
        )

    def _check_targets(self, y: Tensor, samples: int) -> None:
        plan = self.net.plan
        check_targets(y, samples, plan.num_classes, self._functions, plan.task)
        plan.objective.check_targets(y, samples, plan.num_classes)

    def _check_labels(self, y: Tensor, samples: int) -> None:
        self.net.plan.task.check_labels(y, samples, self.net.plan.num_classes)

    def _lessons(self, learning: list[Stage], on_block: OnBlock | None) -> dict[Stage, Lesson]:
        """Return how each own stage learns in an epoch, if it is among those that do."""
        if on_block is not None:
            require_callable("on_block", on_block, ("name", "scores", "loss"))
        lessons = {}
        for stage in self._stages:
            if stage not in learning:
                continue
            function = self._losses[stage.index]
            lessons[stage] = Lesson(stage.trainable, function, on_block, hooks_wait=False)
        return lessons

    def _seed(self, accumulate: int, blocks: list[str] | None) -> int:
        """Return a seed for the dropout of an epoch, drawn by the first process."""
        drawn = int(torch.randint(2**62, (), device="cpu")) if self.first else None
        # The processes agree on the action by the same message.
        action = f"trains with accumulate={accumulate}"
        if blocks is not None:
            action += f" and blocks={blocks}"
        return int(self._ranks.require_same_action(action, drawn)[0])

    def _together(self, report: Report) -> dict[str, float]:
        """Return the mean loss of each block over the samples of all replicas."""
        reports = self._ranks.from_everyone(report)
        losses = mean_losses(reports)
        if self.place.rank == self.place.everyone[0]:
            of_rank = dict(zip(self.place.everyone, reports, strict=True))
            # One line for each stage, by its first replica.
            for first, *_ in self.place.ranks:
                name = self._ranks.name_of(first)
                busy = 100 * of_rank[first].busy
                LOGGER.info("%s was busy for %.0f %% of the epoch", name, busy)
        return losses
