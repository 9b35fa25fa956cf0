"""The check of `attention_kl` that `fastdistill verify` runs, against rows of attention one by one."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from fastdistill import attention_kl
from fastdistill.training import verify_definitions as plain
from fastdistill.training.verify_numbers import parity

_HEADS, _POSITIONS = 4, 11
_FORMS = {
    "causal": {"causal": True, "itself": True},
    "before it": {"causal": True, "itself": False},
    "both ways": {"causal": False, "itself": True},
}


def attention_parities(device: torch.device, impl: str) -> list[str]:
    """Two heads a key in the student, widths unlike, two documents a row, weighted, with NaN where no token counts."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, _HEADS, _POSITIONS, 5), (2, 2, _POSITIONS, 5), (2, _HEADS, _POSITIONS, 3), (2, _HEADS, _POSITIONS, 3)
    vectors = [1.5 * torch.randn(shape, generator=generator) for shape in shapes]
    weights = (0.5 + torch.rand(2, _POSITIONS, generator=generator)).index_fill(1, torch.tensor([2, 9]), 0)
    documents = (torch.arange(_POSITIONS) >= 6).long().expand(2, -1).contiguous()
    for x in vectors:
        x.mT[..., weights[0] == 0] = torch.nan

    def check(name: str) -> str:
        how = _FORMS[name]

        def loss(q: Tensor, k: Tensor, t_q: Tensor, t_k: Tensor, w: Tensor, d: Tensor) -> Tensor:
            return attention_kl(q, k, t_q, t_k, w, documents=d, scale=(0.7, 0.4), **how, impl=impl).loss

        def definition(q: Tensor, k: Tensor, t_q: Tensor, t_k: Tensor, w: Tensor, d: Tensor) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for b, i in product(range(2), range(_POSITIONS)):
                others = range(i + how["itself"]) if how["causal"] else range(_POSITIONS)
                seen = [j for j in others if w[b, j] > 0 and d[b, j] == d[b, i]]
                if w[b, i] > 0 and seen:
                    found = plain.attended(q[b, :, i], k[b, :, seen].repeat_interleave(2, 0), 0.7)
                    total = total + w[b, i] * plain.kl(plain.attended(t_q[b, :, i], t_k[b, :, seen], 0.4), found).mean()
            return total / w.sum()

        return parity(
            f"attention_kl, {name}:", loss, definition, vectors[:2], [*vectors[2:], weights, documents], device
        )

    return [check(name) for name in _FORMS]
