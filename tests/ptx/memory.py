"""Where the bytes lie: global memory, which is the storages of tensors, and the shared memory of blocks."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

WIDEST = 16
"""Bytes of the widest access."""
WORDS = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8"), 16: np.dtype("c16")}
"""What NumPy moves as one number, by bytes; it copies a complex number's bits as they are."""


class BadAddress(Exception):
    def __init__(self, position: int, reason: str) -> None:
        super().__init__(reason)
        self.position = position
        """Of the address among those asked for."""


class Place(NamedTuple):
    """Where some of the addresses lie."""

    buffer: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    """In bytes, into the buffer."""
    which: NDArray[np.intp] | slice
    """Positions of these addresses among those asked for."""


class Space(Protocol):
    def find(
        self, addresses: NDArray[np.int64], lanes: NDArray[np.intp] | None, size: int, writing: bool
    ) -> list[Place]:
        """Where accesses of `size` bytes by `lanes` (None: by all, in order) lie.

        Raises:
            BadAddress: for one that is not aligned to its size, not wholly inside, or read and never written.
        """
        ...


def _check(bad: NDArray[np.bool_] | np.bool_, reason: str) -> None:
    if bad.any():
        raise BadAddress(int(bad.argmax()), reason)


class GlobalMemory:
    """The storages of tensors, and nothing between them."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        storages = {each.data_ptr(): each.nbytes() for each in (tensor.untyped_storage() for tensor in tensors)}
        self.starts = np.array(sorted(storages), np.int64)
        self.ends = np.array([start + storages[start] for start in self.starts], np.int64)
        # Widened to whole words, so that every aligned access inside a storage is an element of the buffer.
        self.origins = self.starts & -WIDEST
        self.buffers = [
            np.ctypeslib.as_array((ctypes.c_uint8 * (-(-(end - origin) // WIDEST) * WIDEST)).from_address(origin))
            for origin, end in zip(self.origins.tolist(), self.ends.tolist(), strict=True)
        ]

    def find(
        self, addresses: NDArray[np.int64], lanes: NDArray[np.intp] | None, size: int, writing: bool
    ) -> list[Place]:
        _check(addresses & (size - 1) != 0, "misaligned")
        storage = bisect_right(self.starts, addresses.min()) - 1
        if storage >= 0 and int(addresses.max()) + size <= self.ends[storage]:
            return [Place(self.buffers[storage], addresses - self.origins[storage], slice(None))]
        storages = np.searchsorted(self.starts, addresses, "right") - 1
        if not len(self.starts):
            raise BadAddress(0, "out-of-bounds")
        _check((storages < 0) | (addresses > self.ends[storages] - size), "out-of-bounds")
        places = []
        for storage in np.unique(storages):
            which = np.flatnonzero(storages == storage)
            places.append(Place(self.buffers[storage], addresses[which] - self.origins[storage], which))
        return places


class SharedMemory:
    """`size` bytes for each of some blocks; addresses begin at 0 in each."""

    def __init__(self, size: int, blocks: int, threads: int) -> None:
        self.size = size
        self.stride = -(-size // WIDEST) * WIDEST
        self.starts = np.repeat(np.arange(blocks) * self.stride, threads)  # of each lane's block
        self.bytes = np.zeros(blocks * self.stride, np.uint8)
        self.written = np.zeros(blocks * self.stride, np.bool_)

    def find(
        self, addresses: NDArray[np.int64], lanes: NDArray[np.intp] | None, size: int, writing: bool
    ) -> list[Place]:
        _check(addresses & (size - 1) != 0, "misaligned")
        _check((addresses < 0) | (addresses > self.size - size), "out-of-bounds")
        offsets = addresses + (self.starts if lanes is None else self.starts[lanes])
        written = self.written.reshape(-1, size)
        if writing:
            written[offsets // size] = True
        else:
            _check(~written[offsets // size].all(axis=1), "never written:")
        return [Place(self.bytes, offsets, slice(None))]
