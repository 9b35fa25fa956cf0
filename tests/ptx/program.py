"""Small PTX programs around a few instructions, for the tests of the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tests.ptx import exact, interpreter
from tests.ptx.machine import Statistics

DECLARATIONS = """
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<16>, %t;
    .reg .b64 %d<16>, %x, %y, %z;
"""


def run(
    body: str,
    *arguments: Any,
    types: Sequence[str] = (),
    threads: int = 32,
    grid: tuple[int, int, int] = (1, 1, 1),
    shared_memory: int = 0,
) -> Statistics:
    """Run `body`, for which `%t` is the thread's number and `%x`, `%y` and `%z` are the tensors' addresses.

    `types` are those of the parameters `a0`, `a1`..., if not all are tensors.
    """
    parameters = [f".param .{type_} a{i}" for i, type_ in enumerate(types or ["u64"] * len(arguments))]
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, torch.Tensor)]
    addresses = [f"ld.param.b64 %{register}, [a{i}];" for register, i in zip("xyz", tensors, strict=False)]
    text = f"""
        .extern .shared .align 16 .b8 shared[];
        .visible .entry kernel({", ".join(parameters)}) .reqntid {threads}
        {{ {DECLARATIONS} mov.u32 %t, %tid.x; {"".join(addresses)} {body} ret; }}
    """
    return interpreter.run(text, grid, list(arguments), shared_memory)


def results(opcodes: Sequence[str], columns: Sequence[Sequence[int]]) -> dict[str, list[int]]:
    """Of instructions with the same sources, by opcode: bits for each row of `columns`, the bits of each source.

    Two predicates are bits 0 and 16 of one number.
    """
    _, types = exact.signature(opcodes[0])
    count = len(columns[0])
    threads = -(-count // 32) * 32
    given = np.zeros((len(columns), threads), np.uint64)
    given[:, :count] = columns
    given[:, count:] = given[:, count - 1 : count]
    out = np.zeros((len(opcodes), threads), np.uint64)
    body = [".reg .b64 %from, %to; mad.wide.u32 %from, %t, 8, %x; mad.wide.u32 %to, %t, 8, %y;"]
    for i, type_ in enumerate(types):
        body.append(f"{_register(f'%s{i}', type_)} {_load(f'%s{i}', type_, f'%from + {8 * threads * i}')}")
    sources = ", ".join(f"%s{i}" for i in range(len(types)))
    for i, opcode in enumerate(opcodes):
        type_, target, address = exact.signature(opcode)[0], f"%result{i}", f"%to + {8 * threads * i}"
        body.append(_register(target, type_))
        if type_ == "pred" and types[0].endswith("x2"):
            body.append(f"{opcode} {target}|%p1, {sources}; {_store('%p1', 'pred', f'%to + {8 * threads * i + 2}')}")
        else:
            body.append(f"{opcode} {target}, {sources};")
        body.append(_store(target, type_, address))
    run("\n".join(body), *(torch.from_numpy(each.view(np.int64)) for each in (given, out)), threads=threads)
    return {opcode: row[:count] for opcode, row in zip(opcodes, out.tolist(), strict=True)}


def _register(name: str, type_: str) -> str:
    return f".reg .{'pred' if type_ == 'pred' else f'b{max(16, exact.width(type_))}'} {name};"


def _load(register: str, type_: str, address: str) -> str:
    if type_ == "pred":
        return f"ld.global.b16 %h0, [{address}]; setp.ne.b16 {register}, %h0, 0;"
    return f"ld.global.b{max(16, exact.width(type_))} {register}, [{address}];"


def _store(register: str, type_: str, address: str) -> str:
    if type_ == "pred":
        return f"selp.b16 %h0, 1, 0, {register}; st.global.b16 [{address}], %h0;"
    return f"st.global.b{exact.width(type_)} [{address}], {register};"
