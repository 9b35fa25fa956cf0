"""The definition of every loss, in plain differentiable PyTorch.

Each function has the name and the arguments of its public twin and says in a few lines what that computes; autograd
makes the gradient. Nothing is chunked or fused: all of [N, V] is held several times over. Tests take these in
float64 as the truth, benchmarks take them as the eager baseline. They trust their arguments; the public functions
check them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.align import common_positions, cut, mean, outside_vocabulary, shared_vocab_size, token_weights
from fastdistill.outputs import AttentionKLOutput, CrossVocabOutput, LayerLossOutput, LossOutput

LAYER_EPS = 1e-5
MAX_LOG_RATIO = 80.0
HIDDEN = torch.finfo(torch.float32).min / 2
"""A score that no softmax sees, and that makes no NaN of a row that sees nothing."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for all else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def forward_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(teacher || student) = sum p_t (log p_t - log p_s); log-probabilities `[..., V]` to `[...]`."""
    p_t = log_t.exp()
    return torch.where(p_t > 0, p_t * (log_t - log_s), 0).sum(-1)


def reverse_kl(log_s: Tensor, log_t: Tensor) -> Tensor:
    """KL(student || teacher) = sum p_s (log p_s - log p_t); log-probabilities `[..., V]` to `[...]`.

    Student mass where the teacher has none makes the value infinite; the gradient then takes such an id's log-ratio
    as `MAX_LOG_RATIO`, so that it stays finite and pushes the mass away.
    """
    no_student, no_teacher = torch.isneginf(log_s), torch.isneginf(log_t)
    p_s = log_s.exp()
    log_s = log_s.masked_fill(no_student, 0)
    log_t = torch.where(no_teacher, log_s.detach() - MAX_LOG_RATIO, log_t)
    value = torch.where(no_student, 0, p_s * (log_s - log_t)).sum(-1)
    return value + torch.where((no_teacher & (p_s > 0)).any(-1), torch.inf, 0.0)


def jsd(log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
    """Generalised Jensen-Shannon divergence, log-probabilities `[..., V]` to `[...]`.

    beta KL(p_t || m) + (1 - beta) KL(p_s || m) with m = beta p_t + (1 - beta) p_s (Agarwal et al. 2024,
    arXiv:2306.13649). With d = log p_t - log p_s the logarithms are log(p_s / m) = -log1p(beta expm1(d)) and
    log(p_t / m) = -log1p((1 - beta) expm1(-d)), exact where the two are close; d is held within
    `MAX_LOG_RATIO`, beyond which nothing of the smaller term is left.
    """
    absent = torch.isneginf(log_s) & torch.isneginf(log_t)
    d = (log_t.masked_fill(absent, 0) - log_s.masked_fill(absent, 0)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    student_term = -log_s.exp() * torch.log1p(beta * torch.expm1(d))
    teacher_term = -log_t.exp() * torch.log1p((1 - beta) * torch.expm1(-d))
    return (beta * teacher_term + (1 - beta) * student_term).sum(-1)


def divergence_between(log_s: Tensor, log_t: Tensor, divergence: str, jsd_beta: float) -> Tensor:
    """The divergence of that name of log-probabilities `[..., V]`, `[...]`."""
    if divergence == "forward_kl":
        return forward_kl(log_s, log_t)
    if divergence == "reverse_kl":
        return reverse_kl(log_s, log_t)
    return jsd(log_s, log_t, jsd_beta)


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    temperature_squared: bool = True,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_tokens: float | Tensor | None = None,
    reduction: str = "mean",
    metrics: bool = False,
) -> LossOutput:
    """sum_i w_i (kl_weight T^2 div_i + ce_weight ce_i) / num_tokens; see `fastdistill.softmax_kl`."""
    dtype, student_vocab = compute_dtype(student_logits), student_logits.shape[-1]
    shape = common_positions(student_logits, teacher_logits)
    w = token_weights(
        shape,
        targets,
        mask,
        ignore_index=ignore_index,
        student_vocab=student_vocab,
        dtype=dtype,
        device=student_logits.device,
    )
    counts = w != 0
    # Uncounted tokens may hold anything, NaN too: zeros in their place keep it out of value and gradient.
    student = cut(student_logits, shape).to(dtype).masked_fill(~counts[..., None], 0)
    loss, kl, ce = torch.zeros_like(w), None, None
    student_entropy = teacher_entropy = top1_agreement = None

    if teacher_logits is not None:
        teacher = cut(teacher_logits, shape).to(dtype).masked_fill(~counts[..., None], 0)
        shared = shared_vocab_size(student_vocab, teacher.shape[-1], vocab_size)
        z_s, z_t = student[..., :shared], teacher[..., :shared]
        log_s, log_t = F.log_softmax(z_s / temperature, -1), F.log_softmax(z_t / temperature, -1)
        kl = divergence_between(log_s, log_t, divergence, jsd_beta)
        if kl_weight != 0:
            loss = loss + kl_weight * (temperature**2 if temperature_squared else 1) * kl
        if metrics:
            student_entropy = torch.special.entr(F.softmax(z_s.detach(), -1)).sum(-1)
            teacher_entropy = torch.special.entr(F.softmax(z_t, -1)).sum(-1)
            top1_agreement = (z_s.argmax(-1) == z_t.argmax(-1)).to(dtype)

    invalid_targets = None
    if targets is not None:
        cut_targets = cut(targets, shape)
        ce = -F.log_softmax(student, -1).gather(-1, cut_targets.masked_fill(~counts, 0)[..., None]).squeeze(-1)
        if ce_weight != 0:
            loss = loss + ce_weight * ce
        invalid_targets = outside_vocabulary(cut_targets, ignore_index, student_vocab).sum()

    n = w.sum() if num_tokens is None else torch.as_tensor(num_tokens, dtype=dtype, device=w.device)

    def reduce(per_token: Tensor) -> Tensor:
        weighted = torch.where(counts, w * per_token, 0)
        if reduction == "none":
            return _pad_positions(weighted, tuple(student_logits.shape[:-1]))
        return mean(weighted.sum(), n) if reduction == "mean" else weighted.sum()

    values = (kl, ce, student_entropy, teacher_entropy, top1_agreement)
    return LossOutput(
        reduce(loss),
        *(None if x is None else reduce(x.detach()) for x in values),
        num_tokens=n,
        invalid_targets=invalid_targets,
    )


def linear_softmax_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    targets: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **keywords,
) -> LossOutput:
    """`softmax_kl` of logits = hidden @ weight.T + bias, both held whole; see `fastdistill.linear_softmax_kl`."""
    student_logits = F.linear(student_hidden, student_weight, student_bias)
    teacher_logits = None
    if teacher_hidden is not None and teacher_weight is not None:
        teacher_logits = F.linear(teacher_hidden, teacher_weight, teacher_bias)
    return softmax_kl(student_logits, teacher_logits, targets, **keywords)


def cross_vocab_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    shared_ids: tuple[Tensor, Tensor] | None,
    *,
    mask: Tensor | None = None,
    method: str = "shared",
    temperature: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    temperature_squared: bool = True,
    num_tokens: float | Tensor | None = None,
    reduction: str = "mean",
    metrics: bool = False,
) -> CrossVocabOutput:
    """What `fastdistill.linear_cross_vocab_kl` computes of logits `[N, V]` and `[N, Vt]`."""
    dtype = compute_dtype(student_logits)
    w = torch.ones_like(student_logits[:, 0], dtype=dtype) if mask is None else mask.to(dtype)
    counts = w != 0
    z_s, z_t = (z.to(dtype).masked_fill(~counts[:, None], 0) for z in (student_logits, teacher_logits))
    log_s, log_t = F.log_softmax(z_s / temperature, -1), F.log_softmax(z_t / temperature, -1)
    if method == "sorted":
        p_s, p_t = log_s.exp().sort(descending=True).values, log_t.exp().sort(descending=True).values
        longer = max(p_s.shape[1], p_t.shape[1])
        padded_s, padded_t = (F.pad(p, (0, longer - p.shape[1])) for p in (p_s, p_t))
        kl = (padded_s - padded_t).abs().sum(-1)
        loss = kl
    else:
        assert shared_ids is not None
        has_others = all(len(ids) < log_p.shape[1] for ids, log_p in zip(shared_ids, (log_s, log_t), strict=True))
        log_s, log_t = (_coarse(log_p, ids, has_others) for ids, log_p in zip(shared_ids, (log_s, log_t), strict=True))
        kl = divergence_between(log_s, log_t, divergence, jsd_beta)
        loss = temperature**2 * kl if temperature_squared else kl
    top1_agreement = None
    if metrics and shared_ids is not None:
        best = torch.stack([z_s.argmax(-1), z_t.argmax(-1)], 1)
        top1_agreement = (best[:, None] == torch.stack(list(shared_ids), 1)).all(-1).any(-1).to(dtype)

    n = w.sum() if num_tokens is None else torch.as_tensor(num_tokens, dtype=dtype, device=w.device)

    def reduce(per_token: Tensor) -> Tensor:
        total = torch.where(counts, w * per_token, 0).sum()
        return mean(total, n) if reduction == "mean" else total

    agreement = None if top1_agreement is None else reduce(top1_agreement)
    return CrossVocabOutput(reduce(loss), reduce(kl.detach()), agreement, n)


def _coarse(log_p: Tensor, ids: Tensor, has_others: bool) -> Tensor:
    """Log-probabilities `[N, V]` to those of the events `ids` and of all others, or of `ids` alone, renormalised."""
    shared = log_p[:, ids]
    if not has_others:
        return shared - shared.logsumexp(-1, keepdim=True)
    is_other = torch.ones(log_p.shape[1], dtype=torch.bool, device=log_p.device)
    is_other[ids] = False
    return torch.cat([shared, log_p[:, is_other].logsumexp(-1, keepdim=True)], -1)


def layer_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    metric: str = "mse",
    normalize: str = "none",
    layer_weights: Sequence[float] | Tensor | None = None,
    skip_first: int = 0,
    num_tokens: float | Tensor | None = None,
) -> LayerLossOutput:
    """Weighted mean over layers of sum_i w_i error_i / num_tokens; see `fastdistill.layer_loss`."""
    dtype = compute_dtype(student_states[0])
    per_layer = []
    for student_state, teacher_state in zip(student_states, teacher_states, strict=True):
        shape = common_positions(student_state, teacher_state)
        w = layer_token_weights(shape, mask, skip_first, dtype, student_state.device)
        counts = (w != 0)[..., None]
        s = cut(student_state, shape).to(dtype).masked_fill(~counts, 0)
        t = cut(teacher_state, shape).to(dtype).masked_fill(~counts, 0)
        if metric == "cosine":
            error = 1 - (s * t).sum(-1) / ((s.norm(dim=-1) + LAYER_EPS) * (t.norm(dim=-1) + LAYER_EPS))
        elif normalize == "layer_norm":
            width = s.shape[-1:]
            error = (F.layer_norm(s, width, eps=LAYER_EPS) - F.layer_norm(t, width, eps=LAYER_EPS)).square().mean(-1)
        elif normalize == "teacher_rms":
            error = (s - t).square().mean(-1) / (t.square().mean(-1) + LAYER_EPS)
        else:
            error = (s - t).square().mean(-1)
        n = w.sum() if num_tokens is None else torch.as_tensor(num_tokens, dtype=dtype, device=w.device)
        per_layer.append(mean(torch.where(counts[..., 0], w * error, 0).sum(), n))
    return combine_layers(per_layer, layer_weights)


def layer_token_weights(
    shape: tuple[int, ...], mask: Tensor | None, skip_first: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The mask, or ones, as weights shaped `shape`, 0 at the first `skip_first` positions."""
    w = torch.ones(shape, dtype=dtype, device=device) if mask is None else cut(mask, shape).to(dtype)
    if skip_first:
        w = w.clone()
        w[:, :skip_first] = 0
    return w


def combine_layers(per_layer: list[Tensor], layer_weights: Sequence[float] | Tensor | None) -> LayerLossOutput:
    """Mean over layers weighted by `layer_weights`, which need not sum to 1; a layer of weight 0 is left out."""
    stacked = torch.stack(per_layer)
    if layer_weights is None:
        return LayerLossOutput(stacked.mean(), stacked.detach())
    weights = torch.as_tensor(layer_weights, dtype=stacked.dtype, device=stacked.device)
    return LayerLossOutput(torch.where(weights > 0, weights * stacked, 0).sum() / weights.sum(), stacked.detach())


def attention_kl(
    student_q: Tensor,
    student_k: Tensor,
    teacher_q: Tensor,
    teacher_k: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool = True,
    itself: bool = True,
    documents: Tensor | None = None,
    scale: float | tuple[float, float] | None = None,
    num_tokens: float | Tensor | None = None,
) -> AttentionKLOutput:
    """sum_i w_i KL_hi / num_tokens, a mean over heads h; both models' maps are held. See `fastdistill.attention_kl`."""
    dtype = compute_dtype(student_q)
    scales = attention_scales(scale, student_q, teacher_q)
    w = torch.ones_like(student_q[:, 0, :, 0], dtype=dtype) if mask is None else mask.to(dtype)
    counts = w != 0
    visible = attention_visible(counts, documents, causal=causal, itself=itself)
    maps = []
    for query, key, factor in zip((student_q, teacher_q), (student_k, teacher_k), scales, strict=True):
        query, key = (x.to(dtype).masked_fill(~counts[:, None, :, None], 0) for x in (query, key))
        maps.append(log_attention(query, key, factor, visible))
    rows = torch.where(counts[:, None], w[:, None] * map_kl(*maps), 0)
    n = w.sum() if num_tokens is None else torch.as_tensor(num_tokens, dtype=dtype, device=w.device)
    per_head = mean(rows.sum((0, 2)), n)
    return AttentionKLOutput(per_head.mean(), per_head.detach())


def attention_scales(
    scale: float | tuple[float, float] | None, student_q: Tensor, teacher_q: Tensor
) -> tuple[float, float]:
    """What the student's and the teacher's products of queries and keys are multiplied by; default 1 / sqrt(d)."""
    if scale is None:
        return student_q.shape[-1] ** -0.5, teacher_q.shape[-1] ** -0.5
    return (scale, scale) if isinstance(scale, (int, float)) else (scale[0], scale[1])


def attention_visible(counts: Tensor, documents: Tensor | None, *, causal: bool, itself: bool) -> Tensor:
    """Whether a query (row) sees a key, bool `[B, S, S]`: both count and are of one document, with `causal` the key is
    not later, and it is the query's own position only with `itself`.
    """
    visible = counts[:, :, None] & counts[:, None, :]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    if causal:
        visible = visible.tril()
    return visible if itself else visible & ~torch.eye(counts.shape[1], dtype=torch.bool, device=counts.device)


def log_attention(query: Tensor, key: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Logarithm of the row-normalised maps, `[B, H, S, S]`, in fp32 or, of fp64, in fp64.

    Args:
        query, key: `[B, H, S, d]` and `[B, Hkv, S, d]`, H a multiple of Hkv: each key serves H / Hkv heads in a row.
        scale: of their products.
        visible: bool, `[B, S, S]`: whether a query (row) sees a key. What it does not see has log-weight `HIDDEN` or
            near it, so that its weight is 0.
    """
    query, key = query.to(compute_dtype(query)), key.to(compute_dtype(key))
    with torch.autocast(query.device.type, enabled=False):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        scores = (scale * query) @ key.mT
        return scores.masked_fill(~visible[:, None], HIDDEN).log_softmax(-1)


def map_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row of maps given by their logarithms, `[..., S, S]` to `[..., S]`, in nats."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def _pad_positions(per_token: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`per_token` with zeros at the positions that alignment cut off."""
    if len(shape) == 1:
        return per_token
    return F.pad(per_token, (0, shape[1] - per_token.shape[1]))
