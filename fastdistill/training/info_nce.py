"""InfoNCE: how well each of the student's states is told apart by the teacher's, and each of the teacher's by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.reference import HIDDEN, compute_dtype

_ROUNDING = 1e-3
"""Layer-normalised states have length sqrt(D); of a difference shorter than this the direction is rounding's."""


class Told(NamedTuple):
    """Of each query, `[..., n]`: its `loss` in nats; `chance`, the loss of one that cannot tell its candidates apart;
    and whether the teacher's state most like the student's is its counterpart, bool. All void, and finite, where a
    query is not among its own candidates.
    """

    loss: Tensor
    chance: Tensor
    is_right: Tensor


def info_nce(
    student: Tensor, teacher: Tensor, candidates: Tensor, temperature: float, queries: slice = slice(None)
) -> Told:
    """Symmetric InfoNCE between states and their counterparts (van den Oord et al. 2018, arXiv:1807.03748, equation 4;
    both ways as in CLIP, Radford et al. 2021, arXiv:2103.00020).

    The mean of two cross-entropies with the counterpart as the right answer: of a student's state among the teacher's,
    and of a teacher's among the student's. Logits are cosines over `temperature`, of states less the mean of their own
    model's states that they are compared with: what all have in common tells none apart, and in a trained model's
    residual stream it is nearly everything. (The mean states of 32 texts of 128 tokens in SmolLM2-135M have cosines of
    0.90 to 0.97 with each other, by block; at temperature 0.1 they would score 2.6 to 3.2 of ln 32 = 3.5 against
    themselves, and score under 0.1 with the mean taken off.) What is 0 then, or rounding's, is like nothing.

    In fp32, or of fp64 in fp64. Memory is that of some `[..., n, M]`.

    Args:
        student, teacher: `[..., M, D]`, layer-normalised and finite; i of one is the counterpart of i of the other.
        candidates: bool, `[..., M, M]`: the states that each is compared with, itself too; the same for all of them.
        temperature: of the cosines, above 0.
        queries: which n of the M are asked for.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = (_directions(states, candidates) for states in (student, teacher))
        right = torch.arange(student.shape[-2], device=student.device)[queries]
        among = candidates[..., queries, :]
        found = _log_shares(ours[..., queries, :], theirs, among, temperature)
        found_by_theirs = _log_shares(theirs[..., queries, :], ours, among, temperature)
    index = right[:, None].expand(*found.shape[:-1], 1)
    loss = -0.5 * (found + found_by_theirs).gather(-1, index).squeeze(-1)
    chance = among.sum(-1).clamp(min=1).log().to(loss.dtype)
    return Told(loss, chance, found.argmax(-1) == right)


def _directions(states: Tensor, candidates: Tensor) -> Tensor:
    """Unit vectors from the mean of those that each is compared with, `[..., M, D]`; 0 where there is no difference."""
    states = states.to(compute_dtype(states))
    weights = candidates.to(states.dtype)
    mean = weights @ states / weights.sum(-1, keepdim=True).clamp(min=1)
    return F.normalize(states - mean, dim=-1, eps=_ROUNDING)


def _log_shares(queries: Tensor, others: Tensor, among: Tensor, temperature: float) -> Tensor:
    """Logarithm of the softmax of `[..., n, D]` over those `among` `[..., M, D]`, `[..., n, M]`."""
    return (queries @ others.mT / temperature).masked_fill(~among, HIDDEN).log_softmax(-1)
