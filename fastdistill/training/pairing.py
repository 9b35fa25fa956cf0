"""What of two models is compared with what: one tokenizer or two, which ids, which positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastdistill.align import shared_vocabulary
from fastdistill.training.blocks import IGNORED, Blocks, collate
from fastdistill.training.config import Config, UsageError
from fastdistill.training.tokenizers import (
    BEGINNING_OF_TEXT_STRING,
    END_OF_TEXT_STRING,
    relation,
    token_strings,
)

FEW = 0.2
"""Below this share of usable positions a student hardly learns from its teacher, and is told so."""


@dataclass(frozen=True)
class Pairing:
    """How the ids and positions of student and teacher correspond.

    `tokenizers` is the one that text is cut with, or the student's and the teacher's; `why` says what decided it.
    With one, `vocab_size` ids are compared, and heads may hold more. With two, `shared_ids` are the ids, `[K]` each, of
    the strings that both have; `align` is "bytes" (positions that have read the same text) or "cut" (positions of the
    same number); `method` is how two vocabularies' distributions are compared, "shared" or "sorted"; `text_bytes` are
    the UTF-8 bytes of each id's text, for either tokenizer.
    """

    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    why: str
    vocab_size: int | None = None
    shared_ids: tuple[Tensor, Tensor] | None = None
    align: str = "bytes"
    method: str = "shared"
    text_bytes: tuple[Tensor, ...] = ()

    @property
    def is_one(self) -> bool:
        return self.shared_ids is None

    def of_teacher(self) -> Pairing:
        """The pairing by which the teacher is compared with itself."""
        return self if self.is_one else Pairing(self.tokenizers[1:], "the teacher's", text_bytes=self.text_bytes[1:])


ONE_TOKENIZER = Pairing((), "one tokenizer")


def pair(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, config: Config, device: torch.device
) -> Pairing:
    """The pairing of two tokenizers, decided from their content; if they differ, by `--align` and `--cross-vocab`."""
    found = relation(student, teacher)
    if found.kind != "different":
        # Of two that differ in tokens added at the end, the smaller gives ids that both models know.
        smaller = min(student, teacher, key=len)
        return Pairing((smaller,), found.why, vocab_size=max(smaller.get_vocab().values()) + 1)
    if config.cross_vocab == "sorted" and config.divergence != "forward_kl":
        raise UsageError(f"--divergence {config.divergence} is for --cross-vocab shared: leave it out")
    strings = [token_strings(student), token_strings(teacher)]
    shared = shared_vocabulary(*strings)
    if not len(shared[0]):
        raise UsageError(
            f"the two tokenizers share no string ({found.why}): the models' predictions cannot be compared"
        )
    return Pairing(
        (student, teacher),
        found.why,
        shared_ids=(shared[0].to(device), shared[1].to(device)),
        align=config.align,
        method=config.cross_vocab,
        text_bytes=(text_bytes(student, device), text_bytes(teacher, device)),
    )


def text_bytes(tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Tensor:
    """UTF-8 bytes of each id's text, int64 `[V]`; 0 for one that is no text. Raises what `token_strings` does."""
    no_text = (None, END_OF_TEXT_STRING, BEGINNING_OF_TEXT_STRING)
    sizes = [0 if string in no_text else len(string or b"") for string in token_strings(tokenizer)]
    return torch.tensor(sizes, device=device)


def describe(pairing: Pairing, blocks: Blocks) -> str:
    """What is compared with what in `blocks`, for the log; with a warning where that is little."""
    if pairing.is_one:
        return f"one set of ids ({pairing.why}): every position is compared"
    share = usable_positions(blocks, pairing.align)
    how = {"bytes": "that have read the same text", "cut": "cut to the shorter, most of them on other text"}
    text = f"two tokenizers ({pairing.why}): {share:.1%} of positions are compared, those {how[pairing.align]}"
    if share < FEW:
        text += f"\nwarning: below {FEW:.0%} a student hardly learns from its teacher: choose one with closer tokens"
    return text


def usable_positions(blocks: Blocks, align: str) -> float:
    """Share of the student's predictions that have a position of the teacher to be compared with."""
    usable = predicted = 0
    for i in range(len(blocks)):
        batch = collate([blocks[i]], torch.device("cpu"), align=align)
        assert batch.pairs is not None
        usable += len(batch.pairs.row)
        predicted += int((batch.targets != IGNORED).sum())
    return usable / max(1, predicted)
