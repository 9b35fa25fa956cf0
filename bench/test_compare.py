"""Of two results, a slower or hungrier kernel is named, and a slower machine is not."""

from __future__ import annotations

import copy
import json
import sys
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pytest

from bench import compare

ROOT = Path(__file__).resolve().parents[1]
KEPT = json.loads((ROOT / "bench" / "results" / "intel-r-xeon-r-processor-2026-11-24.json").read_text())
MANY, FEW = "test_layer_loss[small-mse-none-torch]", "test_linear_softmax_kl[torch]"
"""Names of benchmarks, of 15 and of 3 rounds."""


def slowed(by: float, *names: str) -> dict[str, Any]:
    """The kept result with the named benchmarks, or all, that many times slower."""
    result = copy.deepcopy(KEPT)
    for each in result["benchmarks"]:
        if not names or each["name"] in names:
            each["stats"] |= {key: by * each["stats"][key] for key in ("min", "q1", "median", "q3", "max")}
    return result


def of(result: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (each for each in result["benchmarks"] if each["name"] == name)
    return found


def run(monkeypatch, folder: Path, old: Any, new: Any, *options: str) -> int:
    for name, result in (("old.json", old), ("new.json", new)):
        (folder / name).write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["compare", str(folder / "old.json"), str(folder / "new.json"), *options])
    return compare.main()


def test_a_result_is_not_slower_than_itself(monkeypatch, tmp_path, capsys):
    assert run(monkeypatch, tmp_path, KEPT, KEPT) == 0
    assert capsys.readouterr().out.endswith(
        "Of 24: 24 within noise.\n\nNothing of ours is slower or hungrier beyond noise.\n"
    )


@pytest.mark.parametrize(("name", "says"), [(MANY, "layer_loss mse none, 6 x 2"), (FEW, "linear_softmax_kl, 4096 x")])
def test_a_slower_kernel_fails_and_is_named(monkeypatch, tmp_path, capsys, name, says):
    assert run(monkeypatch, tmp_path, KEPT, slowed(1.2, name)) == 1
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith(says)
    assert last.endswith("fastdistill is slower, 1.20 times as long, 1.20 times beside eager")


def test_a_faster_kernel_is_shown_and_passes():
    report, failures = compare.compare(KEPT, slowed(1 / 1.5, MANY))
    assert report.count("| faster |") == 1
    assert not failures


def test_a_threshold_can_be_given(monkeypatch, tmp_path):
    assert run(monkeypatch, tmp_path, KEPT, slowed(1.2, MANY), "--threshold", "1.3") == 0
    assert run(monkeypatch, tmp_path, KEPT, slowed(1.4, MANY), "--threshold", "1.3") == 1


def test_a_slower_round_among_many_is_noise():
    """Of 15 rounds quartiles count; of 3, all of them."""
    old, new = slowed(1), slowed(1.2, MANY, FEW)
    of(new, MANY)["stats"]["q1"] = of(old, MANY)["stats"]["q3"] / 1.01
    of(new, FEW)["stats"]["min"] = of(old, FEW)["stats"]["max"] / 1.01
    assert compare.compare(old, new)[1] == []
    of(old, MANY)["stats"]["max"] *= 9
    of(new, MANY)["stats"]["q1"] *= 1.1
    assert len(compare.compare(old, new)[1]) == 1


def paired(result: dict[str, Any], of_eager: float, *names: str, pace: tuple[float, ...] = (1,)) -> dict[str, Any]:
    """With a round of eager before each of fastdistill's; the named, or all, take that share of eager's time, in which
    the machine's pace goes round and round.
    """
    result = copy.deepcopy(result)
    for each in result["benchmarks"]:
        if not names or each["name"] in names:
            eager = [2.0 * step for _, step in zip(range(15), cycle(pace), strict=False)]
            each["extra_info"]["eager_seconds"] = eager
            ours = [of_eager * second for second in eager]
            each["stats"] |= {"rounds": 15, "data": ours, "median": median(ours), "min": min(ours), "max": max(ours)}
            each["stats"]["q1"], _, each["stats"]["q3"] = quantiles(ours, n=4)
    return result


def test_a_pace_that_eager_had_in_turn_hides_no_change():
    """Times over eager's of the same file, but measured apart, would: the machine takes up to three times as long."""
    old = paired(KEPT, 0.5, MANY, pace=(1, 2, 3))
    report, (failure,) = compare.compare(old, paired(KEPT, 0.6, MANY, pace=(3, 1, 2)))
    assert "1.20 times beside eager" in failure
    assert "| 0% |" in report
    assert compare.compare(old, paired(KEPT, 0.5, MANY, pace=(9, 8)))[1] == []
    report, failures = compare.compare(old, paired(KEPT, 0.6, MANY, pace=(0.1,)))
    assert "0.06 times as long, 1.20 times beside eager" in failures[0]


def test_a_hungrier_kernel_fails_and_is_named():
    new = slowed(1)
    of(new, FEW)["extra_info"]["peak_mb"] = 500.0
    assert compare.compare(KEPT, new)[1] == [
        "linear_softmax_kl, 4096 x 50257 x 768: fastdistill is hungrier, 468.4 to 500.0 MB"
    ]


@pytest.mark.parametrize(("name", "more"), [(MANY, 1.9), (FEW, 20.0)])
def test_a_little_more_memory_is_noise(name, more):
    """Less than 2 MB, or than 5 %."""
    new = slowed(1)
    of(new, name)["extra_info"]["peak_mb"] += more
    assert compare.compare(KEPT, new)[1] == []


def test_a_slower_machine_fails_nothing_and_hides_nothing():
    report, failures = compare.compare(KEPT, slowed(1.5))
    assert failures == []
    assert report.count("slower as eager is") >= 8
    both = slowed(1.5)
    of(both, MANY)["stats"] = of(slowed(1.5 * 1.3, MANY), MANY)["stats"]
    (failure,) = compare.compare(KEPT, both)[1]
    assert "1.95 times as long, 1.30 times beside eager" in failure


def test_without_eager_the_times_decide():
    old, new = ({**each, "benchmarks": [of(each, MANY)]} for each in (KEPT, slowed(1.5)))
    assert len(compare.compare(old, new)[1]) == 1


@pytest.mark.parametrize("name", ["eager", "Liger-Kernel", "torchtune, chunked"])
def test_what_is_not_ours_fails_nothing(name):
    old, new = slowed(1), slowed(1.5, MANY)
    for result in (old, new):
        of(result, MANY)["extra_info"]["implementation"] = name
        result["benchmarks"].remove(of(result, MANY.replace("torch", "eager")))
    report, failures = compare.compare(old, new)
    assert report.count("| slower |") == 1
    assert failures == []


def test_cases_of_one_file_alone_are_listed():
    new = slowed(1)
    new["benchmarks"].remove(of(new, FEW))
    of(new, MANY)["extra_info"]["shape"] = [7, 7]
    report, failures = compare.compare(KEPT, new)
    assert failures == []
    of_new, of_old = report.split("\n\nNot in the ")[1:]
    assert of_new.startswith("new file")
    assert "- linear_softmax_kl, 4096 x 50257 x 768: fastdistill" in of_new
    assert of_old.splitlines()[2:] == ["- layer_loss mse none, 7 x 7: fastdistill"]


@pytest.mark.parametrize(("what", "value"), [("cpu", "another"), ("gpu", "another"), ("threads", 1), ("torch", "2.14")])
def test_unlike_machines_are_refused(monkeypatch, tmp_path, capsys, what, value):
    new = slowed(1)
    new["machine_info"][what] = value
    assert run(monkeypatch, tmp_path, KEPT, new) == 2
    assert f"{what}: {KEPT['machine_info'][what]} and {value}" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path, KEPT, new, "--across-machines") == 0


def test_across_machines_the_ratio_to_eager_decides():
    """Of a machine twice as fast, on which one kernel takes as long as before."""
    new = slowed(0.5)
    new["machine_info"]["cpu"] = "another"
    of(new, MANY)["stats"] = of(KEPT, MANY)["stats"]
    (failure,) = compare.compare(KEPT, new, across=True)[1]
    assert "1.00 times as long, 2.00 times beside eager" in failure
    new["benchmarks"].remove(of(new, MANY.replace("torch", "eager")))
    report, failures = compare.compare(KEPT, new, across=True)
    assert "no eager" in report
    assert failures == []


def test_files_without_a_common_case_or_of_something_else_are_refused(monkeypatch, tmp_path, capsys):
    other = {**KEPT, "benchmarks": [of(KEPT, FEW)]}
    assert run(monkeypatch, tmp_path, other, {**KEPT, "benchmarks": [of(KEPT, MANY)]}) == 2
    assert "no case is in both files" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path, KEPT, {"results": []}) == 2
    assert "new.json is not a file of pytest-benchmark" in capsys.readouterr().err
