"""linear_softmax_kl on a GPU beside its bare matrix products, eager PyTorch, torch.compile and Liger-Kernel:

python -m bench.gpu_linear_softmax_kl results.json

Forward and backward to hidden states and head, of forward KL and cross-entropy at T = 1, or of forward KL alone, the
mean over tokens, in one process. Each implementation is first compared with the definition in float64. TFLOP/s count
the four matrix products; "of_products" is the time over that of these products alone, in the chunks and number formats
of fastdistill. Peak memory is what a step needs beyond its inputs and the gradients that it returns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdistill
from bench.gpu import main, median_ms, peak_bytes
from fastdistill import linear_chunks, reference
from fastdistill.products import Precision, add_product_, adds_up, product, product_into, widens
from fastdistill.testing import random_heads, random_targets, relative_error


class Shape(NamedTuple):
    tokens: int
    vocab: int
    student_width: int
    teacher_width: int
    dtype: torch.dtype


SHAPES = [
    Shape(8192, 128256, 2048, 4096, torch.bfloat16),
    Shape(16384, 128256, 2048, 4096, torch.bfloat16),
    Shape(8192, 50257, 768, 768, torch.float16),
    Shape(8192, 151936, 1024, 2560, torch.bfloat16),
]
LOSSES = {"kl + ce": 1.0, "kl": 0.0}
"""Weight of the cross-entropy."""

HEADS = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
Step = Callable[[], tuple[Tensor, Tensor, Tensor]]
"""Loss, gradient of the hidden states, gradient of the head."""


def make_inputs(shape: Shape) -> dict[str, Tensor]:
    heads = random_heads(
        shape.tokens,
        vocab=shape.vocab,
        width=shape.student_width,
        teacher_width=shape.teacher_width,
        dtype=shape.dtype,
    )
    for name in HEADS[:2]:
        heads[name].requires_grad_()
    return heads | {"targets": random_targets(shape.tokens, vocab=shape.vocab, ignored=0)}


def steps(inputs: dict[str, Tensor], loss: str) -> dict[str, Step]:
    """What is compared, on one set of inputs."""
    leaves, ce_weight = [inputs[name] for name in HEADS[:2]], LOSSES[loss]

    def step(function: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        value = function(**inputs)
        return value.detach(), *torch.autograd.grad(value, leaves)  # type: ignore[return-value]

    def eager(**inputs: Tensor) -> Tensor:
        return reference.linear_softmax_kl(**inputs, ce_weight=ce_weight).loss  # type: ignore[arg-type]

    def ours(impl: str, **inputs: Tensor) -> Tensor:
        return fastdistill.linear_softmax_kl(**inputs, ce_weight=ce_weight, impl=impl).loss  # type: ignore[arg-type]

    found: dict[str, Callable[..., Tensor]] = {
        "eager": eager,
        "torch.compile": torch.compile(eager),
        "fastdistill": partial(ours, "triton"),
        "fastdistill, PyTorch path": partial(ours, "torch"),
    }
    if find_spec("liger_kernel"):
        found["Liger-Kernel, chunked JSD at beta 0"] = partial(liger_chunked, ce_weight)
        if not ce_weight:  # which it does not have; its teacher comes as probabilities, made here
            found["Liger-Kernel, fused linear KL"] = liger_fused
    return {name: partial(step, function) for name, function in found.items()}


def liger_chunked(ce_weight: float, **inputs: Tensor) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=ce_weight, weight_soft_loss=1.0, beta=0.0)
    return loss(*(inputs[name] for name in HEADS), inputs["targets"])


def liger_fused(**inputs: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_kl_div import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearKLDivFunction,
    )

    with torch.no_grad():
        teacher = (inputs["teacher_hidden"] @ inputs["teacher_weight"].t()).softmax(-1)
    return LigerFusedLinearKLDivFunction.apply(inputs["student_hidden"], inputs["student_weight"], teacher)


def products_step(inputs: dict[str, Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """The four products of every chunk and nothing else; what they multiply for the gradients is beside the point."""
    hidden, weight, teacher_hidden, teacher_weight = (inputs[name].detach() for name in HEADS)
    precision = Precision.of(hidden, weight, torch.float32, None)
    logits, teacher_logits = (weight.new_empty(chunk, len(w), dtype=precision.logits) for w in (weight, teacher_weight))
    dlogits = weight.new_ones(chunk, len(weight), dtype=precision.operands)
    dhidden, dweight = (torch.zeros_like(x, dtype=torch.float32) for x in (hidden, weight))
    for part in torch.arange(len(hidden)).split(chunk):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        n = len(part)
        product_into(logits[:n], hidden[rows], weight.t())
        product_into(teacher_logits[:n], teacher_hidden[rows], teacher_weight.t())
        dhidden[rows] = product(dlogits[:n], weight, torch.float32)
        add_product_(dweight, dlogits[:n].t(), hidden[rows])
    return dhidden, dweight


def truth(inputs: dict[str, Tensor], loss: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of the definition in float64, a slice of tokens at a time."""
    tokens = len(inputs["student_hidden"])
    weights = {name: inputs[name].detach().double() for name in HEADS if name.endswith("weight")}
    dweight = torch.zeros_like(weights["student_weight"])
    value, parts = dweight.new_zeros(()), []
    for part in torch.arange(tokens, device=dweight.device).split(256):
        some = {name: inputs[name].detach()[part].double() for name in HEADS if name.endswith("hidden")} | weights
        leaves = [some[name].requires_grad_() for name in HEADS[:2]]
        share = reference.linear_softmax_kl(
            **some, targets=inputs["targets"][part], ce_weight=LOSSES[loss], num_tokens=tokens
        ).loss
        dhidden, more = torch.autograd.grad(share, leaves)
        value, dweight = value + share.detach(), dweight.add_(more)
        parts.append(dhidden)
    return value, torch.cat(parts), dweight


def measured(step: Step, inputs: dict[str, Tensor], true: tuple[Tensor, ...], flops: float) -> dict[str, Any]:
    try:
        errors = [relative_error(x, expected) for x, expected in zip(step(), true, strict=True)]
        returned = sum(inputs[name].nbytes for name in HEADS[:2])
        peak, ms = peak_bytes(step) - returned, median_ms(step)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    found: dict[str, Any] = dict(zip(("loss_error", "dhidden_error", "dweight_error"), errors, strict=True))
    return found | {"ms": ms, "tflop_per_s": flops / ms / 1e9, "peak_mb_beyond_gradients": peak / 1e6}


def results() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        inputs = make_inputs(shape)
        flops = 2.0 * shape.tokens * shape.vocab * (3 * shape.student_width + shape.teacher_width)
        about = shape._asdict() | {"dtype": str(shape.dtype)}
        device = inputs["student_weight"].device
        chunk = min(shape.tokens, linear_chunks.gpu_chunk_rows(torch.cuda.get_device_capability(device)[0]))
        how = {"products_in_float32": widens(shape.dtype, device), "added_in_place": adds_up(shape.dtype, device)}
        products_ms = median_ms(partial(products_step, inputs, chunk))
        yield {"implementation": "products alone", "chunk": chunk, **about, **how} | {
            "ms": products_ms,
            "tflop_per_s": flops / products_ms / 1e9,
        }
        for loss in LOSSES:
            true = truth(inputs, loss)
            for name, step in steps(inputs, loss).items():
                torch.compiler.reset()
                torch.cuda.empty_cache()
                found = measured(step, inputs, true, flops)
                if "ms" in found:
                    found["of_products"] = found["ms"] / products_ms
                yield {"implementation": name, "loss": loss, **about} | found


if __name__ == "__main__":
    sys.exit(main("gpu_linear_softmax_kl", results))
