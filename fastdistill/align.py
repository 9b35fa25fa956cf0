"""Which positions and which ids of student and teacher are compared, and which tokens count."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shift_targets(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    ignore_index: int = -100,
    *,
    context: Tensor | None = None,
) -> Tensor:
    """The id that each position must predict: `[B, S]` ids to `[B, S]` targets.

    A position's target is the id that follows it. The last position has none, nor has one that is padding or is
    followed by padding (`attention_mask` `[B, S]`, 0 for padding, on either side), nor one that is followed by a token
    which is only there to be read (`context` `[B, S]`, 0 for a token to be predicted); these get `ignore_index`.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, S], got shape {tuple(input_ids.shape)}")
    for name, tensor in (("attention_mask", attention_mask), ("context", context)):
        if tensor is not None and tensor.shape != input_ids.shape:
            raise ValueError(
                f"{name} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(tensor.shape)}"
            )
    targets = torch.full_like(input_ids, ignore_index)
    targets[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        real = attention_mask != 0
        targets[:, :-1].masked_fill_(~(real[:, :-1] & real[:, 1:]), ignore_index)
    if context is not None:
        targets[:, :-1].masked_fill_(context[:, 1:] != 0, ignore_index)
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


def aligned_positions(student_ends: Tensor, teacher_ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions at which student and teacher have read the same text.

    Args:
        student_ends, teacher_ends: int64 `[B, S]` and `[B, St]`, the byte of the row's text at which each token ends;
            -1 for a position that is not compared, padding for one. Others never fall along a row. Of neighbours with
            the same end (a token of no bytes) only the last has read all, and it alone is compared.

    Returns:
        row, student position, teacher position: int64 `[N]` each, in rising order. On a GPU, N is waited for.

    Raises:
        ValueError: other types or shapes, other devices, or, on the CPU, ends that fall.
    """
    for name, ends in (("student_ends", student_ends), ("teacher_ends", teacher_ends)):
        if ends.ndim != 2 or ends.dtype != torch.int64:
            raise ValueError(f"{name} must be int64 [B, S], got {ends.dtype} of shape {tuple(ends.shape)}")
    if len(student_ends) != len(teacher_ends) or student_ends.device != teacher_ends.device:
        raise ValueError(
            f"teacher_ends must have the {len(student_ends)} rows of student_ends on {student_ends.device}, "
            f"got {len(teacher_ends)} on {teacher_ends.device}"
        )
    row, student, student_end = _last_at_each_end("student_ends", student_ends)
    teacher_row, teacher, teacher_end = _last_at_each_end("teacher_ends", teacher_ends)
    # Row and end as one number, which rises along both lists: the one is searched for in the other.
    span = 1 + torch.cat((student_end, teacher_end, student_end.new_zeros(1))).max()
    wanted, given = row * span + student_end, teacher_row * span + teacher_end
    place = torch.searchsorted(given, wanted)
    found = torch.cat((given, given.new_full((1,), -1)))[place] == wanted
    return row[found], student[found], teacher[place[found]]


def _last_at_each_end(name: str, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, position and end of the positions that are compared, `[N]` each."""
    row, position = (ends >= 0).nonzero(as_tuple=True)
    end = ends[row, position]
    same_row = row[1:] == row[:-1]
    if ends.device.type == "cpu":
        falls = (same_row & (end[1:] < end[:-1])).nonzero()
        if len(falls) > 0:
            at = int(falls[0])
            raise ValueError(
                f"{name} must not fall along a row, got {int(end[at + 1])} after {int(end[at])} in row {int(row[at])}"
            )
    is_last = torch.ones_like(row, dtype=torch.bool)
    is_last[:-1] = ~(same_row & (end[1:] == end[:-1]))
    return row[is_last], position[is_last], end[is_last]


def shared_vocabulary(student: Sequence[bytes | None], teacher: Sequence[bytes | None]) -> tuple[Tensor, Tensor]:
    """Ids of the strings that two vocabularies share.

    Args:
        student, teacher: the bytes that each id stands for, by id; None for one that stands for no text. Of ids that
            stand for the same bytes the last is taken: SentencePiece's byte tokens come before its ordinary pieces, and
            added tokens, which are looked for first when a text is cut, after them.

    Returns:
        The ids of the student, rising, and those of the teacher for the same strings: int64 `[K]` each.
    """
    of_student = {string: i for i, string in enumerate(student) if string is not None}
    of_teacher = {string: i for i, string in enumerate(teacher) if string is not None}
    pairs = sorted((i, of_teacher[string]) for string, i in of_student.items() if string in of_teacher)
    ids = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


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
