"""PTX as text -> a `Program`: one kernel's parameters, registers and instructions.

The grammar is that of the PTX ISA, chapters 4, 5 and 7, as far as Triton writes it: one kernel a text, no functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple


class Unsupported(ValueError):
    """PTX that is not known here; the message quotes it."""


class Register(NamedTuple):
    name: str
    negated: bool = False


class Immediate(NamedTuple):
    value: int
    """An integer, or the bits of a floating-point number."""
    width: int | None
    """In bits, of a floating-point number; None for an integer."""


class Symbol(NamedTuple):
    """A label, a parameter, a special register or a variable."""

    name: str


DROPPED = Symbol("_")
"""In place of a register: the result is not wanted."""


class Address(NamedTuple):
    base: Register | Symbol
    offset: int
    """In bytes."""


class Vector(NamedTuple):
    """`{a, b}`, and the pair of results `a|b`."""

    parts: tuple[Register | Immediate | Symbol, ...]


Operand = Register | Immediate | Symbol | Address | Vector

WITHOUT_RESULT = {"st", "stmatrix", "bar", "bra", "ret"}


@dataclass(frozen=True)
class Instruction:
    opcode: str
    """With its modifiers: `add.s32`."""
    operands: tuple[Operand, ...]
    guard: Register | None
    text: str

    @cached_property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Names of the registers that it sets."""
        return tuple(_registers(self.operands[: self._results]))

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Names of the registers that have an effect at once: stored, branched on, an address or a choice of lanes."""
        sources = self.operands[self._results :]
        if self.name in ("shfl", "redux"):
            sources = sources[1:]
        elif self._results:
            sources = tuple(operand for operand in sources if isinstance(operand, Address))
        return tuple(_registers(sources if self.guard is None else (self.guard, *sources)))

    @cached_property
    def uses(self) -> tuple[str, ...]:
        """Names of the other registers that it reads, whose values go into those that it writes."""
        return tuple(name for name in _registers(self.operands[self._results :]) if name not in self.needs)

    @property
    def _results(self) -> int:
        return 0 if self.name in WITHOUT_RESULT else 1


def _registers(operands: tuple[Operand, ...]) -> Iterator[str]:
    for operand in operands:
        match operand:
            case Register(name):
                yield name
            case Address(Register(name)):
                yield name
            case Vector(parts):
                yield from _registers(parts)


@dataclass(eq=False)
class Program:
    name: str
    threads: int
    """A block."""
    parameters: dict[str, str]
    """Types by names, in order."""
    shared: str | None
    """Name of the shared memory whose size is set at launch."""
    registers: dict[str, str] = field(default_factory=dict)
    """Types by names."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """Indices of the instructions that they stand before."""


IGNORED = re.compile(r"//[^\n]*|/\*.*?\*/|^[ \t]*\.loc\b[^\n]*", re.DOTALL | re.MULTILINE)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")
PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr(?:\s+\.global)?(?:\s+\.align\s+\d+)?)?\s+([\w$]+)")
THREADS = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)\s*(?:,\s*1\s*)*")
SHARED = re.compile(r"\.extern\s+\.shared\b[^;]*?([\w$]+)\[\]\s*;")
BEFORE_STATEMENT = re.compile(r"\s*(?:[{}]|([\w$]+):(?!:))\s*")
DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
RANGE = re.compile(r"(.+)<(\d+)>")
INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{\[][^,]*")
INTEGER = re.compile(r"(-?)(0|[1-9]\d*|0[xX][0-9a-fA-F]+)U?")
FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
ADDRESS = re.compile(r"([%\w$]+)\s*(?:\+\s*(-?\d+))?")
NAME = re.compile(r"[%$a-zA-Z_][\w$.]*")


def parse(text: str) -> Program:
    """Raises:
    Unsupported: for what is not PTX of one kernel, or unknown here.
    """
    text = IGNORED.sub("", text)
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1:
        raise Unsupported(f"one kernel is expected, and there are {len(entries)}")
    name, parameters, directives = entries[0].groups()
    threads, shared = THREADS.fullmatch(directives.strip()), SHARED.search(text)
    if threads is None:
        raise Unsupported(f"the threads a block of {name}: {directives.strip()!r}")
    program = Program(name, int(threads[1]), dict(_parameters(parameters)), shared and shared[1])
    for statement in _body(text, entries[0].end()).split(";"):
        while before := BEFORE_STATEMENT.match(statement):
            if before[1]:
                program.labels[before[1]] = len(program.instructions)
            statement = statement[before.end() :]
        statement = " ".join(statement.split())
        if declaration := DECLARATION.fullmatch(statement):
            program.registers.update(dict.fromkeys(_declared(declaration[2]), declaration[1]))
        elif statement and not statement.startswith(".pragma"):
            program.instructions.append(_instruction(statement, program.registers))
    return program


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    for parameter in filter(None, map(str.strip, text.split(","))):
        found = PARAMETER.fullmatch(parameter)
        if found is None:
            raise Unsupported(f"the parameter {parameter!r}")
        yield found[2], found[1]


def _body(text: str, start: int) -> str:
    depth = 1
    for brace in re.compile("[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    raise Unsupported("a kernel without an end")


def _declared(text: str) -> Iterator[str]:
    for name in map(str.strip, text.split(",")):
        several = RANGE.fullmatch(name)
        yield from (f"{several[1]}{i}" for i in range(int(several[2]))) if several else (name,)


def _instruction(text: str, registers: dict[str, str]) -> Instruction:
    found = INSTRUCTION.fullmatch(text)
    if found is None:
        raise Unsupported(f"the statement {text!r}")
    negated, guard, opcode, operands = found.groups()
    if guard is not None and guard not in registers:
        raise Unsupported(f"the guard of {text!r}")
    try:
        parsed = tuple(_operand(operand, registers) for operand in OPERAND.findall(operands))
    except Unsupported as error:
        raise Unsupported(f"{text!r}: {error}") from None
    return Instruction(opcode, parsed, None if guard is None else Register(guard, bool(negated)), text)


def _operand(text: str, registers: dict[str, str]) -> Operand:
    text = text.strip()
    if text.startswith("["):
        found = ADDRESS.fullmatch(text[1:-1].strip())
        if found is None:
            raise Unsupported(f"the address {text!r}")
        base = Register(found[1]) if found[1] in registers else Symbol(found[1])
        return Address(base, int(found[2] or 0))
    if text.startswith("{"):
        return Vector(tuple(_scalar(part.strip(), registers) for part in text[1:-1].split(",")))
    if "|" in text:
        return Vector(tuple(_scalar(part.strip(), registers) for part in text.split("|")))
    return _scalar(text, registers)


def _scalar(text: str, registers: dict[str, str]) -> Register | Immediate | Symbol:
    if text.removeprefix("!") in registers:
        return Register(text.removeprefix("!"), text.startswith("!"))
    if found := INTEGER.fullmatch(text):
        return Immediate(int(found[1] + found[2], 0), None)
    if found := FLOAT.fullmatch(text):
        return Immediate(int(found[1] or found[2], 16), 32 if found[1] else 64)
    if NAME.fullmatch(text):
        return Symbol(text)
    raise Unsupported(f"the operand {text!r}")
