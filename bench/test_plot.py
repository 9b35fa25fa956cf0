"""A result is read, chosen from, tabled and drawn, with columns and panels for what its file has."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from bench import plot, rows
from bench.table import table

RESULTS = Path(__file__).resolve().parent / "results"
KEPT = rows.read(RESULTS / "intel-r-xeon-r-processor-2026-11-24.json")


@pytest.fixture
def rich() -> dict[str, Any]:
    """One case in two passes, with rates, of three implementations of which eager is the slowest in one alone."""
    (like,) = (each for each in KEPT["benchmarks"] if each["name"] == "test_softmax_kl[jsd-eager]")
    benchmarks = []
    for pass_, times in (("forward", (3.0, 2.0, 1.0)), ("both", (3.0, 2.0, 4.0))):
        for name, time in zip(("eager", "Liger-Kernel", "fastdistill"), times, strict=True):
            each = copy.deepcopy(like)
            each["stats"] |= dict.fromkeys(("min", "q1", "median", "q3", "max"), time)
            each["extra_info"] |= {
                "implementation": name, "pass": pass_, "dtype": "torch.bfloat16", "valid": 0.9, "peak_mb": 100 * time,
                "tokens_per_s": 1024 / time, "gb_per_s": 10 / time, "roof": 20.0, "of_roof": 0.5 / time,
            }  # fmt: skip
            benchmarks.append(each)
    return {**KEPT, "benchmarks": benchmarks}


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *arguments: Any, **named: Any) -> None:
        figures.append(figure)
        save(figure, *arguments, **named)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_torch_is_fastdistill_where_nothing_else_has_that_name(rich):
    assert {row.implementation for row in rows.rows(KEPT)} == {"eager", "fastdistill"}
    rich["benchmarks"][0]["extra_info"]["implementation"] = "torch"
    assert rows.rows(rich)[0].implementation == "torch"


def test_rows_are_chosen_by_words_group_by_group(rich):
    found = rows.chosen(rows.rows(KEPT), "softmax_kl jsd; mse, layer_norm")
    assert [str(row.case) for row in found[::2]] == [
        "softmax_kl jsd, 1024 x 50257",
        "layer_loss mse layer_norm, 12 x 8 x 512 x 768",
        "layer_loss mse layer_norm, 6 x 2 x 512 x 768",
    ]
    assert len(rows.chosen(rows.rows(KEPT), "")) == len(KEPT["benchmarks"])
    assert [row.seconds.median for row in rows.chosen(rows.rows(rich), "both, bfloat16; eager")] == [3, 2, 4, 3]
    assert [row.seconds.median for row in rows.chosen(rows.rows(rich), "both -fastdistill")] == [3, 2]
    with pytest.raises(ValueError, match="no result has 'backward'"):
        rows.chosen(rows.rows(rich), "both; backward")


def test_a_time_is_over_that_of_eager_in_its_turn(rich):
    """Of few rounds all count, of many the quartiles; an eager that was measured apart adds its own spread."""
    ours = rich["benchmarks"][2]
    ours["stats"] |= {"rounds": 5, "data": [1.0, 2.0, 3.0, 8.0, 5.0], "median": 3.0}
    ours["extra_info"]["eager_seconds"] = [2.0, 2.0, 2.0, 4.0, 2.0]
    of_eager = rows.rows(rich)[2].of_eager
    assert of_eager is not None
    assert of_eager == (5, 0.5, 1.0, 1.5, 2.0, 2.5)
    assert of_eager.ends == (0.5, 2.5)
    assert of_eager._replace(rounds=8).ends == (1, 2)
    del ours["extra_info"]["eager_seconds"]
    rich["benchmarks"][0]["stats"] |= {"rounds": 4, "min": 1.0, "q1": 2.0, "q3": 4.0, "max": 8.0}
    ours["stats"] |= {"min": 1.0, "q1": 2.0, "q3": 4.0, "max": 8.0}
    assert rows.rows(rich)[2].of_eager == (4, 1 / 8, 2 / 4, 1.0, 4 / 2, 8 / 1)


def test_a_table_has_the_columns_that_the_file_has(rich):
    assert table(KEPT).splitlines()[2:5] == [
        "| operation | shape | implementation | ms, median | of eager | spread | peak MB above inputs |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        "| layer_loss mse none | 12 x 8 x 512 x 768 | eager | 56.9 | 1.00 | 0.98 to 1.02 | 164 |",
    ]
    head, rule, *_, last = table(rich).splitlines()[2:]
    heads = "operation; shape; pass; implementation; ms, median; of eager; spread; rate; of roof"
    assert head == f"| {heads.replace('; ', ' | ')} | peak MB above inputs |"
    assert rule.count("---:") == 6
    cells = "softmax_kl jsd, 1024 x 50257, both, fastdistill, "
    cells += "4000.0, 1.33, 1.33 to 1.33, 2.5 GB/s, 0.12, 400"
    assert last == f"| {cells.replace(', ', ' | ')} |"


def test_what_all_rows_have_in_common_is_said_once(rich):
    caption, _, head, *_ = table(rich, "both").splitlines()
    assert caption.endswith(", timer: perf_counter, dtype: bfloat16, valid: 0.9, pass: both")
    assert head.startswith("| operation | shape | implementation | ms, median |")
    caption, *_ = table(rich).splitlines()
    assert caption.endswith(", timer: perf_counter, dtype: bfloat16, valid: 0.9")


def test_a_table_needs_no_eager():
    without = [each for each in KEPT["benchmarks"] if each["extra_info"]["implementation"] != "eager"]
    assert "of eager" not in table({**KEPT, "benchmarks": without})


def test_every_operation_is_drawn_twice(monkeypatch, tmp_path, drawn):
    result = RESULTS / "intel-r-xeon-r-processor-2026-11-24.json"
    monkeypatch.setattr(sys, "argv", ["plot", str(result), "--into", str(tmp_path)])
    assert plot.main() == 0
    operations = ("layer_loss", "linear_softmax_kl", "softmax_kl")
    names = {f"{result.stem}-{name}.{suffix}" for name in operations for suffix in ("png", "svg")}
    assert {path.name for path in tmp_path.iterdir()} == names
    for path in tmp_path.iterdir():
        assert path.stat().st_size > 10_000
    assert "Intel(R) Xeon(R) Processor, CPU threads: 2" in drawn[0].get_suptitle()
    time, memory = drawn[0].axes
    assert (time.get_xlabel(), memory.get_xlabel()) == ("times eager's time, median and spread", "peak MB above inputs")


def test_points_quartiles_and_losses_are_in_the_figure(tmp_path, rich, drawn):
    path = tmp_path / "rich.svg"
    rich["benchmarks"][-1]["stats"] |= {"rounds": 15, "q1": 3.9, "q3": 5.1}
    rich["benchmarks"][-3]["stats"] |= {"rounds": 15}
    plot.draw(rows.rows(rich), "title", path, "of rich")
    assert b"of rich" in path.read_bytes()
    time, memory, roof = drawn[0].axes
    assert [label.get_text() for label in time.get_yticklabels()] == ["forward", "both"]
    assert time.get_title("left") == "softmax_kl, jsd, 1024 x 50257, bfloat16, 0.9 valid"
    points = [line for line in time.lines if line.get_marker() != "None"]
    blue = [line.get_xdata()[0] for line in points if line.get_color() == "tab:blue"]
    assert blue == [1 / 3, 4 / 3]
    assert [3.9 / 3, 5.1 / 3] in [list(line.get_xdata()) for line in time.lines]
    for panel in (time, memory):
        assert [(each.get_text(), each.get_color()) for each in panel.texts] == [
            ("0.50", "tab:blue"),
            ("2.00", "tab:red"),
        ]
    assert roof.get_xlabel() == "% of the roof"
    assert max(line.get_xdata()[0] for line in roof.lines) == 50
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["fastdistill", "eager", "Liger-Kernel"]


def test_another_form_of_ours_is_hollow_and_not_a_rival(tmp_path, rich, drawn):
    rich["benchmarks"][1]["extra_info"]["implementation"] = "fastdistill, PyTorch path"
    plot.draw(rows.rows(rich)[:3], "title", tmp_path / "forms.svg", "")
    time, *_ = drawn[0].axes
    assert [each.get_text() for each in time.texts] == ["0.33"]
    points = [line for line in time.lines if line.get_marker() != "None"]
    faces = {(line.get_xdata()[0], line.get_color(), line.get_markerfacecolor()) for line in points}
    assert {(1 / 3, "tab:blue", "tab:blue"), (2 / 3, "tab:blue", "white")} < faces


def test_without_eager_milliseconds_are_drawn(tmp_path, rich, drawn):
    without = [each for each in rich["benchmarks"] if each["extra_info"]["implementation"] != "eager"]
    plot.draw(rows.rows({**rich, "benchmarks": without}), "", tmp_path / "one.svg", "")
    time, *_ = drawn[0].axes
    assert time.get_xlabel() == "ms, median and spread"
    assert [1000] * 2 in [list(line.get_xdata()) for line in time.lines]


def test_scales_are_logarithmic_where_values_lie_far_apart(tmp_path, drawn):
    plot.draw(rows.chosen(rows.rows(KEPT), "linear_softmax_kl"), "", tmp_path / "one.svg", "")
    assert [panel.get_xscale() for panel in drawn[0].axes] == ["linear", "log"]
    assert drawn[0].axes[0].get_xlim()[0] == 0


def test_a_figure_is_the_same_each_time(tmp_path):
    paths = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in paths:
        plot.draw(rows.rows(KEPT), "title", path, "source")
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_is_not_a_result_is_refused(monkeypatch, tmp_path, capsys):
    (tmp_path / "other.json").write_text('{"results": []}')
    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "other.json"), "--into", str(tmp_path)])
    assert plot.main() == 2
    assert "other.json is not a file of pytest-benchmark" in capsys.readouterr().err
