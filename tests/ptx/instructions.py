"""An instruction -> a step: a function of the lanes that take part, which does it on a machine.

All that is known before it runs (the operands' arrays, the function, the width) is looked up once, here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial, reduce

import numpy as np
from numpy.typing import NDArray

from tests.ptx.forms import DTYPES, FORMS, Form
from tests.ptx.machine import WARP, Access, Array, Machine, Mask
from tests.ptx.memory import WORDS, BadAddress, Place
from tests.ptx.parse import DROPPED, Address, Immediate, Instruction, Operand, Register, Symbol, Unsupported, Vector

Step = Callable[[Mask], None]

EVERY_LANE = np.iinfo(np.uint32).max
"""The mask of a warp's instruction that all of it takes part in."""


def step_of(instruction: Instruction, machine: Machine) -> Step:
    """Raises:
    Unsupported: for an instruction, or a form of one, that is not known.
    """
    try:
        step = _step(instruction, machine)
    except Unsupported as error:
        raise Unsupported(f"{instruction.text!r}: {error}") from None
    step = _watching(step, instruction, machine)
    return step if instruction.guard is None else _guarded(step, instruction, machine)


def _step(instruction: Instruction, machine: Machine) -> Step:
    opcode = instruction.opcode
    if opcode in FORMS and not (opcode.startswith("mov.") and any(isinstance(o, Vector) for o in instruction.operands)):
        return _compute(FORMS[opcode], instruction, machine)
    for pattern, build in PATTERNS.items():
        if found := re.fullmatch(pattern, opcode):
            return build(instruction, machine, **found.groupdict())
    raise Unsupported(f"{opcode} is not known")


def _watching(step: Step, instruction: Instruction, machine: Machine) -> Step:
    """With what it needs checked to be sound, and what it writes noted to be as sound as what it uses.

    What is put together of several registers' bytes counts as sound where one of them is: Triton leaves the bytes empty
    that it cuts off again.
    """
    check = _soundness_check(instruction.needs, instruction, machine)
    used = [machine.sound.get(name, np.True_) for name in instruction.uses] or [np.True_]
    results = [machine.sound[name] for name in instruction.writes if name in machine.sound]
    combine = np.logical_or if instruction.name in ("mov", "prmt") else np.logical_and
    if not results and check is None:
        return step

    def watching(mask: Mask) -> None:
        if check:
            check(mask)
        step(mask)
        if instruction.name not in ("shfl", "redux"):  # which see to it themselves
            for sound in results:
                np.copyto(sound, reduce(combine, used), where=mask)

    return watching


def _soundness_check(names: Iterable[str], instruction: Instruction, machine: Machine) -> Step | None:
    needed = [(name, machine.sound[name]) for name in names if name in machine.sound]

    def check(mask: Mask) -> None:
        for name, sound in needed:
            bad = ~sound & mask
            if bad.any():
                what = f"{name}, never written or computed from what was not, is used"
                raise machine.fault(what, int(bad.argmax()), instruction)

    return check if needed else None


def _soundness_of(operand: Operand, machine: Machine) -> NDArray[np.bool_]:
    sound = machine.sound.get(operand.name) if isinstance(operand, Register) else None
    return np.ones(machine.lanes, np.bool_) if sound is None else sound


def _guarded(step: Step, instruction: Instruction, machine: Machine) -> Step:
    taken = taken_by(instruction, machine)

    def guarded(mask: Mask) -> None:
        through = taken(mask)
        if through is True or through.any():
            step(through)

    return guarded


def taken_by(instruction: Instruction, machine: Machine) -> Callable[[Mask], Mask]:
    """Of the lanes that take part, those that its guard lets through; True for all lanes."""
    if instruction.guard is None:
        return lambda mask: mask
    name, negated = instruction.guard
    predicate = machine.registers[name]
    check = _soundness_check([name], instruction, machine)

    def taken(mask: Mask) -> Mask:
        if check:
            check(mask)
        through = (~predicate if negated else predicate) & mask
        return True if through.all() else through

    return taken


def _expect(condition: bool, what: str = "these operands are not known") -> None:
    if not condition:
        raise Unsupported(what)


# Lane by lane


def _compute(form: Form, instruction: Instruction, machine: Machine) -> Step:
    target, *sources = instruction.operands
    _expect(len(sources) == len(form.sources))
    halves = 2 if any(type_.endswith("x2") for type_ in form.sources) else 1
    _expect(isinstance(target, Vector) == (halves == 2 and form.result == "pred"))
    targets = target.parts if isinstance(target, Vector) else (target,) * halves
    steps = [_compute_half(form, instruction, machine, each, half) for half, each in enumerate(targets)]
    if halves == 1:
        return steps[0]

    def compute_halves(mask: Mask) -> None:
        for step in steps:
            step(mask)

    return compute_halves


def _compute_half(form: Form, instruction: Instruction, machine: Machine, target: Operand, half: int) -> Step:
    converts = instruction.name == "cvt"  # which alone may take a part of a register, or fill more than its type
    function, undefined = form.function, form.undefined
    result = machine.result(target, form.result, half, wider=converts)
    sources = [
        machine.source(operand, type_, half, narrower=converts)
        for operand, type_ in zip(instruction.operands[1:], form.sources, strict=True)
    ]

    def compute(mask: Mask) -> None:
        np.copyto(result, function(*sources), where=mask)

    def compute_in_place(mask: Mask) -> None:
        function(*sources, out=result, where=mask)

    def compute_if_defined(mask: Mask) -> None:
        assert undefined is not None
        bad = np.broadcast_to(undefined(*sources) & mask, machine.lanes)
        if bad.any():
            raise machine.fault("undefined result", int(bad.argmax()), instruction)
        compute(mask)

    if undefined is not None:
        return compute_if_defined
    return compute_in_place if isinstance(function, np.ufunc) else compute


def _move_parts(instruction: Instruction, machine: Machine, type_: str) -> Step:
    """`mov` between a register and the parts of it, the lowest first."""
    match instruction.operands:
        case Vector(parts), operand:
            whole, moved_in = machine.source(operand, type_), False
        case operand, Vector(parts):
            whole, moved_in = machine.result(operand, type_), True
        case _:
            raise Unsupported("these operands are not known")
    part_type = f"b{8 * whole.itemsize // len(parts)}"
    _expect(len(parts) in (2, 4) and part_type in DTYPES)
    pieces = [whole.view(DTYPES[part_type])[i :: len(parts)] for i in range(len(parts))]
    if moved_in:
        moves = [(piece, machine.source(part, part_type)) for piece, part in zip(pieces, parts, strict=True)]
    else:
        moves = [
            (machine.result(part, part_type), piece)
            for piece, part in zip(pieces, parts, strict=True)
            if part != DROPPED
        ]

    def move(mask: Mask) -> None:
        for target, source in moves:
            np.copyto(target, source, where=mask)

    return move


# Memory


class _Accesses:
    """Those of one instruction, of `size` bytes a lane."""

    def __init__(self, instruction: Instruction, machine: Machine, space: str, size: int) -> None:
        _expect(size in WORDS, f"an access of {size} bytes")
        self.instruction, self.machine = instruction, machine
        self.access = Access("ld" if instruction.name.startswith("ld") else "st", space, size)

    def load(self, addresses: NDArray[np.int64], lanes: NDArray[np.intp] | None) -> Array:
        """Words of `size` bytes, one an address, which are those of `lanes` (None: all) in order."""
        word, places = WORDS[self.access.width], self._places(addresses, lanes)
        if len(places) == 1:
            return places[0].buffer.view(word)[places[0].offsets // word.itemsize]
        words = np.empty(len(addresses), word)
        for buffer, offsets, which in places:
            words[which] = buffer.view(word)[offsets // word.itemsize]
        return words

    def store(self, addresses: NDArray[np.int64], lanes: NDArray[np.intp] | None, words: Array) -> None:
        for buffer, offsets, which in self._places(addresses, lanes):
            buffer.view(words.dtype)[offsets // words.itemsize] = words[which]

    def _places(self, addresses: NDArray[np.int64], lanes: NDArray[np.intp] | None) -> list[Place]:
        instruction, space, size = self.access
        self.machine.statistics.bytes[self.access] += size * len(addresses)
        try:
            return self.machine.space(space).find(addresses, lanes, size, writing=instruction == "st")
        except BadAddress as bad:
            lane = bad.position if lanes is None else int(lanes[bad.position])
            what = f"{bad} {size}-byte {space} {instruction} at {int(addresses[bad.position]):#x}"
            raise self.machine.fault(what, lane, self.instruction) from None


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)


def _load(instruction: Instruction, machine: Machine, space: str, count: str | None, type_: str) -> Step:
    _expect(len(instruction.operands) == 2)
    dtype, parts = np.dtype(DTYPES[type_]), _parts(instruction.operands[0])
    _expect(len(parts) == int(count or 1))
    results = [(i, machine.result(part, type_, wider=True)) for i, part in enumerate(parts) if part != DROPPED]
    base, offset = machine.address(instruction.operands[1])
    accesses = _Accesses(instruction, machine, space, dtype.itemsize * len(parts))

    def load(mask: Mask) -> None:
        lanes = None if mask is True else np.flatnonzero(mask)
        chosen = slice(None) if lanes is None else lanes
        loaded = accesses.load(base[chosen].astype(np.int64) + offset, lanes).view(dtype).reshape(-1, len(parts))
        for i, result in results:
            result[chosen] = loaded[:, i]

    return load


def _store(instruction: Instruction, machine: Machine, space: str, count: str | None, type_: str) -> Step:
    _expect(len(instruction.operands) == 2)
    dtype, parts = np.dtype(DTYPES[type_]), _parts(instruction.operands[1])
    _expect(len(parts) == int(count or 1))
    sources = [np.broadcast_to(machine.source(part, type_, narrower=True), machine.lanes) for part in parts]
    base, offset = machine.address(instruction.operands[0])
    accesses = _Accesses(instruction, machine, space, dtype.itemsize * len(parts))

    def store(mask: Mask) -> None:
        lanes = None if mask is True else np.flatnonzero(mask)
        chosen = slice(None) if lanes is None else lanes
        addresses = base[chosen].astype(np.int64) + offset
        values = np.empty((len(addresses), len(parts)), dtype)
        for i, source in enumerate(sources):
            values[:, i] = source[chosen]
        accesses.store(addresses, lanes, values.view(WORDS[accesses.access.width])[:, 0])

    return store


def _load_parameter(instruction: Instruction, machine: Machine, type_: str) -> Step:
    match instruction.operands:
        case target, Address(Symbol(name), offset) if name in machine.parameters:
            result, dtype = machine.result(target, type_, wider=True), np.dtype(DTYPES[type_])
            value = machine.parameters[name][offset : offset + dtype.itemsize].view(dtype)
        case target, Address(Register()) as address:
            return _load_addressed_parameter(instruction, machine, type_, target, address)
        case _:
            raise Unsupported("these operands are not known")

    def load(mask: Mask) -> None:
        np.copyto(result, value, where=mask)

    return load


def _load_addressed_parameter(
    instruction: Instruction, machine: Machine, type_: str, target: Operand, address: Operand
) -> Step:
    """From the address of a parameter, which `mov` takes: of several tensors' pointers the compiler picks one so."""
    result, dtype = machine.result(target, type_, wider=True), np.dtype(DTYPES[type_])
    addresses, offset = machine.address(address)
    space = machine.parameter_space.view(dtype)

    def load(mask: Mask) -> None:
        places = np.where(mask, addresses + offset, 0)
        bad = (places % dtype.itemsize != 0) | (places < 0) | (places >= len(machine.parameter_space))
        if bad.any():
            raise machine.fault("no parameter's address", int(bad.argmax()), instruction)
        np.copyto(result, space[places // dtype.itemsize], where=mask)

    return load


# Warps and blocks


class _Members:
    """The lanes of its warp that an instruction names by the bits of a mask, to take part in it together."""

    def __init__(self, instruction: Instruction, machine: Machine, operand: Operand) -> None:
        self.instruction, self.machine = instruction, machine
        self.bits = np.broadcast_to(machine.source(operand, "u32"), machine.lanes)
        self.lane = machine.thread % WARP

    def check(self, mask: Mask, read: Array) -> None:
        """`read`: the lane in its warp that each lane reads.

        Raises:
            Fault: where a lane is not named, reads one that is not, or names one that does not take part.
        """
        everywhere = (self.bits == EVERY_LANE).all()
        if everywhere and mask is True:
            return
        named = everywhere | self.names(self.lane) & self.names(read)
        taking_part = mask & np.ones(self.machine.lanes, np.bool_)
        in_warp = (taking_part.reshape(-1, WARP) << np.arange(WARP, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
        bad = taking_part & ~(named & (self.bits & ~np.repeat(in_warp, WARP) == 0))
        if bad.any():
            what = "the lanes named are not those that take part"
            raise self.machine.fault(what, int(bad.argmax()), self.instruction)

    def names(self, lane: Array) -> NDArray[np.bool_]:
        return (self.bits >> lane.astype(np.uint32) & 1).astype(np.bool_)


def _shuffle(instruction: Instruction, machine: Machine, mode: str) -> Step:
    _expect(len(instruction.operands) == 5)
    target, *given, named = instruction.operands
    result, members = machine.result(target, "b32"), _Members(instruction, machine, named)
    source, amount, limits = (np.broadcast_to(machine.source(each, "u32"), machine.lanes) for each in given)
    lane, first_of_warp = (machine.thread % WARP).astype(np.int64), np.arange(machine.lanes) // WARP * WARP

    def lanes_read() -> Array:
        """In its warp, by each lane: itself, where another would lie outside of its segment."""
        by, bound, segment = ((bits & 31).astype(np.int64) for bits in (amount, limits, limits >> 8))
        first = lane & segment
        last = first | (bound & ~segment)
        other = {"bfly": lane ^ by, "down": lane + by, "up": lane - by, "idx": first | (by & ~segment)}[mode]
        return np.where(other >= last if mode == "up" else other <= last, other, lane)

    fixed = lanes_read() if all(isinstance(operand, Immediate) for operand in given[1:]) else None
    sound_result, sound_source = _soundness_of(target, machine), _soundness_of(given[0], machine)

    def shuffle(mask: Mask) -> None:
        read = lanes_read() if fixed is None else fixed
        members.check(mask, read)
        np.copyto(result, source[first_of_warp + read], where=mask)
        np.copyto(sound_result, sound_source[first_of_warp + read], where=mask)

    return shuffle


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _reduce_warp(instruction: Instruction, machine: Machine, operation: str, type_: str) -> Step:
    _expect(len(instruction.operands) == 3)
    target, given, named = instruction.operands
    result, members = machine.result(target, type_), _Members(instruction, machine, named)
    source = np.broadcast_to(machine.source(given, type_), machine.lanes)
    lane = machine.thread % WARP
    sound_result, sound_source = _soundness_of(target, machine), _soundness_of(given, machine)

    def reduce_warp(mask: Mask) -> None:
        members.check(mask, lane)
        in_warp = np.repeat(source.reshape(-1, WARP), WARP, axis=0)  # [lanes, WARP]
        nothing = 0 if operation in ("add", "xor") else source[:, None]
        named = (members.bits[:, None] >> np.arange(WARP, dtype=np.uint32) & 1).astype(np.bool_)
        total = REDUCTIONS[operation].reduce(np.where(named, in_warp, nothing), axis=1, dtype=source.dtype)
        np.copyto(result, total, where=mask)
        sound = np.repeat(sound_source.reshape(-1, WARP), WARP, axis=0) | ~named
        np.copyto(sound_result, sound.all(axis=1), where=mask)

    return reduce_warp


def _synchronise_warp(instruction: Instruction, machine: Machine) -> Step:
    _expect(len(instruction.operands) == 1)
    members = _Members(instruction, machine, instruction.operands[0])
    return lambda mask: members.check(mask, members.lane)


def _synchronise_block(instruction: Instruction, machine: Machine) -> Step:
    _expect(len(instruction.operands) == 1 and isinstance(instruction.operands[0], Immediate))

    def synchronise(mask: Mask) -> None:
        arrived = np.broadcast_to(mask, machine.lanes).reshape(machine.blocks, -1)
        waiting = arrived.any(axis=1, keepdims=True) & ~arrived & ~machine.finished.reshape(machine.blocks, -1)
        if waiting.any():
            raise machine.fault("a barrier that its whole block does not reach", int(waiting.argmax()), instruction)

    return synchronise


# Matrices of 8 x 8 numbers of 16 bits, spread over a warp: lane 4 r + c has the numbers 2 c and 2 c + 1 of row r


def _matrices(instruction: Instruction, machine: Machine, loads: bool, count: str, transposed: str | None) -> Step:
    """`ldmatrix` and `stmatrix`: lanes 8 i to 8 i + 7 of a warp have the addresses of the rows of matrix i."""
    _expect(len(instruction.operands) == 2)
    vector, address = instruction.operands if loads else instruction.operands[::-1]
    registers = [machine.result(part, "b32").reshape(-1, WARP) for part in _parts(vector)]
    _expect(len(registers) == int(count))
    base, offset = machine.address(address)
    members = _Members(instruction, machine, Immediate(-1, None))
    accesses = _Accesses(instruction, machine, "shared", 16)

    def move(mask: Mask) -> None:
        members.check(mask, members.lane)
        warps = np.flatnonzero(np.broadcast_to(mask, machine.lanes)[::WARP])
        rows = (warps[:, None] * WARP + np.arange(8 * len(registers))).ravel()
        addresses = base[rows].astype(np.int64) + offset
        if loads:
            numbers = accesses.load(addresses, rows).view(np.uint16).reshape(-1, len(registers), 8, 8)
            lanes = np.ascontiguousarray(numbers.swapaxes(2, 3) if transposed else numbers).view(np.uint32)
            for i, register in enumerate(registers):
                register[warps] = lanes[:, i].reshape(-1, WARP)
        else:
            lanes = np.stack([register[warps] for register in registers], axis=1)
            numbers = lanes.view(np.uint16).reshape(-1, len(registers), 8, 8)
            words = np.ascontiguousarray(numbers.swapaxes(2, 3) if transposed else numbers).view(WORDS[16])
            accesses.store(addresses, rows, words.ravel())

    return move


_TYPE = r"\.(?P<type_>[bsu](?:8|16|32|64)|f(?:32|64))"
_COUNT = r"(?:\.v(?P<count>[24]))?"
_MATRICES = r"\.sync\.aligned\.m8n8\.x(?P<count>[124])(?P<transposed>\.trans)?\.shared\.b16"

PATTERNS: dict[str, Callable[..., Step]] = {
    r"mov\.(?P<type_>b(?:32|64))": _move_parts,
    rf"ld\.param{_TYPE}": _load_parameter,
    rf"ld\.(?P<space>global|shared)(?:\.c[ags])?{_COUNT}{_TYPE}": _load,
    rf"st\.(?P<space>global|shared)(?:\.(?:wb|cg|cs|wt))?{_COUNT}{_TYPE}": _store,
    r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32": _shuffle,
    r"redux\.sync\.(?P<operation>add|min|max)\.(?P<type_>[su]32)": _reduce_warp,
    r"redux\.sync\.(?P<operation>and|or|xor)\.(?P<type_>b32)": _reduce_warp,
    r"bar\.warp\.sync": _synchronise_warp,
    r"bar\.sync": _synchronise_block,
    rf"ldmatrix{_MATRICES}": partial(_matrices, loads=True),
    rf"stmatrix{_MATRICES}": partial(_matrices, loads=False),
}
"""What is not in `FORMS`, by what its whole opcode matches. Hints to caches, as in `ld.global.cg`, change no result."""
