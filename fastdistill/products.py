"""Products of an output head's matrices: taken in the precision of the matrices, summed and returned in float32.

Logits that are rounded to bfloat16 lose more than a student near its teacher has left to learn, so the product of two
half-precision matrices is asked for in float32. Not every device has such products: a trial tells, once.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)

MULTIPLIES_IN_FLOAT32 = frozenset({"cpu"})
"""Devices that take half-precision matrices to float32 first, if they have no such products."""


SLICE_BYTES = 64 << 20
"""Of a product that is added afterwards: it would else be as large as the head's gradient."""


class Precision(NamedTuple):
    """How the matrices of one output head are multiplied."""

    operands: torch.dtype
    """What hidden states, head and the gradient of the logits are cast to."""
    logits: torch.dtype
    """What the logits come in: float32, or a half precision where nothing better can be had."""

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, compute: torch.dtype, autocast: torch.dtype | None) -> Precision:
        """That of a head whose losses are computed in `compute`, under an autocast to `autocast` if there is one."""
        if compute == torch.float64:
            return Precision(compute, compute)
        operands = autocast or torch.promote_types(hidden.dtype, weight.dtype)
        if operands not in HALVES:
            return Precision(torch.float32, torch.float32)
        if widens(operands, hidden.device):
            return Precision(operands, torch.float32)
        if hidden.device.type in MULTIPLIES_IN_FLOAT32:
            return Precision(torch.float32, torch.float32)
        return Precision(operands, operands)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The precision to which autocast takes matrix products on the device; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@functools.cache
def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device returns products of matrices of this half precision in float32.

    Tried, like `adds_up`, on sums that the half precision cannot hold. The first call for a device waits for it.
    """
    out = torch.empty(8, 16, device=device)[:, :8]
    a, b = _trial_matrices(dtype, device)
    try:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    except RuntimeError:  # of a backend, or a GPU's cuBLAS, that has none
        return False
    return bool((out == 2049).all())


@functools.cache
def adds_up(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether it also adds them to a float32 matrix in place; the first releases with such products did not."""
    total = torch.ones(8, 8, device=device)
    a, b = _trial_matrices(dtype, device)
    try:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return bool((total == 2050).all())


def _trial_matrices(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two whose product is 2049 everywhere: 15 x 128 + 129."""
    b = torch.full((16, 8), 128, dtype=dtype, device=device)
    b[0] = 129
    return torch.ones(16, 8, dtype=dtype, device=device).t(), b


def product_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a @ b in `out`, whose dtype is theirs or, where the device widens theirs, float32."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, as nearly as the device can."""
    if a.dtype == dtype or not widens(a.dtype, a.device):
        return torch.mm(a, b).to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the dtype of `total` as nearly as the device can."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif adds_up(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        rows = max(1, SLICE_BYTES // (total.shape[1] * total.itemsize))
        for part, of in zip(total.split(rows), a.split(rows), strict=True):
            part.add_(product(of, b, total.dtype))
