"""attention_kl on a GPU beside the maps, eager and compiled, forward and backward, in one process:

python -m bench.gpu_attention_kl results.json

The mean over causal rows that all count. Each implementation is first compared with float64. Times are medians with a
cold L2 cache. TFLOP/s count, for all alike, the products that the kernels make, half of [S, S] by d each: of the
student's width d_s five (scores in each of three kernels, two gradients), of the teacher's d_t three; 2 flops each make
S^2 (5 d_s + 3 d_t) a head. Beside them stands the rate of one large product. Peak memory is what a step needs beyond
its inputs and gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdistill
from bench.gpu import main, median_ms, peak_bytes, product_rate
from fastdistill import reference
from fastdistill.testing import differentiate, in_float64, random_attention, relative_error


class Shape(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    """Of either model."""
    positions: int
    width: int
    teacher_width: int
    dtype: torch.dtype


SHAPES = [
    Shape(8, 12, 12, 1024, 64, 64, torch.float16),
    Shape(4, 9, 3, 2048, 64, 64, torch.bfloat16),
    Shape(1, 32, 8, 8192, 128, 128, torch.bfloat16),
    Shape(2, 32, 8, 4096, 64, 128, torch.bfloat16),
]

LEAVES = ("student_q", "student_k")
Step = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Loss, gradient of the queries, gradient of the keys."""


def make_inputs(shape: Shape) -> dict[str, Tensor]:
    return random_attention(
        shape.batch,
        shape.heads,
        shape.positions,
        shape.width,
        key_heads=shape.key_heads,
        teacher_key_heads=shape.key_heads,
        teacher_width=shape.teacher_width,
        dtype=shape.dtype,
    )


def flops(shape: Shape) -> float:
    pairs = shape.batch * shape.heads * shape.positions**2 / 2
    return pairs * 2 * (5 * shape.width + 3 * shape.teacher_width)


def step_of(function: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    output, (grad_q, grad_k) = differentiate(function, inputs, LEAVES)
    return output.loss.detach(), grad_q, grad_k


def steps(inputs: dict[str, Tensor]) -> dict[str, Step]:
    """What is compared, on one set of inputs."""
    found: dict[str, Callable[..., Any]] = {
        "eager": reference.attention_kl,
        "torch.compile": torch.compile(reference.attention_kl, dynamic=False, fullgraph=True),
        "fastdistill": partial(fastdistill.attention_kl, impl="triton"),
        "fastdistill, PyTorch path": partial(fastdistill.attention_kl, impl="torch"),
    }
    return {name: partial(step_of, function, inputs) for name, function in found.items()}


def truth(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, a block of queries at a time: the definition's maps would not fit."""
    return step_of(partial(fastdistill.attention_kl, impl="torch"), in_float64(inputs))


def measured(step: Step, inputs: dict[str, Tensor], true: tuple[Tensor, ...], flops: float) -> dict[str, Any]:
    try:
        errors = [relative_error(x, expected) for x, expected in zip(step(), true, strict=True)]
        returned = sum(inputs[name].nbytes for name in LEAVES)
        peak, ms = peak_bytes(step) - returned, median_ms(step)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    found: dict[str, Any] = dict(zip(("loss_error", "dq_error", "dk_error"), errors, strict=True))
    return found | {"ms": ms, "tflop_per_s": flops / ms / 1e9, "peak_mb_beyond_gradients": peak / 1e6}


def results() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        inputs = make_inputs(shape)
        true = truth(inputs)
        rate = product_rate(shape.dtype)
        about = shape._asdict() | {"dtype": str(shape.dtype), "product_tflop_per_s": rate}
        for name, step in steps(inputs).items():
            torch.compiler.reset()
            torch.cuda.empty_cache()
            found = measured(step, inputs, true, flops(shape))
            if "ms" in found:
                found["of_product"] = found["tflop_per_s"] / rate
            yield {"implementation": name, **about} | found


if __name__ == "__main__":
    sys.exit(main("gpu_attention_kl", results))
