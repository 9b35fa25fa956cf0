"""Which positions and which ids of student and teacher are compared, and which tokens count."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_targets(input_ids: Tensor, attention_mask: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """The id that each position must predict: `[B, S]` ids to `[B, S]` targets.

    A position's target is the id that follows it. The last position has none, nor has one that is padding or is
    followed by padding (`attention_mask` `[B, S]`, 0 for padding, on either side); these get `ignore_index`.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, S], got shape {tuple(input_ids.shape)}")
    targets = torch.full_like(input_ids, ignore_index)
    targets[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, "
                f"got {tuple(attention_mask.shape)}"
            )
        real = attention_mask != 0
        targets[:, :-1].masked_fill_(~(real[:, :-1] & real[:, 1:]), ignore_index)
    return targets


def common_positions(student: Tensor, teacher: Tensor | None) -> tuple[int, ...]:
    """Leading shape that two `[N, ...]` or `[B, S, ...]` tensors share: S is cut to the shorter of the two."""
    leading = tuple(student.shape[:-1])
    if teacher is None or len(leading) == 1:
        return leading
    return (leading[0], min(leading[1], teacher.shape[1]))


def cut(per_token: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The view of `per_token` `[N, ...]` or `[B, S, ...]` that covers the positions of `shape`."""
    return per_token if len(shape) == 1 else per_token[:, : shape[1]]


def shared_vocab_size(student_vocab: int, teacher_vocab: int | None, vocab_size: int | None) -> int:
    """How many leading ids both softmaxes run over; ids above belong to the padding of the larger head."""
    if vocab_size is not None:
        return vocab_size
    return student_vocab if teacher_vocab is None else min(student_vocab, teacher_vocab)


def outside_vocabulary(targets: Tensor, ignore_index: int, student_vocab: int) -> Tensor:
    """Which targets are no id of the student and not `ignore_index` either; bool, shaped like them."""
    return (targets != ignore_index) & ((targets < 0) | (targets >= student_vocab))


def token_weights(
    shape: tuple[int, ...],
    targets: Tensor | None,
    mask: Tensor | None,
    *,
    ignore_index: int,
    student_vocab: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Weight of each token, shaped `shape`; 0 for one that does not count.

    A token counts when its mask is not 0 and its target, where there are any, is neither `ignore_index` nor
    outside the student's vocabulary.
    """
    weights = torch.ones(shape, dtype=dtype, device=device) if mask is None else cut(mask, shape).to(dtype)
    if targets is not None:
        cut_targets = cut(targets, shape)
        left_out = (cut_targets == ignore_index) | outside_vocabulary(cut_targets, ignore_index, student_vocab)
        weights = weights.masked_fill(left_out, 0)
    return weights


def mean(total: Tensor, num_tokens: Tensor) -> Tensor:
    """total / num_tokens, and 0 where there are none, even of an infinite total; the device is not read."""
    counted = num_tokens > 0
    return torch.where(counted, total / torch.where(counted, num_tokens, 1), 0)
