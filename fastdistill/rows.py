"""The tokens of a batch as a flat list of rows, for the PyTorch paths to walk over in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenRows:
    """`n` tokens, each the place `[sequence, position]` in the `[B, S, ...]` inputs; tensors `[n]`.

    Rows are addressed by number, so inputs of unequal length or odd strides are never cut or flattened by a copy.
    """

    sequence: Tensor
    position: Tensor
    weights: Tensor
    targets: Tensor | None
    positions: int
    """S of the grid that they are taken from."""
    all_counted: bool
    """False where a row may have weight 0: its values and gradient must then be set to 0."""

    def __len__(self) -> int:
        return len(self.weights)

    def chunks(self, size: int) -> Iterator[TokenRows]:
        """The rows in order, `size` at a time; one chunk of nothing where there are none."""
        return self.split(size for _ in range(0, max(1, len(self)), size))

    def split(self, sizes: Iterable[int]) -> Iterator[TokenRows]:
        """The rows in order, so many at a time."""
        start = 0
        for size in sizes:
            part = slice(start, start := start + size)
            yield TokenRows(
                self.sequence[part],
                self.position[part],
                self.weights[part],
                None if self.targets is None else self.targets[part],
                self.positions,
                self.all_counted,
            )

    def runs(self) -> list[int]:
        """How many rows follow one another before one is left out, from the first on; on the CPU, as it reads."""
        flat = self.sequence * self.positions + self.position
        ends = 1 + (flat[1:] != flat[:-1] + 1).nonzero()[:, 0]
        return ends.diff(prepend=ends.new_zeros(1), append=ends.new_full((1,), len(flat))).tolist()

    def take(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of `tensor` `[B, S, X]` or `[N, X]` as a new `[n, X]`."""
        flat, positions = flattened(tensor), tensor.shape[-2]
        if flat is None:
            return tensor[self.sequence, self.position].to(dtype)
        if (span := self.span(positions)) is not None:
            return flat[span].to(dtype, copy=True)
        return flat.index_select(0, self.sequence * positions + self.position).to(dtype)

    def view(self, tensor: Tensor) -> Tensor | None:
        """The rows of `tensor` `[B, S, X]` or `[N, X]` where they are, if they lie one after another; else, and on a
        GPU, None.
        """
        flat, span = flattened(tensor), self.span(tensor.shape[-2])
        return None if flat is None or span is None else flat[span]

    def span(self, positions: int) -> slice | None:
        """Where the rows are in `[B * positions, X]`, if they lie one after another; else, and on a GPU, None.

        There it would have to be waited for to know.
        """
        if self.weights.device.type != "cpu" or len(self) == 0:
            return None
        places = torch.stack([self.sequence[[0, -1]], self.position[[0, -1]]], 1).tolist()
        first, last = (sequence * positions + position for sequence, position in places)
        return slice(first, last + 1) if last - first == len(self) - 1 else None

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Write `values` `[n, ...]` into the rows of `tensor` `[B, S, ...]` or `[N, ...]`."""
        grid, values = _as_sequences(tensor, values.ndim + 1), values.to(tensor.dtype)
        if grid.is_contiguous() and (span := self.span(grid.shape[1])) is not None:
            grid.flatten(0, 1)[span] = values
        else:
            grid[self.sequence, self.position] = values

    def spread(self, values: Tensor, leading: tuple[int, ...]) -> Tensor:
        """`values` `[n]` at their places in zeros of shape `leading`; differentiable."""
        places = (self.sequence, self.position) if len(leading) == 2 else (self.position,)
        return values.new_zeros(leading).index_put(places, values)

    def zero_uncounted_(self, values: Tensor) -> Tensor:
        """`values` `[n, ...]` with 0 (never NaN) in rows that do not count."""
        if self.all_counted:
            return values
        return values.masked_fill_((self.weights == 0).view(-1, *(1,) * (values.ndim - 1)), 0)


def token_rows(weights: Tensor, targets: Tensor | None, *, drop_uncounted: bool) -> TokenRows:
    """Rows of the tokens in `weights` and `targets`, `[B, S]` or `[N]`.

    `drop_uncounted` leaves out rows of weight 0, whose number must be read from the device; without it all stay.
    """
    grid = _as_sequences(weights, 2)
    if drop_uncounted:
        sequence, position = grid.nonzero(as_tuple=True)
    else:
        sequence = torch.arange(grid.shape[0], device=grid.device).repeat_interleave(grid.shape[1])
        position = torch.arange(grid.shape[1], device=grid.device).repeat(grid.shape[0])
    return TokenRows(
        sequence,
        position,
        grid[sequence, position],
        None if targets is None else _as_sequences(targets, 2)[sequence, position],
        positions=grid.shape[1],
        all_counted=drop_uncounted,
    )


def flattened(tensor: Tensor) -> Tensor | None:
    """`[B, S, X]` or `[N, X]` as a view `[rows, X]`, if there is one."""
    if tensor.ndim == 2:
        return tensor
    return tensor.flatten(0, 1) if tensor.stride(0) == tensor.shape[1] * tensor.stride(1) else None


def _as_sequences(tensor: Tensor, ndim: int = 3) -> Tensor:
    """A tensor without a batch dimension as a batch of one."""
    return tensor if tensor.ndim == ndim else tensor.unsqueeze(0)
