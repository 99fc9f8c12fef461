"""Blocks trained in parallel: each process owns a range of blocks, and nothing comes back.

pipeline    Pipeline: the public class
places      which process has which stage and replica, and their connections
division    which blocks each stage has
balance     how blocks are divided so that the slowest stage is fastest
ownership   what a process owns, and how it lets go of the rest
message     a message between two stages, as bytes
link        sending and receiving, ahead of time
epoch       the batches of an epoch on one process
forward     forward passes of the own blocks
training    how the own blocks learn in an epoch
watch       waiting for others, and naming the one that failed
gather      all parts on one process
"""

from __future__ import annotations

from sffx.runtime.pipeline.pipeline import Pipeline

__all__ = ["Pipeline"]
