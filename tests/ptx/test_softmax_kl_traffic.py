"""What softmax_kl's compiled kernels move: the bytes that their documentation counts, 16 at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import softmax_kl
from fastdistill.kernels import softmax_kl as kernels
from fastdistill.kernels.launch import WARPS, LaunchPlan
from fastdistill.testing import differentiate, random_logits, random_targets
from tests.ptx.driver import recorded
from tests.ptx.machine import Access, Statistics

ROWS, VOCAB = 8, 50257
LOGITS = ROWS * VOCAB * 2
"""Bytes of one model's logits in a half precision, whose elements nothing else has the size of."""


def launches(arguments: dict[str, Any]) -> dict[str, Statistics]:
    """Statistics of the launches of a forward and backward pass, by kernel."""
    with recorded() as made:
        differentiate(partial(softmax_kl, impl="triton"), arguments, ["student_logits"])
    return {launch.name: launch.statistics for launch in made}


def logits_moved(statistics: Statistics, instruction: str) -> int:
    """Bytes moved by elements and by vectors of them. What a row's 256 lanes read together, the target's, counts 256
    times.
    """
    return sum(statistics.bytes[Access(instruction, "global", width)] for width in (2, 16))


def in_vectors(statistics: Statistics, instruction: str) -> float:
    return statistics.bytes[Access(instruction, "global", 16)] / logits_moved(statistics, instruction)


@pytest.fixture(autouse=True)
def as_many_rows_are_launched(monkeypatch):
    """A program a row."""
    monkeypatch.setattr(kernels, "row_plan", lambda rows, row_bytes: LaunchPlan(WARPS, 1))


@pytest.fixture
def logits() -> dict[str, Tensor]:
    return random_logits(ROWS, VOCAB, dtype=torch.float16)


def test_one_read_for_the_statistics_then_one_read_and_one_write_for_the_gradient(logits):
    targets = random_targets(ROWS, vocab=VOCAB, ignored=0)
    for form in ({}, {"targets": targets, "ce_weight": 0.5}):
        made = launches(logits | form)
        assert made.keys() == {"_softmax_kl_stats_kernel", "_softmax_kl_grad_kernel"}
        stats, grad = made["_softmax_kl_stats_kernel"], made["_softmax_kl_grad_kernel"]
        assert 2 * LOGITS <= logits_moved(stats, "ld") < 2.01 * LOGITS
        # The target's element in both rows, 256 times over.
        assert 2 * LOGITS <= logits_moved(grad, "ld") < 2.03 * LOGITS
        assert LOGITS <= logits_moved(grad, "st") < 1.001 * LOGITS
        assert logits_moved(stats, "st") == 0
        assert in_vectors(stats, "ld") > 0.99
        assert in_vectors(grad, "ld") > 0.98
        assert in_vectors(grad, "st") > 0.999


def test_metrics_read_two_tiles_of_a_row_again(logits):
    stats = launches(logits | {"metrics": True})["_softmax_kl_stats_kernel"]
    assert 2 * LOGITS < logits_moved(stats, "ld") < 2.01 * LOGITS


def test_jsd_reads_the_rows_twice_for_its_statistics(logits):
    stats = launches(logits | {"divergence": "jsd"})["_softmax_kl_stats_kernel"]
    assert logits_moved(stats, "ld") == pytest.approx(4 * LOGITS, rel=0.001)


def test_rows_that_do_not_count_are_not_read(logits):
    mask = torch.arange(ROWS) < ROWS // 4
    made = launches(logits | {"mask": mask})
    for statistics in made.values():
        assert 0.5 * LOGITS <= logits_moved(statistics, "ld") < 0.51 * LOGITS
    assert LOGITS <= logits_moved(made["_softmax_kl_grad_kernel"], "st") < 1.001 * LOGITS


def test_padding_of_the_students_head_is_read_for_its_cross_entropy_alone(logits):
    logits["teacher_logits"] = logits["teacher_logits"][:, : VOCAB // 2]
    targets = random_targets(ROWS, vocab=VOCAB, ignored=0)
    without, with_ce = (
        logits_moved(launches(logits | form)["_softmax_kl_stats_kernel"], "ld") for form in ({}, {"targets": targets})
    )
    assert without == pytest.approx(LOGITS, rel=0.001)
    assert with_ce == pytest.approx(1.5 * LOGITS, rel=0.01)
