"""What a compiler made of a kernel, read from its PTX or SASS: loops, their instructions and memory accesses.

PTX is what Triton writes, for any architecture; SASS, which nvdisasm prints, is what runs. PTX counts differ: ptxas
fuses and drops instructions (the `mov.b32 {a, b}, r` that unpack halves are free, or a conversion's operand), adds
those of 64-bit addresses, and unrolls short loops. Everything is counted statically: a loop's body is all that its
back edge encloses, both sides of a branch included.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from fastdistill.absent_gpu import SM

WIDE = 16
"""Bytes of the widest access of a thread that every architecture has."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of either language, as far as loops and their memory accesses need it."""

    load: int = 0
    """Bytes that a thread loads from global memory."""
    store: int = 0
    """Bytes that it stores there."""
    is_local: bool = False
    """Whether it accesses local memory, where spilled registers go."""
    is_predicated: bool = False
    target: str | None = None
    """The label that it may jump to."""
    falls_through: bool = True
    """Whether the next instruction may follow."""


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]
    """Index of the instruction that a label stands before."""


# Reading the two languages --------------------------------------------------------------------------------------------

_SASS_LINE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@\S+\s+)?([A-Z][\w.]*)([^;]*)")
_SASS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def parse_sass(text: str) -> Program:
    """The instructions of a kernel as `nvdisasm -c -novliw` prints them, without NOP."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := _SASS_LINE.match(line):
            predicate, opcode, operands = found.groups()
            if opcode != "NOP":
                instructions.append(_sass_instruction(opcode, operands, predicate is not None))
    return Program(instructions, labels)


def _sass_instruction(opcode: str, operands: str, is_predicated: bool) -> Instruction:
    root, *modifiers = opcode.split(".")
    width = next((_SASS_BYTES[each] for each in modifiers if each in _SASS_BYTES), 4)
    jump = re.match(r"(.*)`\((.*)\)", operands) if root == "BRA" else None
    return Instruction(
        load=width if root in ("LDG", "LD", "LDGSTS") else 0,
        store=width if root in ("STG", "ST") else 0,
        is_local=root in ("LDL", "STL"),
        is_predicated=is_predicated,
        target=jump[2] if jump else None,
        falls_through=root not in ("BRA", "BRX", "EXIT", "RET") or is_predicated or bool(jump and jump[1].strip()),
    )


_PTX_STATEMENT = re.compile(r"(@!?%\w+\s+)?([a-z]\w*)((?:[.:]+\w+)*)\s*(.*)", re.DOTALL)


def parse_ptx(text: str) -> Program:
    """The instructions of the first kernel of a PTX file; declarations, directives and labels are none."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    statement = ""
    for line in text[max(text.find(".entry"), 0) :].partition("{")[2].splitlines():
        code = line.partition("//")[0].strip()
        if label := re.fullmatch(r"([\w$]+):", code):
            labels[label[1]] = len(instructions)
        elif not code.startswith("."):
            *statements, statement = f"{statement} {code}".split(";")
            statement = statement.strip("{} ")
            parsed = (_PTX_STATEMENT.match(each.strip("{ ")) for each in statements)
            instructions += [_ptx_instruction(*each.groups("")) for each in parsed if each]
    return Program(instructions, labels)


def _ptx_instruction(predicate: str, root: str, modifiers: str, operands: str) -> Instruction:
    kinds = modifiers.split(".")
    vector = next((int(each[1:]) for each in kinds if re.fullmatch(r"v\d", each)), 1)
    bits = next((int(each[1:]) for each in kinds if re.fullmatch(r"[bfsu]\d+", each)), 0)
    return Instruction(
        load=vector * bits // 8 if root == "ld" and "global" in kinds else 0,
        store=vector * bits // 8 if root == "st" and "global" in kinds else 0,
        is_local=root in ("ld", "st") and "local" in kinds,
        is_predicated=bool(predicate),
        target=operands.strip() if root == "bra" else None,
        falls_through=root not in ("bra", "brx", "ret", "exit", "trap") or bool(predicate),
    )


# Loops ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """What the instructions of a loop do in one trip of one thread; bytes are those of global memory."""

    instructions: int
    load_bytes: int
    wide_load_bytes: int
    """Of these, by accesses of 16 bytes or more."""
    unmasked_wide_load_bytes: int
    """Of these, by instructions without a predicate."""
    store_bytes: int
    local_accesses: int

    @classmethod
    def of(cls, instructions: Iterable[Instruction]) -> Body:
        every = list(instructions)
        wide = [each for each in every if each.load >= WIDE]
        return cls(
            instructions=len(every),
            load_bytes=sum(each.load for each in every),
            wide_load_bytes=sum(each.load for each in wide),
            unmasked_wide_load_bytes=sum(each.load for each in wide if not each.is_predicated),
            store_bytes=sum(each.store for each in every),
            local_accesses=sum(each.is_local for each in every),
        )


class Loops(NamedTuple):
    innermost: list[Body]
    """Those that hold no other, in the order of the program."""
    together: Body
    """All instructions that are in any loop, each once."""


def find_loops(program: Program) -> Loops:
    """The natural loops of a program: a jump back to a block that every way to the jump passes (Aho et al., 9.6.6)."""
    blocks = _blocks(program)
    loops = _natural_loops(_successors(program, blocks))

    def body(members: Iterable[int]) -> Body:
        return Body.of(program.instructions[i] for block in sorted(members) for i in blocks[block])

    innermost = [loop for header, loop in sorted(loops.items()) if len(loop & loops.keys()) == 1]
    return Loops([body(loop) for loop in innermost], body(set().union(*loops.values())))


def main_loops(innermost: Sequence[Body]) -> list[Body]:
    """Where a kernel that streams tensors spends its time: one loop that only loads, one that also stores, or either.

    Each is, of the innermost loops that load 16 bytes at a time without a predicate, the one that loads most a trip,
    that is the most unrolled, and of several such the one of most instructions. Where no loop is of that kind, those
    that load 16 bytes with a predicate (a mask) are looked at, and then those that load at all. So neither the rest
    that unrolling leaves nor a masked or element-wise loop for a row's ends is a main loop beside a plain one. Two
    passes over the same tensors that both only load are one here: the costlier, where they are unrolled alike.
    """
    only_load = [loop for loop in innermost if loop.load_bytes and not loop.store_bytes]
    also_store = [loop for loop in innermost if loop.load_bytes and loop.store_bytes]
    return [
        max(_of_the_best_kind(loops), key=lambda loop: (loop.load_bytes, loop.instructions))
        for loops in (only_load, also_store)
        if loops
    ]


def _of_the_best_kind(loops: Sequence[Body]) -> Sequence[Body]:
    unmasked = [loop for loop in loops if loop.unmasked_wide_load_bytes]
    return unmasked or [loop for loop in loops if loop.wide_load_bytes] or loops


def _blocks(program: Program) -> list[range]:
    """Runs of instructions that are entered at the first and left at the last alone, by their indices."""
    count = len(program.instructions)
    after_jumps = {i + 1 for i, each in enumerate(program.instructions) if each.target or not each.falls_through}
    starts = sorted({0, *program.labels.values(), *after_jumps} - {count})
    return [range(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]


def _successors(program: Program, blocks: list[range]) -> list[list[int]]:
    block_at = {block.start: number for number, block in enumerate(blocks)}
    successors = []
    for block in blocks:
        last = program.instructions[block[-1]]
        followers = [program.labels[last.target]] if last.target else []
        followers += [block.stop] if last.falls_through else []
        successors.append([block_at[each] for each in followers if each in block_at])
    return successors


def _natural_loops(successors: list[list[int]]) -> dict[int, set[int]]:
    """Blocks of each loop by its header, the block that is entered first."""
    reachable = _reachable(successors)
    predecessors: dict[int, list[int]] = {block: [] for block in reachable}
    for block in reachable:
        for follower in successors[block]:
            predecessors[follower].append(block)
    dominators = _dominators(reachable, predecessors)
    loops: dict[int, set[int]] = {}
    for header in reachable:
        for end in predecessors[header]:
            if header in dominators[end]:
                loop, pending = loops.setdefault(header, {header}), [end]
                while pending:
                    block = pending.pop()
                    if block not in loop:
                        loop.add(block)
                        pending += predecessors[block]
    return loops


def _reachable(successors: list[list[int]]) -> set[int]:
    reached, pending = set(), [0] if successors else []
    while pending:
        block = pending.pop()
        if block not in reached:
            reached.add(block)
            pending += successors[block]
    return reached


def _dominators(reachable: set[int], predecessors: dict[int, list[int]]) -> dict[int, set[int]]:
    """For each block those that every way to it passes, itself included."""
    dominators = {block: set(reachable) for block in reachable} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in sorted(reachable - {0}):
            passed = set.intersection(*(dominators[each] for each in predecessors[block])) | {block}
            changed |= passed != dominators[block]
            dominators[block] = passed
    return dominators


# Registers, occupancy, disassembly ------------------------------------------------------------------------------------


class Occupancy(NamedTuple):
    blocks: int
    """That one streaming multiprocessor can hold."""
    share: float
    """Of its warps that they fill."""
    limit: str
    """What no further block finds enough of: "warps", "blocks", "registers" or "shared memory"."""


def occupancy(arch: int, sm: SM, registers: int, warps: int, shared_memory: int) -> Occupancy:
    """How many blocks of `warps` warps fit on a multiprocessor, by the rules of NVIDIA's cuda_occupancy.h.

    `registers` are those of a thread, `shared_memory` bytes of a block. A warp gets its registers in units of 256 from
    one of the multiprocessor's 4 parts (2 on sm_60), a block its shared memory in units of 128 bytes (256 before 8.0),
    what the system reserves included.
    """
    parts = 2 if arch == 60 else 4
    warps_by_registers = parts * (sm.registers // parts // _round_up(32 * registers, 256))
    memory = _round_up(shared_memory + sm.reserved_shared_memory, 128 if arch >= 80 else 256)
    limits = {
        "warps": sm.warps // warps,
        "blocks": sm.blocks,
        "registers": warps_by_registers // warps,
        "shared memory": sm.shared_memory // memory if memory else sm.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps / sm.warps, limit)


def _round_up(value: int, unit: int) -> int:
    return math.ceil(value / unit) * unit


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread, from Triton's cuobjdump, which knows every architecture."""
    from triton import knobs

    told = _run_on(cubin, knobs.nvidia.cuobjdump.path, "-res-usage").stdout
    usage = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def disassemblers() -> list[str]:
    """Paths of nvdisasm: what the environment variable NVDISASM names, then Triton's own."""
    from triton import knobs

    named = os.environ.get("NVDISASM")
    return [*([named] if named else []), knobs.nvidia.nvdisasm.path]


def disassemble(cubin: bytes) -> str | None:
    """SASS, kept in Triton's cache; None if no nvdisasm knows the architecture, as CUDA 13's do not know below 7.5."""
    from triton.runtime.cache import get_cache_manager

    for tool in disassemblers():
        cache = get_cache_manager(hashlib.sha256(tool_version(tool).encode() + cubin).hexdigest())
        if kept := cache.get_file("sass"):
            return Path(kept).read_text()
        done = _run_on(cubin, tool, "-c", "-novliw")
        if done.returncode == 0 and done.stdout:
            cache.put(done.stdout, "sass", binary=False)
            return done.stdout
    return None


@functools.cache
def tool_version(path: str) -> str:
    """Of a program of the CUDA toolkit: "13.1.80" for example.

    Raises:
        ValueError: if it is none, or cannot be run.
    """
    try:
        told = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise ValueError(f"{path} must be a program of the CUDA toolkit: {error.strerror}") from error
    if (found := re.search(r"\bV(\d[\d.]*)", told)) is None:
        raise ValueError(f"{path} must be a program of the CUDA toolkit: its --version printed {told[:80]!r}")
    return found[1]


def _run_on(content: bytes, *command: str) -> subprocess.CompletedProcess[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True)
