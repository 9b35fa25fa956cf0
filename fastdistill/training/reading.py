"""Numbers on their way from the device to the host, read when they have come."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """Scalars by name. Their copy is queued behind the work that makes them, so that the host can go on; `values`
    waits for that copy alone.
    """

    def __init__(self, numbers: dict[str, Tensor]):
        self._names = list(numbers)
        stacked = torch.stack([value.detach().double() for value in numbers.values()])
        self._copied = stacked.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event() if stacked.is_cuda else None
        if self._arrived:
            self._arrived.record()

    def values(self) -> dict[str, float]:
        if self._arrived:
            self._arrived.synchronize()
        return dict(zip(self._names, self._copied.tolist(), strict=True))
