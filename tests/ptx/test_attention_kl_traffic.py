"""What attention_kl's compiled kernels move: vectors, and a few numbers a query, but nothing of the size of a map."""

from __future__ import annotations

from functools import partial

import torch

from fastdistill import attention_kl
from fastdistill.backend import obstacle_to_triton
from fastdistill.testing import differentiate, random_attention
from tests.ptx.driver import recorded
from tests.ptx.machine import Access, Statistics

H, D = 2, 64
FLOAT32 = 4


def launches(positions: int, counted: int | None = None) -> dict[str, Statistics]:
    """Statistics of the launches of a forward and backward pass over one row, by kernel."""
    mask = torch.arange(positions)[None] < (positions if counted is None else counted)
    arguments = random_attention(1, H, positions, D) | {"mask": mask}
    assert obstacle_to_triton("cpu", None, "attention_kl") is None  # or its trial would be recorded too
    with recorded() as made:
        differentiate(partial(attention_kl, impl="triton"), arguments, ["student_q", "student_k"])
    assert len(made) == 3
    return {launch.name.removeprefix("_attention_kl_"): launch.statistics for launch in made}


def moved(statistics: Statistics, instruction: str) -> int:
    """Bytes moved to or from global memory."""
    sizes = statistics.bytes.items()
    return sum(size for access, size in sizes if (access.instruction, access.space) == (instruction, "global"))


def test_what_is_written_is_5_numbers_a_query_and_the_gradients():
    for positions in (32, 64):
        made = launches(positions)
        assert moved(made["stats_kernel"], "st") == 5 * H * positions * FLOAT32
        assert moved(made["query_grad_kernel"], "st") == H * positions * D * FLOAT32
        assert moved(made["key_grad_kernel"], "st") == H * positions * D * FLOAT32


def test_vectors_are_read_16_bytes_at_a_time():
    """The rest is weights and statistics, of which a program of 16 queries has many of each."""
    for statistics in launches(32).values():
        vectors = statistics.bytes[Access("ld", "global", 16)]
        assert vectors % (16 * D * FLOAT32) == 0
        assert vectors >= 4 * H * 32 * D * FLOAT32
        assert statistics.bytes[Access("ld", "global", 8)] == 0


def test_vectors_that_do_not_count_are_not_read():
    half, whole = launches(64, counted=32), launches(32)
    for name in half:
        assert half[name].bytes[Access("ld", "global", 16)] == whole[name].bytes[Access("ld", "global", 16)]
