"""The numbers of an accumulation window: what divides its losses, and what they come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

Counts = dict[str, Tensor]
"""What divides the sums of one whole window, over all processes: by component the tokens that it counts, and as
"micro_batches" their number."""

Number = TypeVar("Number", Tensor, float)


class Losses(NamedTuple, Generic[Number]):
    """Of a window, or one micro-batch's share of it: the total; of each component what it is unweighted and what it
    adds to the total; and numbers that are to be seen and are in no loss. The total of a micro-batch is differentiable.
    """

    total: Number
    raw: dict[str, Number]
    weighted: dict[str, Number]
    diagnostics: dict[str, Number]

    def flat(self, share: float) -> dict[str, Number]:
        """All by name, to be added up over a window of which this micro-batch is `share`: what is a
        mean already is multiplied by it.
        """
        return {
            "total": self.total,
            **{f"raw {name}": value for name, value in self.raw.items()},
            **{f"weighted {name}": value for name, value in self.weighted.items()},
            **{f"also {name}": share * value for name, value in self.diagnostics.items()},
        }

    @classmethod
    def of(cls, flat: Mapping[str, Number]) -> Losses[Number]:
        """What has been added up, in order again."""

        def those(kind: str) -> dict[str, Number]:
            return {name.removeprefix(kind): value for name, value in flat.items() if name.startswith(kind)}

        return cls(flat["total"], those("raw "), those("weighted "), those("also "))
