"""Random numbers of a block: dropout that does not depend on what ran before it, or where.

Dropout draws from one stream of random numbers of the process. So what a block drops depends on
how many numbers the blocks before it drew. On several processes each would have its own stream.
Here each block has a stream of its own, made from a seed and the block's index.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from sffx.errors import InputError, shown
from sffx.kernels.scoped import scoped

_SEED: ContextVar[int | None] = ContextVar("seed of the blocks", default=None)


@contextmanager
def block_seeds(seed: int) -> Iterator[None]:
    """Give each block random numbers of its own, wherever stages run inside the context.

    The numbers depend on the seed and on the block's index. They are the same in one process and
    in a `Pipeline` over several. After each block, the random numbers of torch and of Python's
    `random` go on where they stood before it.

        for step, (x, y) in enumerate(loader):
            with sffx.block_seeds(step):
                sffx.local_step(net, x, y, optimizer)

    Args:
        seed: of this step. With the same seed in each step, dropout drops the same in each step.

    Raises:
        InputError: the seed is no integer.
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InputError(f"seed is {shown(seed)}, not an integer. Hint: the number of the step")
    with scoped(_SEED, seed):
        yield


def blocks_have_seeds() -> bool:
    """Return whether `block_seeds` gave a seed."""
    return _SEED.get() is not None


@contextmanager
def numbers_of_block(index: int, part: int = 0) -> Iterator[None]:
    """Draw the random numbers of one block inside the context, if `block_seeds` gave a seed.

    Args:
        index: of the block.
        part: 0 for the block and its head, 1 for the norms behind it.
    """
    seed = _SEED.get()
    if seed is None:
        yield
        return
    with untouched_randomness():
        own = mixed(seed, index, part) if part else mixed(seed, index)
        torch.manual_seed(own)
        random.seed(own)
        yield


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Leave the random numbers of torch and of Python as they were before the context."""
    state = random.getstate()
    # Without this list, torch warns of the time that several GPUs take. A seed sets all of them.
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)


def mixed(*numbers: int) -> int:
    """Return a seed made from several numbers. Seeds of similar numbers have nothing in common."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    # Torch takes seeds of 64 bits with a sign.
    return int.from_bytes(digest[:7], "big")
