"""The order in which a program's instructions can run, and what is sure of it before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tests.ptx.parse import Instruction, Program, Symbol, Unsupported


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other: the first is where jumps lead, the last alone may be one."""

    instructions: list[Instruction]
    following: int
    """The block after it in the text, as an index of blocks, whose number is the end."""
    target: int | None
    """Where its jump leads; None without one."""

    @property
    def jump(self) -> Instruction | None:
        return None if self.target is None else self.instructions[-1]

    @property
    def straight(self) -> list[Instruction]:
        """Those before the jump."""
        return self.instructions if self.target is None else self.instructions[:-1]

    @property
    def successors(self) -> list[int]:
        """The blocks that may run next."""
        targets = [] if self.target is None else [self.target]
        return targets if self.jump and self.jump.guard is None else [*targets, self.following]


def blocks(program: Program) -> list[Block]:
    """In `running_order`.

    Raises:
        Unsupported: for a jump that leads nowhere, and where not the first block comes first.
    """
    instructions = program.instructions
    starts, targets = {0, len(instructions)}, {}
    for i, instruction in enumerate(instructions):
        if instruction.name in ("bra", "ret"):
            starts.add(i + 1)
            targets[i] = _target(instruction, program)
            starts.add(targets[i])
    ordered = sorted(starts)
    number = {start: i for i, start in enumerate(ordered)}
    in_text = [
        Block(instructions[start:end], number[end], number[targets[end - 1]] if end - 1 in targets else None)
        for start, end in pairwise(ordered)
    ]
    leads_to = np.zeros((len(in_text), len(in_text) + 1), np.bool_)
    for i, block in enumerate(in_text):
        leads_to[i, block.successors] = True
    order = running_order(leads_to[:, :-1])
    if order[:1] != [0]:
        raise Unsupported("code that nothing leads to")
    rank = {i: place for place, i in enumerate([*order, len(order)])}
    return [
        Block(block.instructions, rank[block.following], None if block.target is None else rank[block.target])
        for block in (in_text[i] for i in order)
    ]


def running_order(leads_to: NDArray[np.bool_]) -> list[int]:
    """Blocks in an order in which lanes that branched apart meet again where their ways join, if the first runs first.

    A block comes after all that lead to it, and a loop whole before what follows it; within the loop the same holds
    but for the jumps back to where it is entered. The order of the text does not do: a compiler may put one side of a
    branch behind the place where the sides join. `leads_to` is [block, successor].
    """
    reaches = leads_to | np.eye(len(leads_to), dtype=np.bool_)
    for between in range(len(leads_to)):
        reaches |= np.outer(reaches[:, between], reaches[between])
    loops = reaches & reaches.T
    order: list[int] = []
    # What reaches a block reaches all beyond it too, and so do those: these have more before them.
    for first in sorted(set(loops.argmax(axis=1).tolist()), key=lambda i: (int(reaches[:, i].sum()), i)):
        loop = np.flatnonzero(loops[first])
        if len(loop) == 1:
            order.append(first)
            continue
        within = leads_to[np.ix_(loop, loop)]
        entered = leads_to[~loops[first]][:, loop].any(axis=0)
        within[:, int(entered.argmax())] = False
        order.extend(loop[running_order(within)].tolist())
    return order


def _target(jump: Instruction, program: Program) -> int:
    match jump.opcode, jump.operands:
        case "ret", ():
            return len(program.instructions)
        case (("bra" | "bra.uni"), (Symbol(label),)) if label in program.labels:
            return program.labels[label]
    raise Unsupported(f"the jump {jump.text!r}")


def doubtful(program: Program) -> set[str]:
    """The registers that may hold nothing, or what was computed from nothing, as far as can be told beforehand.

    They are those that some path reads without having written them, and those that are computed from these. A write
    under a guard proves nothing.
    """
    code = blocks(program)
    sure: list[set[str] | None] = [None] * (len(code) + 1)  # written on every path to a block; None: no path found yet
    sure[0] = set()
    found: set[str] = set()
    todo = [0]
    while todo:
        i = todo.pop()
        if i == len(code):
            continue
        written = set(sure[i] or ())
        for instruction in code[i].instructions:
            found.update(name for name in instruction.needs + instruction.uses if name not in written)
            if instruction.guard is None:
                written.update(instruction.writes)
        for successor in code[i].successors:
            before = sure[successor]
            now = written if before is None else before & written
            if now != before:
                sure[successor] = now
                todo.append(successor)
    count = -1
    while count != len(found):
        count = len(found)
        for instruction in program.instructions:
            if not found.isdisjoint(instruction.uses):
                found.update(instruction.writes)
    return found
