"""The text of a run: from sources to blocks of one tokenizer or two, training part and held-out part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fastdistill.training.blocks import Blocks, cut
from fastdistill.training.config import UsageError
from fastdistill.training.sources import DocumentStream, Source
from fastdistill.training.tokens import tokenize
from fastdistill.training.walk import MixedWalk, ShuffledWalk, StreamedWalk, Walk, permutation

PORTION_CHARACTERS = 4_000_000
"""How much of a stream is shuffled at a time."""


@dataclass(frozen=True)
class Cutter:
    """How text becomes blocks: for one tokenizer, or the student's and the teacher's."""

    tokenizers: tuple[PreTrainedTokenizerBase, ...]
    seq_len: int
    packing: str
    context: int = 1
    """As in `blocks.cut`."""

    def __call__(self, documents: Sequence[str], key: str | None = None) -> Blocks:
        """Blocks of `documents`; with `key`, which names their content, their tokens are kept."""
        two = len(self.tokenizers) > 1
        sides = tuple(tokenize(documents, each, with_ends=two, key=key) for each in self.tokenizers)
        return cut(sides, self.seq_len, self.packing, self.context)


@dataclass(frozen=True)
class TrainingText:
    """Blocks in memory, or streams that are read as they are needed, with the share of samples from each."""

    parts: list[Blocks | DocumentStream]
    shares: list[float]
    cutter: Cutter

    @property
    def is_whole(self) -> bool:
        return all(isinstance(part, Blocks) for part in self.parts)

    def num_blocks(self) -> int:
        """How many blocks a pass over the text has."""
        return sum(len(part) for part in self._blocks("--epochs counts passes over the text", "give --max-steps"))

    def num_targets(self) -> int:
        return sum(part.num_targets() for part in self._blocks("it cannot be counted", "read it whole"))

    def describe(self) -> str:
        if not self.is_whole:
            return "a stream of text"
        return f"{self.num_targets():,} tokens of text"

    def draw(self, share: float, seed: int) -> TrainingText:
        """A random `share` of the blocks of each part, at least one, in their order."""
        if share == 1:
            return self
        drawn: list[Blocks | DocumentStream] = []
        for blocks in self._blocks("--data-share draws from the whole text", "stop it with --max-steps"):
            count = max(1, round(share * len(blocks)))
            drawn.append(blocks.select(permutation(len(blocks), f"{seed}/-1")[:count].sort().values))
        return replace(self, parts=drawn)

    def sample(self, tokens: int = 512) -> Tensor:
        """About that many ids of the text, `[B, S]`, of the teacher's tokenizer."""
        blocks = self.walk(0).take(0, max(1, tokens // self.cutter.seq_len))
        lengths = [len(block[-1].ids) for block in blocks]
        return torch.stack([block[-1].ids[: min(lengths)] for block in blocks])

    def walk(self, seed: int) -> Walk:
        """The order in which a student sees it."""
        names = [f"{seed}"] if len(self.parts) == 1 else [f"{seed}/{i}" for i in range(len(self.parts))]
        walks = [
            ShuffledWalk(part, name) if isinstance(part, Blocks) else StreamedWalk(self._portion(part), name)
            for part, name in zip(self.parts, names, strict=True)
        ]
        return walks[0] if len(walks) == 1 else MixedWalk(walks, self.shares)

    def _blocks(self, why: str, instead: str) -> list[Blocks]:
        whole = [part for part in self.parts if isinstance(part, Blocks)]
        if len(whole) < len(self.parts):
            raise UsageError(f"{why}, and a stream has no end that is known: {instead}")
        return whole

    def _portion(self, stream: DocumentStream):
        def portion(position: Any) -> tuple[Blocks, Any]:
            stream.seek(position)
            documents, characters = [], 0
            for document in stream:
                documents.append(document)
                characters += len(document)
                if characters >= PORTION_CHARACTERS:
                    return self.cutter(documents), stream.position()
            if not documents:
                if position is None:
                    raise UsageError("--data: the stream has no text to learn from")
                return portion(None)
            return self.cutter(documents), None

        return portion


def prepare(sources: Sequence[Source], cutter: Cutter) -> tuple[TrainingText, Blocks]:
    """What is trained on, and all sources' held-out text. Sources without weights are one text."""
    streams = [source.name for source in sources if isinstance(source.train, DocumentStream)]
    fingerprints = " ".join(source.fingerprint for source in sources)
    shares = [source.weight for source in sources if source.weight is not None]
    if not shares and not streams:
        documents = list(chain.from_iterable(source.train for source in sources))
        parts: list[Blocks | DocumentStream] = [cutter(documents, fingerprints)]
    elif len(shares) < len(sources) > 1:
        raise UsageError(
            f"--data mixes the stream {streams[0]} with other text: give each its share, as in "
            f"{streams[0]}=0.7,notes.txt=0.3"
        )
    else:
        parts = [s.train if isinstance(s.train, DocumentStream) else cutter(s.train, s.fingerprint) for s in sources]
    held_out = cutter(list(chain.from_iterable(s.held_out for s in sources)), f"held out of {fingerprints}")
    return TrainingText(parts, shares or [1.0], cutter), held_out
