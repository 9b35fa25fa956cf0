"""Text to fixed blocks of token ids, and the order in which they are seen."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastdistill.align import shift_targets
from fastdistill.training.config import UsageError

HELD_OUT_EVERY = 10
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Corpus:
    """Documents, split once and for all: every tenth is held out, and no paragraph stands in both parts."""

    name: str
    train: list[str]
    held_out: list[str]
    repeated: int
    """Characters left out because their paragraph stood in the text before."""

    def fingerprint(self) -> str:
        """Hash of the text and its split."""
        digest = hashlib.sha256()
        for document in (*self.train, "\0", *self.held_out):
            digest.update(document.encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()


def load_corpus(name: str) -> Corpus:
    """'pydoc', Python's language reference from the standard library, or a UTF-8 text file, whose paragraphs
    (between empty lines) are the documents.

    A paragraph that repeats an earlier one is dropped: topics of the reference quote each other at length, and text
    that is both held out and learned from would make every student look better than it is.
    """
    if name == "pydoc":
        from pydoc_data.topics import topics

        texts = [topics[topic].split("\n\n") for topic in sorted(topics)]
    else:
        try:
            texts = [[paragraph] for paragraph in Path(name).read_text(encoding="utf-8").split("\n\n")]
        except OSError as error:
            raise UsageError(f"--data {name}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            where = f"byte {error.start} is {error.object[error.start]:#04x}"
            raise UsageError(f"--data {name} is not UTF-8 text: {where}") from error
    seen: set[str] = {""}
    documents, repeated = [], 0
    for paragraphs in texts:
        new = [p for p in dict.fromkeys(paragraphs) if p.strip() not in seen]
        repeated += sum(map(len, paragraphs)) - sum(map(len, new))
        seen.update(p.strip() for p in new)
        if new:
            documents.append("\n\n".join(new))
    if len(documents) < HELD_OUT_EVERY:
        raise UsageError(
            f"--data {name} has {len(documents)} different documents (paragraphs between empty lines), and every tenth "
            f"is held out: at least {HELD_OUT_EVERY} are needed"
        )
    train = [document for i, document in enumerate(documents) if i % HELD_OUT_EVERY]
    return Corpus(name, train, documents[::HELD_OUT_EVERY], repeated)


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE of `vocab_size` ids, which covers any text; the last id ends a document."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
    )


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise `UsageError` unless both have the same ids and the same rules for cutting text into them."""

    def content(tokenizer: PreTrainedTokenizerBase) -> tuple:
        fast = isinstance(tokenizer, PreTrainedTokenizerFast)
        return tokenizer.get_vocab(), fast and tokenizer.backend_tokenizer.to_str()

    if content(student) != content(teacher):
        raise UsageError(
            f"student and teacher have different tokenizers ({len(student)} and {len(teacher)} ids): their positions "
            "and ids do not correspond"
        )


@dataclass(frozen=True)
class Blocks:
    """Token ids `[M, S]` and a bool mask `[M, S]`, False for the padding at the end of the last block.

    Neighbours share one token, so that every token of the text but the first is predicted exactly once.
    """

    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """`input_ids`, `mask`, `targets`, `[B, S]` each. Padding is on the right, where a causal model never looks."""
        ids, mask = self.ids[rows].to(device), self.mask[rows].to(device)
        return {"input_ids": ids, "mask": mask, "targets": shift_targets(ids, mask)}

    def num_targets(self) -> int:
        return int(self.mask[:, 1:].sum())


def make_blocks(documents: list[str], tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Blocks:
    """All documents in one stream, each ended by the tokenizer's end of text, cut into blocks of `seq_len`."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UsageError(f"the tokenizer {tokenizer.name_or_path} has no end-of-text token to put between documents")
    stream: list[int] = []
    for document in documents:
        # verbose=False: a document longer than the model's context is expected, it is cut into blocks.
        stream += tokenizer.encode(document, add_special_tokens=False, verbose=False)
        stream.append(end)
    if len(stream) < 2:
        raise UsageError(f"--data: {len(documents)} documents gave {len(stream)} tokens: there is nothing to predict")
    starts = range(0, len(stream) - 1, seq_len - 1)
    ids = torch.zeros(len(starts), seq_len, dtype=torch.int64)
    mask = torch.zeros(len(starts), seq_len, dtype=torch.bool)
    for i, start in enumerate(starts):
        part = stream[start : start + seq_len]
        ids[i, : len(part)] = torch.tensor(part)
        mask[i, : len(part)] = True
    return Blocks(ids, mask)


def draw(blocks: Blocks, share: float, seed: int) -> Blocks:
    """A random `share` of the blocks, at least one, in their order."""
    if share == 1:
        return blocks
    count = max(1, round(share * len(blocks)))
    kept = _permutation(len(blocks), seed, epoch=-1)[:count].sort().values
    return Blocks(blocks.ids[kept], blocks.mask[kept])


def sample_order(num_blocks: int, start: int, count: int, seed: int) -> Tensor:
    """Rows of the samples `start .. start + count` of an endless shuffled walk over the blocks, int64 `[count]`.

    A pure function of the sample's number: each epoch is a permutation made from the seed and the epoch, so a
    resumed run has no sampler to restore, and the split into micro-batches changes nothing.
    """
    rows = []
    while count > 0:
        epoch, offset = divmod(start, num_blocks)
        part = _permutation(num_blocks, seed, epoch)[offset : offset + count]
        rows.append(part)
        start, count = start + len(part), count - len(part)
    return torch.cat(rows)


def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randperm(size, generator=generator)
