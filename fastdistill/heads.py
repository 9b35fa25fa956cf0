"""Output heads, a chunk of tokens at a time: logits into a buffer that is used again, gradients added up.

The gradients come un-normalised, and what they are all to be multiplied by (1 / num_tokens, the incoming gradient) is
applied at the end, in float32 and once: in float16 it would flush most of them to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.products import Precision, add_product_, product, product_into
from fastdistill.rows import TokenRows

MAX_CHUNK_BYTES = 256 << 20
"""Default bound of the memory that a chunk of tokens takes."""


class Head:
    """One model's hidden states and output head, in the precision in which they are multiplied."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int, precision: Precision):
        """Of the first `vocab` ids."""
        self.precision = precision
        self.hidden = hidden.detach()
        self.weight = weight.detach()[:vocab].to(precision.operands)
        self.bias = None if bias is None else bias.detach()[:vocab].to(precision.logits)

    def rows(self, chunk: TokenRows) -> Tensor:
        """The hidden states `[n, D]` of a chunk, a copy."""
        return chunk.take(self.hidden, self.precision.operands)

    def logits(self, hidden: Tensor, buffer: Tensor) -> Tensor:
        """Logits `[n, V]` of hidden states `[n, D]`, in the first rows of `buffer`."""
        out = buffer[: len(hidden)]
        if self.bias is None:
            return product_into(out, hidden, self.weight.t())
        if self.precision.operands == self.precision.logits:
            return torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        return product_into(out, hidden, self.weight.t()).add_(self.bias)


class Gradients:
    """Gradients of the student's hidden states and head, added up over chunks; only those that are needed."""

    def __init__(self, student: Head, needs: tuple[bool, ...], dtype: torch.dtype):
        def zeros(like: Tensor) -> Tensor:
            return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)

        self.student = student
        self.hidden = zeros(student.hidden) if needs[0] else None
        self.weight = zeros(student.weight) if needs[1] else None
        self.bias = zeros(student.weight[:, 0]) if needs[2] else None

    def add(self, chunk: TokenRows, hidden: Tensor, dlogits: Tensor) -> None:
        """Add the share of one chunk: `hidden` `[n, D]` and the gradient of its logits `[n, V]`."""
        if self.hidden is not None:
            chunk.put(self.hidden, product(dlogits, self.student.weight, self.hidden.dtype))
        if self.weight is not None:
            add_product_(self.weight, dlogits.t(), hidden)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient` times a number, rounded once to `dtype`; where that is its own, in place."""
    if dtype != gradient.dtype:
        return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
    if type(gradient) is not Tensor:  # a stand-in, by which torch.compile writes a graph that changes nothing in place
        return gradient * factor
    return gradient.mul_(factor)
