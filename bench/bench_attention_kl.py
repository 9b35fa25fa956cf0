"""attention_kl, whose gradients go to the student's queries and keys, beside the maps, eager and compiled.

Liger-Kernel, TRL and torchtune have no loss on attention. The masked tokens are at the end of each row.

TFLOP/s count, for all alike, the products that fastdistill's kernels make, S^2 (5 ds + 3 dt) a head of the positions
that count (see gpu_attention_kl.py), of both passes together: what one keeps from forward another computes anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import fastdistill
from bench.operation import Case, Loss, Operation, compiled, counted, valid_positions
from bench.peak_memory import peak_memory_mb
from fastdistill import reference
from fastdistill.testing import DEVICE, random_attention


def make_inputs(case: Case) -> dict[str, Any]:
    batch, heads, key_heads, positions, width, teacher_width = case.shape
    inputs = random_attention(
        batch,
        heads,
        positions,
        width,
        key_heads=key_heads,
        teacher_key_heads=key_heads,
        teacher_width=teacher_width,
        dtype=case.torch_dtype,
    )
    return inputs | {"mask": valid_positions(batch, positions, case.valid) if case.valid < 1 else None}


def eager(case: Case) -> Loss:
    return lambda **inputs: reference.attention_kl(**inputs).loss


def compiled_eager(case: Case) -> Loss:
    return compiled(eager(case))


def ours(case: Case, impl: str | None = None) -> Loss:
    return lambda **inputs: fastdistill.attention_kl(**inputs, impl=impl).loss


def definition(case: Case, implementation: str) -> Loss:
    return eager(case)


IMPLEMENTATIONS: dict[str, Callable[[Case], Loss]] = {
    "eager": eager,
    "torch.compile": compiled_eager,
    "fastdistill": ours,
}
if DEVICE == "cuda":  # on a CPU it is what "fastdistill" is
    IMPLEMENTATIONS["fastdistill, PyTorch path"] = partial(ours, impl="torch")


def work(case: Case, pass_: str) -> float | None:
    batch, heads, _, positions, width, teacher_width = case.shape
    if pass_ != "both":
        return None
    return batch * heads * counted(positions, case.valid) ** 2 * (5.0 * width + 3.0 * teacher_width)


def gpu_cases() -> list[Case]:
    """Of models in use, and one of them at each share of valid tokens and in each dtype."""
    middle = Case((4, 9, 3, 2048, 64, 64), "causal", 1.0, "bfloat16")
    return [
        middle,
        *(middle._replace(valid=valid) for valid in (0.5, 0.1)),
        *(middle._replace(dtype=dtype) for dtype in ("float32", "float16")),
        middle._replace(shape=(1, 9, 3, 64, 64, 64)),
        middle._replace(shape=(8, 12, 12, 1024, 64, 64)),
        middle._replace(shape=(2, 32, 8, 4096, 64, 128)),
        middle._replace(shape=(1, 32, 8, 8192, 128, 128)),
    ]


OPERATION = Operation(
    name="attention_kl",
    make_inputs=make_inputs,
    leaves=("student_q", "student_k"),
    implementations=IMPLEMENTATIONS,
    definition=definition,
    tokens=lambda case: case.shape[0] * case.shape[3],
    roof="product",
    work=work,
    tiny_shape=(2, 4, 2, 10, 8, 12),
    cases={
        "tiny": [Case((2, 4, 2, 10, 8, 12), "causal", 0.5)],
        "cpu": [
            Case((1, 9, 3, 2048, 64, 64), "causal"),
            Case((8, 12, 12, 128, 64, 64), "causal", 0.5),
        ],
        "cuda": gpu_cases(),
    },
)
"""Rows, heads, heads of keys, positions, width, the teacher's width."""


def test_attention_kl(measure, case, implementation, pass_):
    measure(OPERATION, case, implementation, pass_)


def test_the_peak_of_what_was_compiled_is_that_of_its_step():
    """Some maps: neither nothing nor what the compiler needs."""
    peak_mb = peak_memory_mb("attention_kl", "torch.compile", Case((1, 9, 3, 256, 64, 64), "causal"))
    assert 1 < peak_mb * 1e6 / (4 * 9 * 256**2) < 6
