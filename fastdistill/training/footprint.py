"""What a model takes, and how fast it is: weights, memory of a forward pass, tokens a second read and written."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from fastdistill.training.memory import most_allocated
from fastdistill.training.models import context_length, evaluating, parts

RUNS, ENOUGH_SECONDS = 5, 5.0
"""Timed runs after one that is not; fewer once they have taken so long."""
WRITTEN = 32
"""Tokens that are written to be timed, where the model's context has room for as many before them."""


@dataclass(frozen=True)
class Footprint:
    """`weight_bytes` as the weights are loaded. `read_per_second` is of a forward pass over rows of text, up to the
    prediction after each row; `written_per_second` of greedy writing in one row, with a cache of keys and values.
    `peak_bytes` is the most that such a pass allocates at once, beside the weights.
    """

    parameters: int
    weight_bytes: int
    read_per_second: float
    written_per_second: float
    peak_bytes: int


@torch.no_grad()
def footprint(model: PreTrainedModel, rows: int, positions: int) -> Footprint:
    """Measured now, on rows of so many positions, on the model's device."""
    base, head = parts(model).base, parts(model).head
    vocab = model.config.get_text_config().vocab_size
    ids = torch.randint(vocab, (rows, positions), generator=torch.Generator().manual_seed(0)).to(model.device)
    prompt = ids[:1, : min(WRITTEN, context_length(model) // 2)]
    generating: Any = model

    def read() -> None:
        head(base(input_ids=ids, use_cache=False).last_hidden_state[:, -1])

    def write(tokens: int) -> None:
        generating.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=tokens,
            max_new_tokens=tokens, pad_token_id=0,
        )  # fmt: skip

    with evaluating(model):
        peak = most_allocated(read, model.device)
        read_seconds = _seconds(read, model.device)
        written = prompt.shape[1] - 1  # the first token written comes with the reading of the prompt
        first, all_of_them = (_seconds(lambda n=n: write(n), model.device) for n in (1, 1 + written))
    return Footprint(
        parameters=model.num_parameters(),
        weight_bytes=sum(p.nbytes for p in model.parameters()),
        read_per_second=ids.numel() / read_seconds,
        written_per_second=written / max(all_of_them - first, 1e-9),
        peak_bytes=peak,
    )


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Median time of `run()`, from when the device is idle to when it has done all of it."""

    def timed() -> float:
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        return time.perf_counter() - began

    timed()
    times = [timed()]
    while len(times) < RUNS and sum(times) < ENOUGH_SECONDS:
        times.append(timed())
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
