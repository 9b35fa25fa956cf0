"""What is measured is one loss; the page on attention shows what is kept, in which memory grows with the length."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from bench import attention
from bench.attention import COMPILED, IMPLEMENTATIONS, MAPS, OURS, Case
from fastdistill import reference
from fastdistill.attention_torch import CHUNK_BYTES, GPU_CHUNK_BYTES, MIN_QUERIES
from fastdistill.testing import random_normal

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "attention.md").read_text(encoding="utf-8")
RESULTS = json.loads((ROOT / "docs" / "attention.json").read_text(encoding="utf-8"))
TINY = Case(2, 4, 2, 9, 8)

on_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the resident set is measured on Linux alone"
)


def times_as_much_for_twice_the_length(implementation: str) -> float:
    (_, half), (_, whole) = attention.last_doubling(attention.by_case(RESULTS), implementation)
    return whole / half


def test_the_tables_are_those_of_the_kept_numbers_in_their_order():
    places = [PAGE.find(part) for part in attention.table(RESULTS).split("\n\n")]
    assert -1 not in places
    assert places == sorted(places)


def test_figures_in_the_prose_are_kept_or_the_code_s():
    """Those of the page without what was compared above, code and formulas."""
    rest = PAGE
    for part in attention.table(RESULTS).split("\n\n"):
        rest = rest.replace(part, "")
    rest = re.sub(r"(?s)```.*?```|`[^`]*`|^    .*?$|\]\([^)]*\)", "", rest, flags=re.MULTILINE)
    figures = re.findall(r"\d[\d,]*[.,]\d+", rest)
    assert len(figures) >= 2
    cells = re.findall(r"\d[\d,]*[.,]\d+", attention.table(RESULTS))
    assert [figure for figure in figures if figure not in cells] == []
    assert re.findall(r"(\d+) MiB", rest) == [str(size >> 20) for size in (CHUNK_BYTES, GPU_CHUNK_BYTES)]
    assert re.findall(r"(\d+) queries", rest) == [str(MIN_QUERIES)]


def test_every_case_was_measured_with_all_that_fits():
    cases = attention.by_case(RESULTS)
    assert list(cases) == attention.LONG + attention.SHORT
    for case, measured in cases.items():
        assert list(measured) == [name for name in IMPLEMENTATIONS if case.positions <= attention.UP_TO[name]]
        assert {len(each["ms"]) for each in measured.values()} == {attention.rounds(case)}


def test_kept_memory_grows_with_the_length_and_that_of_maps_with_its_square():
    assert times_as_much_for_twice_the_length(OURS) < 2.3
    assert times_as_much_for_twice_the_length(MAPS) > 3.5
    assert times_as_much_for_twice_the_length(COMPILED) > 3.5


@on_linux
def test_memory_grows_so_here_too():
    """Of lengths at which a block does not hold all queries; at the longer one, less than one map."""
    half, whole = (attention.peak(OURS, Case(1, 9, 3, positions)) for positions in (1024, 2048))
    assert whole < 2.3 * half
    assert whole < 4 * 9 * 2048**2


def test_what_is_measured_is_one_loss():
    inputs = attention.inputs_of(TINY)
    expected = attention.step(MAPS, inputs)
    assert [each.shape for each in expected] == [(2, 4, 9, 8), (2, 2, 9, 8)]
    for name in (COMPILED, OURS):
        torch.testing.assert_close(attention.step(name, inputs), expected, rtol=1e-4, atol=1e-7)


@on_linux
def test_a_measure_has_a_time_a_round_and_a_peak():
    ms = attention.times((MAPS, OURS), TINY, 3)
    assert list(ms) == [MAPS, OURS]
    assert all(len(each) == 3 and min(each) > 0 for each in ms.values())
    assert 0 <= attention.peak(OURS, TINY) < 40e6


def test_a_verdict_needs_the_quartiles_on_one_side():
    def beside(*ours: float) -> str:
        return attention.verdict({MAPS: {"ms": [2.0] * 5}, OURS: {"ms": ours}})

    assert attention.quartiles([1, 4, 2, 3, 5], [1] * 5) == (2, 3, 4)
    assert beside(9, 9, 9, 9, 1) == "slower than maps"
    assert beside(1, 1, 1, 1, 9) == "faster than maps"
    assert beside(1, 1, 1, 9, 9) == "even with maps"


def test_the_kept_numbers_are_drawn(tmp_path):
    attention.draw(RESULTS, tmp_path / "attention.png")
    assert (tmp_path / "attention.png").stat().st_size > 10_000


def test_the_relations_of_the_page_are_those_of_values():
    """Of 2 and 6 heads of values, split into 4 anew, by the definition in float64."""
    (code,) = re.findall(r"(?s)```python\n(.*?)```", PAGE)
    values = {"student": random_normal(2, 2, 7, 8, device="cpu"), "teacher": random_normal(2, 6, 7, 8, device="cpu")}
    names = {f"{model}_values": each.double() for model, each in values.items()}
    exec(code, names)
    maps = []
    for model in values:
        beside = torch.cat([head for head in names[f"{model}_values"].unbind(1)], -1)
        width = beside.shape[-1] // 4
        vectors = torch.stack(beside.split(width, -1), 1)
        scores = vectors @ vectors.mT / width**0.5
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        maps.append(scores.log_softmax(-1).clamp(min=-1e30))
    torch.testing.assert_close(names["loss"], reference.map_kl(*maps).mean())
