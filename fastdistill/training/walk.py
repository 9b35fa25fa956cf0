"""The order in which blocks of text are seen: shuffled epochs, a mixture of several texts, a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdistill.training.blocks import Block, Blocks

GOLDEN = (5**0.5 - 1) / 2


class Walk(Protocol):
    """An endless walk over blocks."""

    def take(self, start: int, count: int) -> list[Block]:
        """Samples `start .. start + count` of the walk."""
        ...

    def state(self) -> Any:
        """What `seek` needs to go on quickly from where `take` was last, as JSON."""
        ...

    def seek(self, state: Any) -> None: ...


class ShuffledWalk:
    """Epochs over blocks in memory, each a permutation made from the seed and the epoch.

    Each sample is a pure function of its number, so a resumed run has nothing to restore, and the split into
    micro-batches changes nothing.
    """

    def __init__(self, blocks: Blocks, seed: str):
        self.blocks, self.seed = blocks, seed

    def take(self, start: int, count: int) -> list[Block]:
        return [self.blocks[i] for i in self.order(start, count).tolist()]

    def order(self, start: int, count: int) -> Tensor:
        """Which blocks those samples are, int64 `[count]`."""
        parts = []
        while count > 0 or not parts:
            epoch, offset = divmod(start, len(self.blocks))
            part = permutation(len(self.blocks), f"{self.seed}/{epoch}")[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return torch.cat(parts)

    def state(self) -> None:
        return None

    def seek(self, state: None) -> None:
        pass


class StreamedWalk:
    """A text too long to hold, read in order and shuffled among some thousand blocks at a time.

    `portion(position)` gives the blocks that begin at `position` of the text and the position after them; None is the
    beginning. The samples of a portion are a pure function of its position and number, so a resumed run only
    has to find that place again.
    """

    def __init__(self, portion: Callable[[Any], tuple[Blocks, Any]], seed: str):
        self.portion, self.seed = portion, seed
        self.seek({"first": 0, "number": 0, "position": None})

    def take(self, start: int, count: int) -> list[Block]:
        if start < self.first:
            self.seek({"first": 0, "number": 0, "position": None})
        taken = []
        while len(taken) < count:
            if self.blocks is None:
                self.blocks, self.following = self.portion(self.position)
                self.order = permutation(len(self.blocks), f"{self.seed}/{self.number}").tolist()
            offset = start + len(taken) - self.first
            taken += [self.blocks[i] for i in self.order[offset : offset + count - len(taken)]]
            if len(taken) < count:
                first = self.first + len(self.blocks)
                self.seek({"first": first, "number": self.number + 1, "position": self.following})
        return taken

    def state(self) -> dict[str, Any]:
        return {"first": self.first, "number": self.number, "position": self.position}

    def seek(self, state: dict[str, Any]) -> None:
        self.first, self.number, self.position = state["first"], state["number"], state["position"]
        self.blocks: Blocks | None = None


class MixedWalk:
    """Several walks, each giving its share of the samples; spread evenly, not by chance."""

    def __init__(self, walks: Sequence[Walk], shares: Sequence[float]):
        self.walks, self.limits = walks, torch.tensor(shares, dtype=torch.float64).cumsum(0) / sum(shares)
        self.counted, self.counts = 0, torch.zeros(len(walks), dtype=torch.int64)

    def take(self, start: int, count: int) -> list[Block]:
        if start < self.counted:
            self.counted, self.counts = 0, torch.zeros_like(self.counts)
        self.counts = self.counts + self.choose(self.counted, start).bincount(minlength=len(self.walks))
        self.counted = start
        chosen = self.choose(start, start + count)
        asked = chosen.bincount(minlength=len(self.walks)).tolist()
        each = zip(self.walks, self.counts.tolist(), asked, strict=True)
        taken = [iter(walk.take(before, number)) for walk, before, number in each]
        return [next(taken[number]) for number in chosen.tolist()]

    def choose(self, start: int, stop: int) -> Tensor:
        """Which walk each of the samples `start .. stop` comes from, int64.

        Multiples of the golden ratio fill [0, 1) evenly, however many there are.
        """
        points = (torch.arange(start + 1, stop + 1, dtype=torch.float64) * GOLDEN) % 1
        return torch.searchsorted(self.limits[:-1], points, right=True)

    def state(self) -> list[Any]:
        return [walk.state() for walk in self.walks]

    def seek(self, state: list[Any]) -> None:
        for walk, own in zip(self.walks, state, strict=True):
            walk.seek(own)


@lru_cache(maxsize=8)
def permutation(size: int, seed: str) -> Tensor:
    """A permutation of `size` numbers that the seed determines."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randperm(size, generator=generator)
