"""The losses once more, in a few plain lines each: what `fastdistill verify` holds the package's own against.

Nothing of the package is called here. All take the tokens that count, `[n, ...]`, and give a value for each, `[n]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

BETA = 0.3
"""Of the JSD: not a half, which would hide an exchange of the two models."""


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of probabilities."""
    return (p * (p.log() - q.log())).sum(-1)


def divergence(kind: str, p_s: Tensor, p_t: Tensor) -> Tensor:
    """Between probabilities of student and teacher."""
    mixed = BETA * p_t + (1 - BETA) * p_s
    return {
        "forward_kl": lambda: kl(p_t, p_s),
        "reverse_kl": lambda: kl(p_s, p_t),
        "jsd": lambda: BETA * kl(p_t, mixed) + (1 - BETA) * kl(p_s, mixed),
    }[kind]()


def distilled(kind: str, z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """T^2 times the divergence over the ids that both logits have."""
    ids = min(z_s.shape[-1], z_t.shape[-1])
    p_s, p_t = ((z[:, :ids] / temperature).softmax(-1) for z in (z_s, z_t))
    return temperature**2 * divergence(kind, p_s, p_t)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus the log of the probability of what came."""
    return -torch.stack([row.softmax(-1)[target].log() for row, target in zip(logits, targets, strict=True)])


def events(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """Probabilities of the ids that two vocabularies share, and of all others together."""
    shared = (logits / temperature).softmax(-1)[:, ids]
    return torch.cat([shared, 1 - shared.sum(-1, keepdim=True)], -1)


def sorted_distance(z_s: Tensor, z_t: Tensor, temperature: float) -> Tensor:
    """Between probabilities by rank; the shorter is padded with zeros."""
    p_s, p_t = ((z / temperature).softmax(-1).sort(descending=True).values for z in (z_s, z_t))
    most = max(p_s.shape[-1], p_t.shape[-1])
    p_s, p_t = (torch.cat([p, p.new_zeros(len(p), most - p.shape[-1])], -1) for p in (p_s, p_t))
    return (p_s - p_t).abs().sum(-1)


def layer_error(form: str, s: Tensor, t: Tensor) -> Tensor:
    """Between hidden states; `form` is a `normalize` or the metric "cosine"."""
    if form == "cosine":
        return 1 - (s * t).sum(-1) / ((s.norm(dim=-1) + 1e-5) * (t.norm(dim=-1) + 1e-5))
    if form == "layer_norm":
        s, t = ((x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() for x in (s, t))
    error = ((s - t) ** 2).mean(-1)
    return error / ((t**2).mean(-1) + 1e-5) if form == "teacher_rms" else error


def attended(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """How each head's query `[H, d]` spreads over its keys `[H, n, d]`: `[H, n]`."""
    return torch.stack([(scale * (k @ q)).softmax(-1) for q, k in zip(queries, keys, strict=True)])


def alignment(s: Tensor, t: Tensor, heads: int) -> Tensor:
    """KL between what states `[S, D]` of teacher and student, as queries, find among the teacher's before them; of all
    positions but the first.
    """
    values = []
    s, t = ((x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() for x in (s, t))
    for i in range(1, len(t)):
        each = []
        for a, b, keys in zip(s[i].chunk(heads), t[i].chunk(heads), t[:i].chunk(heads, -1), strict=True):
            found, truth = (((keys @ query) / len(query) ** 0.5).softmax(-1) for query in (a, b))
            each.append(kl(truth, found))
        values.append(torch.stack(each).mean())
    return torch.stack(values)


def contrast(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """How unlikely each state `[S, D]` is to be taken for its counterpart, by cosines of what is not common to all; the
    mean of both directions.
    """
    s, t = ((x - x.mean(-1, True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() for x in (s, t))
    s, t = ((x - x.mean(0)) / (x - x.mean(0)).norm(dim=-1, keepdim=True) for x in (s, t))
    scores = s @ t.T / temperature
    return -(scores.softmax(-1).diag().log() + scores.softmax(0).diag().log()) / 2


def mean(values: Tensor, weights: Tensor) -> Tensor:
    return (weights * values).sum() / weights.sum()
