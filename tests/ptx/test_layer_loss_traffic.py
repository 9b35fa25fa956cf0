"""What layer_loss's compiled kernels move: the bytes that their documentation counts, 16 at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from fastdistill import layer_loss
from fastdistill.backend import obstacle_to_triton
from fastdistill.kernels.layer_loss import SAVED
from fastdistill.testing import differentiate, random_states
from tests.ptx.driver import recorded
from tests.ptx.machine import Access, Statistics

LAYERS, TOKENS, WIDTH = 3, 16, 1024
STATES = LAYERS * TOKENS * WIDTH * 2
"""Bytes of one model's states in a half precision, whose elements nothing else has the size of."""
each_form = pytest.mark.parametrize("form", SAVED)


def launches(form: str, width: int = WIDTH, **keywords: Any) -> dict[str, Statistics]:
    """Statistics of the launches of a forward and backward pass, by kernel."""
    how = {"metric": "cosine"} if form == "cosine" else {"normalize": form}
    arguments = random_states(TOKENS, width, layers=LAYERS, dtype=torch.float16) | how | keywords
    assert obstacle_to_triton("cpu", None, "layer_loss") is None  # or its trial would be recorded too
    with recorded() as made:
        differentiate(partial(layer_loss, impl="triton"), arguments, ["student_states"])
    assert len(made) == 3
    return {launch.name.removeprefix("_layer_loss_"): launch.statistics for launch in made}


def moved(statistics: Statistics, instruction: str, *widths: int) -> int:
    """Bytes moved by accesses of these widths, in bytes."""
    return sum(statistics.bytes[Access(instruction, "global", width)] for width in widths)


@each_form
def test_states_are_read_once_for_the_statistics_and_once_for_the_gradient_which_is_written_once(form):
    made = launches(form)
    assert moved(made["stats_kernel"], "ld", 16) == 2 * STATES
    assert moved(made["grad_kernel"], "ld", 16) == 2 * STATES
    assert moved(made["grad_kernel"], "st", 16) == STATES
    assert sum(moved(statistics, move, 2) for statistics in made.values() for move in ("ld", "st")) == 0
    assert moved(made["mean_kernel"], "ld", 16) == 0


@each_form
def test_tokens_that_do_not_count_are_not_read(form):
    made = launches(form, mask=torch.arange(TOKENS) < TOKENS // 4)
    assert moved(made["stats_kernel"], "ld", 16) == STATES // 2
    assert moved(made["grad_kernel"], "ld", 16) == STATES // 2
    assert moved(made["grad_kernel"], "st", 16) == STATES


def test_a_layer_of_weight_0_is_not_read_for_its_gradient():
    made = launches("layer_norm", layer_weights=[1, 0, 1])
    assert moved(made["grad_kernel"], "ld", 16) == 2 * STATES * 2 // 3
    assert moved(made["grad_kernel"], "st", 16) == STATES


@pytest.mark.parametrize(("form", "reads"), [("none", 1), ("layer_norm", 2)])
def test_wider_than_a_tile_is_read_twice_for_the_statistics_of_layer_norm(form, reads):
    made = launches(form, width=16 * WIDTH)
    assert moved(made["stats_kernel"], "ld", 16) == reads * 16 * 2 * STATES
    assert moved(made["grad_kernel"], "ld", 16) == 16 * 2 * STATES
