"""Runs a program on a CPU: every thread of many blocks at once, as the lanes of NumPy arrays.

A GPU's faults, and what a GPU gives no fixed result for, raise a `Fault`. Races between threads are not seen: lanes go
in step, as far as their branches agree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from tests.ptx.flow import blocks
from tests.ptx.instructions import step_of, taken_by
from tests.ptx.machine import Machine, Mask, Statistics
from tests.ptx.memory import GlobalMemory
from tests.ptx.parse import Program, parse

_parsed = lru_cache(maxsize=64)(parse)

LANES_AT_ONCE = 8192
"""A register of so many is small enough for a CPU's cache, and large enough that NumPy's own time is most."""


def run(ptx: str, grid: tuple[int, int, int], arguments: list[Any], shared_memory: int = 0) -> Statistics:
    """Run the kernel in the text `ptx` on the memory of the CPU tensors in `arguments`.

    Args:
        arguments: tensors and numbers in the order of the kernel's parameters; those left, Triton's own, are 0.
        shared_memory: bytes a block.

    Raises:
        Unsupported: for PTX that is not known.
        Fault: for what a GPU would stop at, or has no fixed result for; it names the instruction and the thread.
    """
    program = _parsed(ptx)
    arguments = arguments + [0] * (len(program.parameters) - len(arguments))
    memory = GlobalMemory(argument for argument in arguments if isinstance(argument, torch.Tensor))
    statistics = Statistics()
    total, at_once = math.prod(grid), max(1, LANES_AT_ONCE // program.threads)
    for first in range(0, total, at_once):
        runner = _runner(program, min(at_once, total - first), shared_memory)
        runner.machine.start(grid, first, arguments, memory, statistics)
        with np.errstate(all="ignore"):  # of lanes that do not take part, too
            runner.run()
    return statistics


class _Runner:
    """Some blocks of a program, ready to run."""

    def __init__(self, program: Program, blocks_at_once: int, shared_memory: int) -> None:
        self.machine = Machine(program, blocks_at_once, shared_memory)
        self.blocks = blocks(program)
        self.opcodes = [Counter(instruction.opcode for instruction in block.instructions) for block in self.blocks]
        self.steps = [[step_of(each, self.machine) for each in block.straight] for block in self.blocks]
        self.jumps: list[tuple[int, Callable[[Mask], Mask]] | None] = [
            None if block.jump is None or block.target is None else (block.target, taken_by(block.jump, self.machine))
            for block in self.blocks
        ]

    def run(self) -> None:
        """Lanes at the first block run first, so that those which branched apart meet again."""
        machine, end = self.machine, len(self.blocks)
        executed = [0] * end
        lanes_at = np.zeros(machine.lanes, np.intp)  # indices of blocks; not kept while all lanes are at one
        at, mask = 0, True
        while at < end:
            executed[at] += machine.lanes if mask is True else int(np.count_nonzero(mask))
            for step in self.steps[at]:
                step(mask)
            following = self.blocks[at].following
            target, taken = following, mask
            if jump := self.jumps[at]:
                target, taken = jump[0], jump[1](mask)
            if mask is True and (taken is True or not taken.any()):
                at = target if taken is True else following
                continue
            lanes_at[... if mask is True else mask] = following
            lanes_at[taken] = target
            machine.finished[:] = lanes_at == end
            at = int(lanes_at.min())
            mask = lanes_at == at
            if mask.all():
                mask = True
        for opcodes, times in zip(self.opcodes, executed, strict=True):
            for opcode, count in opcodes.items():
                machine.statistics.instructions[opcode] += count * times


_runner = lru_cache(maxsize=8)(_Runner)
