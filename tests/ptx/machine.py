"""What a program's threads have: registers, parameters and memory, one lane a thread, block after block."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tests.ptx.flow import doubtful
from tests.ptx.forms import DTYPES
from tests.ptx.memory import GlobalMemory, SharedMemory, Space
from tests.ptx.parse import Address, Immediate, Instruction, Operand, Program, Register, Symbol, Unsupported

WARP = 32

Array = NDArray[Any]
Mask = NDArray[np.bool_] | Literal[True]
"""The lanes that take part; True: all of them."""


class Fault(RuntimeError):
    """What a GPU would stop at, or would not promise a result for."""


class Access(NamedTuple):
    instruction: str
    """`ld` or `st`."""
    space: str
    """`global` or `shared`."""
    width: int
    """In bytes, of what one thread moves at once."""


@dataclass
class Statistics:
    """What a launch took."""

    bytes: Counter[Access] = field(default_factory=Counter)
    """Moved, by all threads together."""
    instructions: Counter[str] = field(default_factory=Counter)
    """By opcode: how often a thread came by it, guarded off or not."""

    def share(self, instruction: str, space: str, width: int) -> float:
        """The part of the bytes that accesses of at least `width` bytes moved; not a number where there were none."""
        sizes = {access.width: n for access, n in self.bytes.items() if access[:2] == (instruction, space)}
        return sum(n for size, n in sizes.items() if size >= width) / (sum(sizes.values()) or float("nan"))


class Machine:
    """A number of blocks at once. What is asked for by operand is a view: it shows what is there when it is read."""

    def __init__(self, program: Program, blocks: int, shared_memory: int) -> None:
        """`shared_memory`: bytes a block."""
        if program.threads % WARP:
            raise Unsupported(f"{program.threads} threads a block are no whole warps")
        self.program, self.blocks, self.lanes = program, blocks, blocks * program.threads
        self.registers: dict[str, Array] = {
            name: np.zeros(self.lanes, DTYPES[type_]) for name, type_ in program.registers.items()
        }
        self.parameter_space = np.zeros(8 * len(program.parameters), np.uint8)
        self.parameters = {name: self.parameter_space[8 * i : 8 * i + 8] for i, name in enumerate(program.parameters)}
        self.thread = np.tile(np.arange(program.threads, dtype=np.uint32), blocks)
        self.block = [np.zeros(self.lanes, np.uint32) for _ in "xyz"]
        self.grid = [np.zeros(1, np.uint32) for _ in "xyz"]
        self.specials = {
            "%tid.x": self.thread,
            "%ntid.x": np.array([program.threads], np.uint32),
            **{f"%ctaid.{axis}": index for axis, index in zip("xyz", self.block, strict=True)},
            **{f"%nctaid.{axis}": size for axis, size in zip("xyz", self.grid, strict=True)},
        }
        self.shared = SharedMemory(shared_memory, blocks, program.threads)
        self.memory = GlobalMemory([])
        self.statistics = Statistics()
        self.finished = np.zeros(self.lanes, np.bool_)
        self.sound = {name: np.zeros(self.lanes, np.bool_) for name in doubtful(program)}
        """Where each of the registers that are not sure to do so holds what comes from what was written."""

    def start(
        self,
        grid: tuple[int, int, int],
        first_block: int,
        arguments: list[Any],
        memory: GlobalMemory,
        statistics: Statistics,
    ) -> None:
        """Make ready to run the blocks from number `first_block` on."""
        self.memory, self.statistics = memory, statistics
        number = np.repeat(np.arange(first_block, first_block + self.blocks), self.program.threads)
        self.block[0][:], self.block[1][:], self.block[2][:] = (
            number % grid[0],
            number // grid[0] % grid[1],
            number // (grid[0] * grid[1]),
        )
        for size, value in zip(self.grid, grid, strict=True):
            size[:] = value
        for (name, type_), argument in zip(self.program.parameters.items(), arguments, strict=True):
            self.parameters[name][:] = np.frombuffer(_bytes(argument, type_).ljust(8, b"\0"), np.uint8)
        self.shared.written[:] = False
        self.finished[:] = False
        for sound in self.sound.values():
            sound[:] = False

    def space(self, name: str) -> Space:
        return self.memory if name == "global" else self.shared

    def source(self, operand: Operand, type_: str, half: int = 0, narrower: bool = False) -> Array:
        """What `operand` holds in each lane, or in all of them; `half` of the halves of `x2`.

        `narrower`: a register may have more bits than the type, whose upper ones are passed over.

        Raises:
            Unsupported: for an operand that cannot have the type.
        """
        dtype, parts = np.dtype(DTYPES[type_]), 2 if type_.endswith("x2") else 1
        size = dtype.itemsize * parts
        match operand:
            case Register(name, negated=False) if name in self.registers:
                bits = self.registers[name]
            case Symbol(name) if name in self.specials:
                bits = self.specials[name]
            case Symbol(name) if name == self.program.shared:
                bits = np.zeros(1, f"u{size}")
            case Symbol(name) if name in self.parameters and size == 8:
                bits = np.array([8 * list(self.parameters).index(name)], np.uint64)
            case Immediate(value, None) if type_ == "pred":
                bits = np.array([value != 0])
            case Immediate(value, width) if width in (None, 8 * size):
                bits = np.array([value & (1 << 8 * size) - 1], f"u{size}")
            case _:
                raise Unsupported(f"{operand} as .{type_}")
        return _low_bits(bits, dtype, parts, half, narrower)

    def result(self, operand: Operand, type_: str, half: int = 0, wider: bool = False) -> Array:
        """Where to put the lanes' results of the type.

        `wider`: a register may have more bits than the type, which sign or zeros then fill.

        Raises:
            Unsupported: for an operand that cannot take the type.
        """
        if not isinstance(operand, Register) or operand.negated:
            raise Unsupported(f"{operand} as a result")
        register, dtype = self.registers[operand.name], np.dtype(DTYPES[type_])
        if wider and register.itemsize > dtype.itemsize and dtype.kind in "iu":
            return register.view(f"{dtype.kind}{register.itemsize}")
        return _low_bits(register, dtype, 2 if type_.endswith("x2") else 1, half, False)

    def address(self, operand: Operand) -> tuple[Array, int]:
        """The lanes' addresses, to which the offset, in bytes, is to be added."""
        if not isinstance(operand, Address):
            raise Unsupported(f"{operand} as an address")
        match operand.base:
            case Register(name) if self.registers[name].dtype == np.uint64:
                return self.registers[name].view(np.int64), operand.offset
            case Register(name) if self.registers[name].dtype == np.uint32:
                return self.registers[name], operand.offset
            case Symbol(name) if name == self.program.shared:
                return np.zeros(self.lanes, np.uint32), operand.offset
        raise Unsupported(f"{operand} as an address")

    def fault(self, what: str, lane: int, instruction: Instruction) -> Fault:
        block = tuple(int(index[lane]) for index in self.block)
        return Fault(f"{what}, thread {self.thread[lane]} of block {block} of {self.program.name}: {instruction.text}")


def _low_bits(bits: Array, dtype: np.dtype, parts: int, part: int, narrower: bool) -> Array:
    ratio = bits.itemsize // dtype.itemsize  # 2 for halves
    if (bits.dtype == np.bool_) != (dtype == np.bool_) or ratio < 1 or (ratio != parts and not narrower):
        raise Unsupported("a register of another width")
    return bits.view(dtype)[part if parts > 1 else 0 :: ratio]


def _bytes(argument: Any, type_: str) -> bytes:
    """As a parameter of the type holds it."""
    if isinstance(argument, torch.Tensor):
        argument = argument.data_ptr()
    size = int(type_[1:]) // 8
    if type_ in ("f32", "f64"):
        return struct.pack("<f" if type_ == "f32" else "<d", argument)
    if isinstance(argument, float):
        raise Unsupported(f"{argument} for a parameter of type {type_}")
    return (argument & (1 << 8 * size) - 1).to_bytes(size, "little")
