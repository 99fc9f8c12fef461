"""Verify many models, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch

import sffx
from tools.zoo.entries import Entry, build, fitting_input
from tools.zoo.records import Record, new_record, read
from tools.zoo.verify import Unverified, check_refusal, run_model, verify_model

# Models whose ONNX file is compared with torch as well.
ONNX = {
    "torchvision/resnet18",
    "torchvision/mobilenet_v3_small",
    "torchvision/densenet121",
    "torchvision/shufflenet_v2_x0_5",
    "torchvision/vit_b_32",
    "torchvision/efficientnet_b0",
    "torchvision/googlenet",
    "torchvision/regnet_y_400mf",
    "torchvision/r3d_18",
    "timm/resnet10t",
    "timm/ghostnet_050",
    "timm/test_convnext",
    "timm/test_vit",
}


# How torch says that there is no more.
_NO_MEMORY = "[enforce fail at alloc_cpu.cpp"

# A model that takes more is ended by the system, and with it only its own process.
MEMORY = 16 * 2**30  # bytes of addresses


def measure(entry: Entry) -> None:
    """Verify one model, in this process, and write its record."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    record = new_record(entry)
    start = time.monotonic()
    try:
        _measure(entry, record)
    except Exception as failure:
        note_failure(failure, record)
    record.seconds = round(time.monotonic() - start, 1)
    record.write(entry.path)


def note_failure(failure: Exception, record: Record) -> None:
    """Note how a model has failed. One that needs too much memory has not been tried."""
    reason = f"{type(failure).__name__}: {failure}"
    if isinstance(failure, Unverified):
        reason = str(failure)
    if _NO_MEMORY in reason:
        record.finish("idle", f"needs more than {MEMORY // 2**30} GiB")
    elif isinstance(failure, sffx.SffxError) and "Hint: " in reason:
        record.finish("refused", reason)
    else:
        record.finish("wrong", reason)
    if os.environ.get("ZOO_TRACEBACK"):
        traceback.print_exc()


def _measure(entry: Entry, record: Record) -> None:
    torch.manual_seed(0)
    try:
        model = build(entry)
        inputs = {} if entry.refused else fitting_input(entry, model)
        if not entry.refused:
            run_model(model.train(), inputs)
            run_model(model.eval(), inputs)
    except Exception as failure:
        record.finish("idle", f"does not run by itself: {type(failure).__name__}: {failure}")
        return
    if entry.refused:
        check_refusal(model, record)
    else:
        verify_model(model, inputs, record, onnx=f"{entry.zoo}/{entry.name}" in ONNX)


def sweep(todo: list[Entry], jobs: int, limit: float) -> None:
    """Verify models in processes of their own.

    Args:
        todo: the models.
        jobs: how many at a time.
        limit: seconds for one model.
    """
    context = multiprocessing.get_context("forkserver")
    zoos = {entry.zoo.replace("-", "_") for entry in todo}
    context.set_forkserver_preload(["tools.zoo.sweep", "torch._dynamo", *zoos])
    supervise = partial(_supervised, context, limit)
    with ThreadPoolExecutor(jobs) as pool:
        for i, line in enumerate(pool.map(supervise, todo), start=1):
            print(f"{i:4}/{len(todo)}  {line}", flush=True)


def _supervised(context: Any, limit: float, entry: Entry) -> str:
    """Verify a model in a process of its own, and return a line about it."""
    entry.path.unlink(missing_ok=True)
    exitcode, was_killed = run_apart(context, measure, entry, limit)
    if not entry.path.exists():
        reason = f"the process died, exit code {exitcode}"
        if was_killed:
            reason = f"no answer after {limit:.0f} s"
        record = new_record(entry)
        record.finish("wrong", reason)
        record.write(entry.path)
    record = read(entry.path)
    result = record.outcome
    if record.reason:
        result += f": {record.reason}"
    elif record.poor:
        result += f", but poorly cut: {', '.join(record.poor)}"
    name = f"{entry.zoo}/{entry.name}"
    return f"{name}  {record.blocks} blocks  {record.seconds} s  {result}"


def run_apart(
    context: Any, function: Callable[[Any], None], argument: Any, limit: float
) -> tuple[int, bool]:
    """Call a function in a process of its own, for at most `limit` seconds.

    Returns:
        The exit code of the process, and whether it was killed because it took too long.
    """
    process = context.Process(target=function, args=(argument,))
    process.start()
    process.join(limit)
    is_late = process.is_alive()
    if is_late:
        process.kill()
        process.join()
    return process.exitcode, is_late
