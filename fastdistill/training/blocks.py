"""Tokens cut into blocks, and blocks put together to batches: what each model reads, and what it must predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastdistill.align import aligned_positions, shift_targets
from fastdistill.training.config import UsageError
from fastdistill.training.tokens import Tokens

IGNORED = -100


class Reading(NamedTuple):
    """What one model reads of one block; `[L]` each."""

    ids: Tensor
    context: Tensor
    """True for a token that is read and not predicted: it was predicted in the block before, or begins a document."""
    positions: Tensor
    """Place in the row, or with document masks in the document."""
    ends: Tensor | None
    """`Tokens.ends`, to find where another tokenizer has read the same."""


Block = tuple[Reading, ...]
"""One for the student; a second for a teacher of another tokenizer, of the same text."""


class Inputs(NamedTuple):
    """What a model is fed, `[B, S]`; `position_ids` where documents in a row must not see each other.

    `attention_mask` is 0 for padding; None where padding, if any, is on the right.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None = None

    def fed(self) -> dict[str, Tensor]:
        """The arguments with which a base model reads them.

        Padding on the right needs no mask; positions that begin anew tell transformers where documents part.
        """
        return {name: value for name, value in self._asdict().items() if value is not None}

    def places(self) -> Tensor:
        """How many tokens come before each in its document, or in its row where documents see each other, `[B, S]`."""
        if self.position_ids is not None:
            return self.position_ids
        if self.attention_mask is not None:
            return self.attention_mask.cumsum(1) - 1
        return torch.arange(self.input_ids.shape[1], device=self.input_ids.device).expand_as(self.input_ids)

    def past_first(self, count: int) -> Tensor:
        """Which positions, bool `[B, S]`, come after the first `count` of their document, or of their row."""
        return self.places() >= count


class Pairs(NamedTuple):
    """Positions at which student and teacher are compared, `[N]` each."""

    row: Tensor
    student: Tensor
    teacher: Tensor


class Batch(NamedTuple):
    """`mask` `[B, S]` is False for padding, which is on the right, where a causal model never looks, or hidden by the
    inputs' `attention_mask`; `targets` `[B, S]`.
    """

    student: Inputs
    mask: Tensor
    targets: Tensor
    teacher: Inputs
    pairs: Pairs | None
    """None where the tokenizer is shared: each position is compared with itself."""


@dataclass(frozen=True)
class Blocks:
    """Blocks of the tokens of one tokenizer, or of two tokenizers of the same text.

    `spans` `[M, sides, 3]`: the first token of a block, one past its last, and how many at its head are only read.
    """

    sides: tuple[Tokens, ...]
    spans: Tensor
    packing: str

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: int) -> Block:
        spans = self.spans[index].tolist()
        return tuple(_read(tokens, span, self.packing) for tokens, span in zip(self.sides, spans, strict=True))

    def select(self, indices: Tensor) -> Blocks:
        return replace(self, spans=self.spans[indices])

    def side(self, number: int) -> Blocks:
        """The blocks as one model alone reads them."""
        return Blocks((self.sides[number],), self.spans[:, [number]], self.packing)

    def num_targets(self) -> int:
        """How many tokens the student predicts."""
        tokens, (first, end, reread) = self.sides[0], self.spans[:, 0].unbind(1)
        first = first + reread.clamp(min=1)
        begun = torch.searchsorted(tokens.starts, torch.stack([first, end])).diff(dim=0)
        return int((end - first).sum()) - (int(begun.sum()) if _beginnings_are_given(tokens, self.packing) else 0)


def cut(sides: tuple[Tokens, ...], seq_len: int, packing: str, context: int = 1) -> Blocks:
    """Blocks of at most `seq_len` tokens a model, in the order of the text.

    A block begins by reading once more what came last before it, so that every token is predicted exactly once, but
    the first of all, and with document masks the first of each document: nothing comes before it to predict it from.
    It reads `context` tokens again, less where the document has no more and more where tokens are long: so many are
    before each token at least, and a longer context makes more blocks.
    Two models' blocks are cut where both have the end of a token, so that they read the same text.

    `packing` is "stream" (documents follow each other in a row and are seen from the next), "documents" (they
    follow each other and are not seen) or "padded" (a row is of one document).
    """
    room = [seq_len - (tokens.beginning is not None) for tokens in sides]
    if min(room) < 2:
        raise UsageError(f"--seq-len {seq_len} leaves no two tokens beside the beginning of text")
    if not 1 <= context < min(room):
        raise UsageError(f"of --seq-len {seq_len}, 1 to {min(room) - 1} tokens may be read again, got {context}")
    longest = [1] if len(sides) == 1 else [size // 2 for size in room]
    marks, ends_document = _common_marks(sides, longest)
    document_ends = ends_document.nonzero().flatten().tolist()
    columns = [marks[:, side].contiguous() for side in range(len(sides))]
    spans, mark, document = [], 0, 0
    while mark < len(marks):
        while document_ends[document] < mark:
            document += 1
        # What came before is of no use to a document that does not see it.
        reread = mark > 0 and (packing == "stream" or not ends_document[mark - 1])
        last = document_ends[document] if packing == "padded" else len(marks) - 1
        begins = 0 if packing == "stream" or not document else document_ends[document - 1] + 1
        again = max(mark - context, begins)
        while again < mark - 1 and any(
            _after_mark(column, mark) - _after_mark(column, again) > size - step
            for column, size, step in zip(columns, room, longest, strict=True)
        ):
            again += 1  # or there would be no room for what is new
        span = []
        for column, size in zip(columns, room, strict=True):
            new = _after_mark(column, mark)
            first = min(new - 1, _after_mark(column, again)) if reread else new
            last = min(last, int(torch.searchsorted(column, first + size)) - 1)
            span.append((first, new))
        # A document of a single token has nothing to predict.
        ends = [int(column[last]) + 1 for column in columns]
        if ends[0] - span[0][0] > 1:
            spans.append([(first, end, new - first) for (first, new), end in zip(span, ends, strict=True)])
        mark = last + 1
    return Blocks(sides, torch.tensor(spans, dtype=torch.int64).view(-1, len(sides), 3), packing)


def _after_mark(column: Tensor, mark: int) -> int:
    """The first token after so many marks."""
    return int(column[mark - 1]) + 1 if mark else 0


def collate(blocks: Sequence[Block], device: torch.device, *, align: str = "bytes") -> Batch:
    """A batch of blocks. `align` is how two tokenizers' positions are paired: "bytes", or by number with "cut"."""
    readings = [block[0] for block in blocks]
    mask = _mask(readings)
    context = _pad([reading.context for reading in readings], True)
    student = _inputs(readings, device)
    targets = shift_targets(_pad([reading.ids for reading in readings], 0), mask, context=context)
    teacher, pairs = student, None
    if len(blocks[0]) == 2:
        others = [block[1] for block in blocks]
        teacher = _inputs(others, device)
        counted = targets != IGNORED
        if align == "bytes":
            ends = _pad([reading.ends for reading in readings], -1)
            found = aligned_positions(ends.masked_fill(~counted, -1), _pad([r.ends for r in others], -1))
        else:
            shared = min(mask.shape[1], int(_mask(others).shape[1]))
            row, position = (counted[:, :shared] & _mask(others)[:, :shared]).nonzero(as_tuple=True)
            found = (row, position, position)
        pairs = Pairs(*(_on(device, index) for index in found))
    return Batch(student, _on(device, mask), _on(device, targets), teacher, pairs)


def _read(tokens: Tokens, span: list[int], packing: str) -> Reading:
    first, end, reread = span
    places = torch.arange(first, end)
    beginnings = tokens.starts[torch.searchsorted(tokens.starts, places, right=True) - 1]
    context = places < first + reread
    if _beginnings_are_given(tokens, packing):
        context |= beginnings == places
    ids, ends = tokens.ids[first:end].long(), None if tokens.ends is None else tokens.ends[first:end]
    begun_for_it = tokens.beginning is not None and int(beginnings[0]) != first
    if begun_for_it:
        ids, context = _after(ids, tokens.beginning), _after(context, True)
        ends = None if ends is None else _after(ends, -1)
    positions = torch.arange(len(ids))
    if packing == "documents":
        own = places - beginnings.clamp(min=first - begun_for_it)
        positions = _after(own, 0) if begun_for_it else own
    return Reading(ids, context, positions, ends)


def _beginnings_are_given(tokens: Tokens, packing: str) -> bool:
    """Whether the first token of a document is only read."""
    return packing != "stream" or tokens.beginning is not None


def _after(values: Tensor, first: int | None) -> Tensor:
    return torch.cat([values.new_tensor([first]), values])


def _common_marks(sides: tuple[Tokens, ...], longest: list[int]) -> tuple[Tensor, Tensor]:
    """Where all sides have the end of a token: the number of that token in each, `[K, sides]`; and whether a
    document ends there, `[K]`.

    A stretch of more than `longest` tokens without such a place (one model's tokens reach over the other's for
    hundreds of bytes) is cut into even parts: the block that begins there has read a few bytes more in one model.
    """
    if len(sides) == 1:
        marks = torch.arange(len(sides[0].ids))[:, None]
    else:
        assert sides[0].ends is not None
        assert sides[1].ends is not None
        _, *found = aligned_positions(sides[0].ends[None], sides[1].ends[None])
        marks = torch.stack(found, 1)
        steps = marks.diff(dim=0, prepend=torch.full((1, 2), -1))
        parts = (steps / torch.tensor(longest)).ceil().amax(1).long().clamp(min=1)
        if int(parts.max()) > 1:
            which = torch.repeat_interleave(torch.arange(len(marks)), parts)
            number = torch.arange(len(which)) - (parts.cumsum(0) - parts)[which] + 1
            marks = marks[which] - steps[which] + (steps[which] * number[:, None] / parts[which, None]).ceil().long()
    is_end = torch.zeros(len(sides[0].ids), dtype=torch.bool)
    is_end[sides[0].starts[1:] - 1] = True
    return marks, is_end[marks[:, 0]]


def _mask(readings: Sequence[Reading]) -> Tensor:
    return _pad([torch.ones_like(reading.context) for reading in readings], False)


def _inputs(readings: Sequence[Reading], device: torch.device) -> Inputs:
    ids = _on(device, _pad([reading.ids for reading in readings], 0))
    if all(torch.equal(reading.positions, torch.arange(len(reading.ids))) for reading in readings):
        return Inputs(ids, None)
    return Inputs(ids, _on(device, _pad([reading.positions for reading in readings], 0)))


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on the device; from pinned memory, it is queued there and not waited for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _pad(rows: Sequence[Tensor | None], value: float) -> Tensor:
    """`[B, S]` of rows `[L]`, the shorter filled at their ends."""
    return pad_sequence([row for row in rows if row is not None], batch_first=True, padding_value=value)
