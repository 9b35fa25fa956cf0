"""What is measured of a model at each token that it predicts: by itself, and beside its teacher."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdistill import softmax_kl
from fastdistill.cross_vocab import events_
from fastdistill.heads import MAX_CHUNK_BYTES, Head
from fastdistill.products import Precision

TOP = 5
BUFFERS = 6
"""Most tensors `[tokens, V + Vt]` in float32 that a chunk has at once: logits, and what `retention` makes of them."""


class Retention(NamedTuple):
    """How near a student's next-token distribution p_s is to its teacher's p_t, at T = 1, `[n]` each.

    `kl` is KL(teacher || student) in nats; `top1` whether both hold the same string most probable; `top5` the share of
    the teacher's five most probable that are among the student's; `mass` is what both give the same events,
    `sum min(p_s, p_t)`, which is 1 minus their total variation; `teacher_entropy` is in nats.
    """

    kl: Tensor
    top1: Tensor
    top5: Tensor
    mass: Tensor
    teacher_entropy: Tensor


class Measures(NamedTuple):
    """Of one batch: of the `n` tokens predicted, and of the `m` positions that are compared with the teacher.

    `loss` is the cross-entropy in nats, `place` how many tokens of its document, or of its row, the model had read
    before the last one, `[n]`; `text_bytes` the bytes of each predicted token's text; `compared_place` is like `place`.
    """

    loss: Tensor
    place: Tensor
    text_bytes: Tensor | None
    retention: Retention | None
    compared_place: Tensor | None

    def sums(self) -> Tensor:
        """float64: `loss`, n, `text_bytes`, m, and each field of `Retention`; 0 for what there is not."""
        none = self.loss.new_zeros(0)
        retained = self.retention or Retention(none, none, none, none, none)
        compared = retained.kl.new_tensor(len(retained.kl))
        predicted = self.loss.new_tensor(len(self.loss))
        text_bytes = none if self.text_bytes is None else self.text_bytes
        summed = [self.loss, predicted, text_bytes, compared, *retained]
        return torch.stack([each.double().sum() for each in summed])


SUMS = 4 + len(Retention._fields)
"""How many numbers `Measures.sums` has."""


class States(NamedTuple):
    """What an output head takes of `n` tokens, `[n, D]`, and the head: `[V, D]` and, if it has one, `[V]`."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def head(self) -> Head:
        precision = Precision.of(self.hidden, self.weight, torch.float32, None)
        return Head(self.hidden, self.weight, self.bias, len(self.weight), precision)


def cross_entropy(student: States, targets: Tensor) -> Tensor:
    """In nats, `[n]`, of the ids `[n]` that came."""
    head, losses = student.head(), []
    for part in _chunks(len(targets), len(student.weight)):
        losses.append(_cross_entropy(_logits(head, part), targets[part]))
    return torch.cat(losses)


def cross_entropy_and_retention(
    student: States, teacher: States, targets: Tensor, vocab_size: int | None
) -> tuple[Tensor, Retention]:
    """Of two models with one tokenizer. The cross-entropy is over the student's whole head, what is compared over the
    first `vocab_size` ids, by default all that both have.
    """
    vocab_size = vocab_size or min(len(student.weight), len(teacher.weight))
    heads, found = (student.head(), teacher.head()), []
    for part in _chunks(len(targets), len(student.weight) + len(teacher.weight)):
        logits, teacher_logits = (_logits(head, part) for head in heads)
        loss = _cross_entropy(logits, targets[part])
        found.append((loss, *retention(logits[:, :vocab_size], teacher_logits[:, :vocab_size])))
    loss, *compared = (torch.cat(values) for values in zip(*found, strict=True))
    return loss, Retention(*compared)


def cross_vocab_retention(student: States, teacher: States, shared_ids: tuple[Tensor, Tensor]) -> Retention:
    """Of two models with different tokenizers, over the strings that both hold and all others together.

    The most probable strings are each model's own, of its whole vocabulary: one that the other has not agrees with
    none.
    """
    vocabs = len(student.weight), len(teacher.weight)
    has_others = len(shared_ids[0]) < min(vocabs)
    same_string = shared_ids[1].new_full(vocabs[:1], -1).index_copy_(0, *shared_ids)
    heads, found = (student.head(), teacher.head()), []
    for part in _chunks(len(student.hidden), sum(vocabs)):
        logits, teacher_logits = (_logits(head, part) for head in heads)
        top, teacher_top = same_string[_top(logits)], _top(teacher_logits)
        events = events_(logits, shared_ids[0], 1.0, has_others)
        teacher_events = events_(teacher_logits, shared_ids[1], 1.0, has_others)
        found.append(retention(events, teacher_events, top, teacher_top))
    return Retention(*(torch.cat(values) for values in zip(*found, strict=True)))


def retention(
    student: Tensor, teacher: Tensor, student_top: Tensor | None = None, teacher_top: Tensor | None = None
) -> Retention:
    """Of logits `[n, V]`. The tops are the most probable ids in order, `[n, 5]`, where others than these logits'."""
    student_top = _top(student) if student_top is None else student_top
    teacher_top = _top(teacher) if teacher_top is None else teacher_top
    out = softmax_kl(student, teacher, reduction="none", metrics=True)
    assert out.kl is not None
    assert out.teacher_entropy is not None
    among = (teacher_top[:, :, None] == student_top[:, None, :]).any(2)
    mass = torch.minimum(student.softmax(1), teacher.softmax(1)).sum(1)
    top1 = (teacher_top[:, 0] == student_top[:, 0]).float()
    return Retention(out.kl, top1, among.float().mean(1), mass, out.teacher_entropy)


def _top(logits: Tensor) -> Tensor:
    return logits.topk(min(TOP, logits.shape[1])).indices


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    out = softmax_kl(logits, None, targets, kl_weight=0.0, ce_weight=1.0, reduction="none")
    return out.loss


def _logits(head: Head, part: slice) -> Tensor:
    """Of some tokens, float32 `[n, V]`."""
    hidden = head.hidden[part].to(head.precision.operands)
    buffer = hidden.new_empty(len(hidden), len(head.weight), dtype=head.precision.logits)
    return head.logits(hidden, buffer).float()


def _chunks(tokens: int, vocab: int) -> list[slice]:
    """One at least, of nothing if there is nothing."""
    size = max(1, MAX_CHUNK_BYTES // (BUFFERS * vocab * 4))
    return [slice(start, start + size) for start in range(0, max(1, tokens), size)]
