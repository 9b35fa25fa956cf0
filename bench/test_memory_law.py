"""The memory law holds here too, of one small call; what is measured can be drawn."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from bench import memory_law
from bench.memory_law import MB, Point, law

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set is measured on Linux alone")
def test_a_call_holds_what_the_law_says_and_eager_several_times_that():
    point = Point(tokens=2048, vocab=16384, width=64, max_chunk_bytes=16 << 20)
    ours, eager = (
        memory_law.peak_memory(
            partial(memory_law.make, name, point), partial(memory_law.step, name, point.max_chunk_bytes)
        )
        for name in ("fastdistill", "eager")
    )
    assert 0.5 * law(point) < ours < law(point) + 20 * MB
    assert eager > 10 * ours


def test_the_kept_points_are_drawn(tmp_path):
    results = json.loads((ROOT / "docs" / "memory-law.json").read_text())["results"]
    memory_law.draw(results, tmp_path / "law.png")
    assert (tmp_path / "law.png").stat().st_size > 10_000
