"""Half-precision products on the CPU as GPUs have them: returned in float32, or in the half precision itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.library import _scoped_library

from fastdistill import products


@contextmanager
def half_products(
    widening: bool, rounded: Callable[[Tensor], Tensor] = lambda x: x, addmm: str | None = "adds"
) -> Iterator[None]:
    """While it lasts the CPU multiplies half-precision matrices as they are.

    With `widening` the products come in float32, passed through `rounded`; without, in the operands' dtype. With
    `addmm` they may be added to a float32 matrix, which "forgets" does not do.
    """
    before = products.MULTIPLIES_IN_FLOAT32
    products.MULTIPLIES_IN_FLOAT32 = frozenset()
    forget_trials()
    try:
        if not widening:
            yield
            return
        with _scoped_library("aten", "IMPL") as library:  # the CPU has no operators of these names

            def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
                return rounded(a.to(out_dtype) @ b.to(out_dtype))

            def mm_out(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
                return out.copy_(mm(a, b, out_dtype))

            def addmm_out(x: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
                return out.copy_(mm(a, b, out_dtype) + (x if addmm == "adds" else 0))

            library.impl("mm.dtype", mm, "CPU")
            library.impl("mm.dtype_out", mm_out, "CPU")
            if addmm:
                library.impl("addmm.dtype_out", addmm_out, "CPU")
            yield
    finally:
        products.MULTIPLIES_IN_FLOAT32 = before
        forget_trials()


def forget_trials() -> None:
    products.widens.cache_clear()
    products.adds_up.cache_clear()
