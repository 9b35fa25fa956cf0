"""The report of a run, made from files that are written here by hand."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.figure import Figure
from PIL import Image

import fastdistill.__main__
from fastdistill.training import plots, report, report_parts, run_files, whole
from fastdistill.training.config import Config
from fastdistill.training.evaluate import Evaluation
from fastdistill.training.report_markdown import table
from fastdistill.training.report_parts import Table
from fastdistill.training.results import Row
from fastdistill.training.run_files import RunError

TEACHER = Evaluation(loss=math.log(20), tokens=1000, kl=0.0, top1_agreement=1.0, compared=1000)
VERSIONS = {"fastdistill": "0.0.7", "torch": "2.9", "transformers": "5.1", "python": "3.12"}
FILES = {"report.md", "report.html", "results.json", "curves.png", "shares.png", "optimizer.png", "speed.png"}

Records = list[dict[str, Any]]


def evaluation(step: int, perplexity: float, **more: Any) -> dict[str, Any]:
    return {"event": "eval", "step": step, "loss": math.log(perplexity), "tokens": 1000, "kl": 0.5, **more}


def trained(step: int, kd: float = 1.0, **more: Any) -> dict[str, Any]:
    parts = {"kd": kd, "lm": 3.0}
    components = {
        name: {"raw": 2 * value, "weight": 0.5, "weighted": value, "share": value / sum(parts.values())}
        for name, value in parts.items()
    }
    record = {"total": kd + 3.0, "components": components, "learning_rate": 1e-3, "gradient_norm": 0.7}
    return {"event": "train", "step": step, **record, "tokens_per_second": 100.0 * step, **more}


def warning(step: int, message: str) -> dict[str, Any]:
    return {"event": "warning", "step": step, "message": message}


BASELINE = [evaluation(0, 60), trained(10), evaluation(10, 45), trained(20), evaluation(20, 50)]
DISTILLED = [evaluation(0, 60), trained(10), evaluation(10, 30), trained(20, kd=0.5), evaluation(20, 30)]


@pytest.fixture
def a_run(tmp_path) -> Callable[..., Path]:
    """Write a run folder: of 20 steps, seed 0, a baseline and a distilled student, unless told otherwise."""

    def make(stages: dict[str, Records] | None = None, teacher: Evaluation = TEACHER, **settings: Any) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        config = dataclasses.asdict(Config(**{"max_steps": 20, "baseline": True} | settings))
        (folder / "config.json").write_text(json.dumps(config))
        content = {
            "evaluation": dataclasses.asdict(teacher),
            "versions": VERSIONS,
            "device": "cpu",
            "precision": "fp32",
        }
        (folder / "teacher.json").write_text(json.dumps(content))
        stages = {"seed-0/ce-only": BASELINE, "seed-0/distilled": DISTILLED} if stages is None else stages
        for name, records in stages.items():
            (folder / name).mkdir(parents=True)
            text = "".join(json.dumps(record) + "\n" for record in records)
            (folder / name / "log.jsonl").write_text(text)
        return folder

    return make


@pytest.fixture
def drawn(a_run) -> Callable[..., tuple[str, str, dict[str, Any]]]:
    """Write a run folder and its report; returns Markdown, HTML and results."""

    def make(*arguments: Any, **settings: Any) -> tuple[str, str, dict[str, Any]]:
        folder = a_run(*arguments, **settings)
        report.write(folder)
        results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
        return (folder / "report.md").read_text(), (folder / "report.html").read_text(), results

    return make


@pytest.fixture
def blank_images(monkeypatch) -> None:
    """Spare the second that drawing takes."""
    monkeypatch.setattr(plots, "png", lambda plot, footer: b"png")
    monkeypatch.setattr(plots, "svg", lambda panel: b"svg")


@pytest.fixture
def reported(blank_images, drawn) -> Callable[..., tuple[str, str, dict[str, Any]]]:
    """The same without its images."""
    return drawn


def lines_of(page: str, start: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith(start)]


def cells(html: str) -> list[list[str]]:
    """The rows of all tables of a page, heads included."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]


def test_rows_are_read_off_the_logs_by_seed_and_the_baseline_first(a_run):
    later = [evaluation(0, 60), evaluation(10, 25), evaluation(20, 40)]
    stages = {"seed-10/distilled": later, "seed-9/distilled": DISTILLED, "seed-9/ce-only": BASELINE}
    rows = report.rows(a_run(stages, seed=9, seeds=2))
    assert [(row.name, row.seed, row.step, round(math.exp(row.evaluation.loss))) for row in rows] == [
        ("teacher", None, None, 20),
        ("untrained student", None, None, 60),
        ("ce-only, best checkpoint", 9, 10, 45),
        ("ce-only, last", 9, 20, 50),
        ("distilled, best checkpoint", 9, 10, 30),  # the earlier of equals
        ("distilled, last", 9, 20, 30),
        ("distilled, best checkpoint", 10, 10, 25),
        ("distilled, last", 10, 20, 40),
    ]
    assert rows[2].evaluation == Evaluation(math.log(45), 1000, kl=0.5)


def test_the_demo_teachers_own_stage_is_no_row(a_run):
    rows = report.rows(a_run({"teacher": BASELINE, "seed-0/distilled": DISTILLED}, baseline=False))
    assert [row.name for row in rows[2:]] == ["distilled, best checkpoint", "distilled, last"]


def test_markdown_and_html_hold_the_table_and_the_comparison(reported):
    markdown, html, results = reported()
    row = ["distilled, last", "0", "20", f"{math.log(30):.3f}", "30.00", "0.500", "", "75.0%"]
    assert f"| {' | '.join(row)} |" in markdown
    assert row in cells(html)
    difference = (
        f"seed 0: {math.log(30 / 50):+.3f} at equal steps, {math.log(30 / 45):+.3f} best checkpoint against best"
    )
    assert f"- {difference}" in markdown.splitlines()
    assert f"<li>{difference}</li>" in html
    assert results["rows"][-1]["perplexity"] == pytest.approx(30)
    assert results["differences"][0]["at_best"] == pytest.approx(math.log(30 / 45))


def test_every_row_of_a_markdown_table_has_its_cells():
    lines = table(Table(["a", "b|c"], [["x|y\nz", "1"]])).splitlines()
    assert lines == ["| a | b\\|c |", "| --- | ---: |", "| x\\|y z | 1 |"]


def test_gap_closed_is_the_way_in_perplexity_from_the_untrained_student_to_the_teacher(reported):
    markdown, _, results = reported()
    assert [row["gap_closed"] for row in results["rows"]] == pytest.approx([1, 0, 0.375, 0.25, 0.75, 0.75])
    assert "Gap closed: how much of the way" in markdown


def test_no_gap_is_closed_where_the_teacher_is_no_better(reported):
    teacher = dataclasses.replace(TEACHER, loss=math.log(60))
    markdown, _, results = reported(teacher=teacher)
    assert {row["gap_closed"] for row in results["rows"]} == {None}
    assert lines_of(markdown, "| teacher")[0].endswith("| 100.0% |  |")


def test_two_tokenizers_are_compared_in_bits_per_byte(drawn, tmp_path):
    student = [record | ({"bits_per_byte": 1.25} if record["event"] == "eval" else {}) for record in DISTILLED]
    teacher = dataclasses.replace(TEACHER, bits_per_byte=0.75)
    markdown, html, results = drawn({"seed-0/distilled": student}, teacher, baseline=False)
    assert lines_of(markdown, "| model")[0].endswith("| top-1 agreement | bits per byte |")
    assert [row[-1] for row in cells(html)[1:3]] == ["0.750", "1.250"]
    assert "different tokenizers" in markdown
    assert {row["gap_closed"] for row in results["rows"]} == {None}
    held_out = plots.plots(run_files.read(tmp_path / "run"))[0].panels[0]
    assert b"teacher" not in plots.svg(held_out)


def test_what_was_expected_stands_beside_what_was_found(reported):
    stages = {"seed-0/ce-only": BASELINE, "seed-0/distilled": DISTILLED}
    markdown, html, results = reported(stages)
    start, goal = math.log(60), math.log(20)
    half, end = (goal + left * (start - goal) for left in (0.6, 0.5))
    (waypoints,) = [results["expected"]["waypoints"]]
    assert [(point["student"], point["step"], point["progress"], point["at_most"]) for point in waypoints] == [
        ("ce-only, seed 0", 10, 0.5, pytest.approx(half)),  # the first evaluation after 10 and 25 % too
        ("ce-only, seed 0", 20, 1.0, pytest.approx(end)),
        ("distilled, seed 0", 10, 0.5, pytest.approx(half)),
        ("distilled, seed 0", 20, 1.0, pytest.approx(end)),
    ]
    assert f"| ce-only, seed 0 | 20 | 100% | {end:.3f} | {math.log(50):.3f} | above |" in markdown
    assert f"| distilled, seed 0 | 20 | 100% | {end:.3f} | {math.log(30):.3f} |  |" in markdown
    assert f"from {start:.3f}, the untrained student's, towards {goal:.3f}, the teacher's" in markdown
    assert ["model", "step", "of its steps", "expected at most", "held-out loss", ""] in cells(html)


def test_what_is_expected_at_a_step_is_compared_at_that_step(reported):
    steps = [evaluation(step, 60 - step) for step in (0, 2, 5, 7, 10, 20)]
    _, _, results = reported({"seed-0/distilled": steps}, baseline=False)
    assert [point["step"] for point in results["expected"]["waypoints"]] == [2, 5, 10, 20]


def test_before_a_second_evaluation_nothing_is_compared(reported):
    markdown, _, results = reported({"seed-0/distilled": DISTILLED[:1]}, baseline=False)
    assert results["expected"]["waypoints"] == []
    assert "Expected and found" not in markdown


def test_a_student_of_more_steps_is_compared_by_its_own_and_at_its_end(reported):
    longer = [*BASELINE, trained(40, total_steps=40), evaluation(40, 28)]
    stages = {"seed-0/ce-only": longer, "seed-0/distilled": DISTILLED}
    markdown, _, results = reported(stages, baseline_steps=40)
    assert [(p["step"], p["progress"]) for p in results["expected"]["waypoints"]] == [
        *((10, 0.25), (20, 0.5), (40, 1.0)),
        *((10, 0.5), (20, 1.0)),
    ]
    assert f"- seed 0: {math.log(30 / 28):+.3f} at their ends, after 20 and 40 steps, " in markdown
    assert [s["total_steps"] for s in results["students"]] == [40, 20]


def test_before_its_first_line_a_student_is_known_by_the_steps_that_are_set(reported):
    _, _, results = reported({"seed-0/ce-only": BASELINE[:1], "seed-0/distilled": DISTILLED[:1]}, baseline_steps=40)
    assert [s["total_steps"] for s in results["students"]] == [40, 20]


def test_nothing_is_expected_where_the_teacher_is_no_better(reported):
    markdown, _, results = reported(teacher=Evaluation(loss=math.log(60), tokens=1000))
    assert results["expected"] is None
    assert "Expected and found" not in markdown


def test_the_teacher_is_a_line_among_the_curves(a_run):
    held_out = plots.plots(run_files.read(a_run()))[0].panels[0]
    assert f"teacher {TEACHER.loss:.3f}".encode() in plots.svg(held_out)


def test_a_run_that_goes_on_says_where_it_is(reported):
    going = [evaluation(0, 60), trained(10, total_steps=1000), evaluation(10, 30), trained(15, total_steps=1000)]
    stages = {"seed-0/ce-only": BASELINE, "seed-0/distilled": going}
    markdown, html, results = reported(stages, seeds=2, epochs=3.0)
    state = "In progress: distilled, seed 0, is at step 15 of 1000; ce-only, seed 1, has not begun; distilled, seed 1, "
    assert state in markdown
    assert state in html
    assert "| distilled, last | 0 | 10 of 1000 |" in markdown
    assert "| ce-only, last | 0 | 20 |" in markdown
    assert f"seed 0: {math.log(30 / 45):+.3f} at step 10, the last that both were evaluated at" in markdown
    assert "best checkpoint against best so far" in markdown
    students = [(s["recipe"], s["step"], s["total_steps"], s["finished"]) for s in results["students"]]
    assert students == [("ce-only", 20, 20, True), ("distilled", 15, 1000, False)]


def test_a_student_that_stopped_by_itself_is_finished(blank_images, a_run):
    folder = a_run(max_steps=500)
    for recipe in ("ce-only", "distilled"):
        (folder / "seed-0" / recipe / "result.json").write_text("{}")
    report.write(folder)
    markdown = (folder / "report.md").read_text()
    assert "In progress" not in markdown
    assert "| distilled, last | 0 | 20 |" in markdown
    assert "at equal steps" in markdown


def test_a_student_without_an_evaluation_yet_is_in_progress_and_in_no_row(reported):
    markdown, _, results = reported({"seed-0/ce-only": BASELINE, "seed-0/distilled": []})
    assert "In progress: distilled, seed 0, is at step 0 of 20." in markdown
    assert [row["name"] for row in results["rows"][2:]] == ["ce-only, best checkpoint", "ce-only, last"]
    assert results["differences"] == []


def test_the_first_evaluation_alone_makes_a_report(reported):
    markdown, _, results = reported({"seed-0/ce-only": [evaluation(0, 60)]})
    assert [row["step"] for row in results["rows"]] == [None, None, 0, 0]
    assert re.findall(r"\]\((.*)\)", markdown) == ["curves.png"]


def test_a_line_that_was_cut_off_at_the_end_is_left_out(a_run):
    folder = a_run()
    log = folder / "seed-0/distilled/log.jsonl"
    whole = log.read_text()
    log.write_text(whole + json.dumps(evaluation(20, 10))[:-1])
    assert math.exp(report.rows(folder)[-1].evaluation.loss) == pytest.approx(30)
    log.write_text(whole + json.dumps(evaluation(20, 10)))  # all of it but the end of the line
    assert math.exp(report.rows(folder)[-1].evaluation.loss) == pytest.approx(10)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "eval", "st', "line 2 is not JSON"),
        ("[1, 2]", "line 2 is not a record with an event and a step"),
        ('{"event": "eval", "step": "ten", "loss": 1, "tokens": 1}', "line 2 is not a record with an event and a step"),
        ('{"event": "eval", "step": 10}', "line 2: the eval record has no loss, tokens"),
    ],
)
def test_a_broken_line_elsewhere_is_named(a_run, line, message):
    log = a_run() / "seed-0/distilled/log.jsonl"
    first, *others = log.read_text().splitlines(keepends=True)
    log.write_text("".join([first, line + "\n", *others]))
    with pytest.raises(RunError, match=re.escape(f"{log}, {message}")):
        report.rows(log.parents[2])


def test_a_log_that_does_not_begin_at_step_0_is_refused(a_run):
    folder = a_run({"seed-0/distilled": DISTILLED[1:]}, baseline=False)
    with pytest.raises(RunError, match="the first evaluation must be that of step 0, got step 10"):
        report.rows(folder)


def test_what_is_not_finite_is_reported_and_the_json_is_strict(drawn):
    broken = [
        evaluation(0, 60),
        trained(10, kd=math.nan),
        evaluation(10, 30) | {"loss": math.nan, "kl": math.inf},
        trained(20, gradient_norm=math.inf),
        evaluation(20, 30) | {"loss": 800.0},
    ]
    markdown, _, results = drawn({"seed-0/distilled": broken}, baseline=False)
    best, last = results["rows"][2:]
    assert (best["step"], last["evaluation"]["loss"], last["perplexity"]) == (0, 800.0, "Infinity")
    assert last["gap_closed"] is None
    assert "| 800.000 | inf |" in markdown


def test_a_last_loss_that_is_no_number_is_shown_as_such(reported):
    markdown, html, results = reported(
        {"seed-0/distilled": [*DISTILLED[:-1], evaluation(20, 30) | {"loss": math.nan, "kl": math.inf}]}, baseline=False
    )
    assert "| distilled, last | 0 | 20 | nan | nan | inf |" in markdown
    assert ["distilled, last", "0", "20", "nan", "nan", "inf", "", ""] in cells(html)
    assert (results["rows"][-1]["evaluation"]["loss"], results["rows"][-1]["evaluation"]["kl"]) == ("NaN", "Infinity")
    assert results["rows"][-2]["step"] == 10


def test_a_long_log_is_drawn_by_means_over_neighbouring_lines(a_run):
    lines = [trained(step, gradient_norm=5.0 if step % 3 else 2.0) for step in range(1, 1201)]
    broken = trained(1201, gradient_norm=math.inf)
    folder = a_run({"seed-0/distilled": [evaluation(0, 60), *lines, broken]}, baseline=False)
    axes = Figure().subplots()
    norm = next(plot for plot in plots.plots(run_files.read(folder)) if plot.name == "optimizer").panels[1]
    norm.draw(axes)
    points = numpy.asarray(axes.lines[0].get_xydata())
    assert len(points) == 301
    assert points[:2].tolist() == [[4, 4.25], [8, 4.25]]
    assert points[-1, 0] == 1201
    assert math.isnan(points[-1, 1])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_teacher_without_a_finite_loss_is_reported(drawn, loss):
    markdown, _, results = drawn(teacher=dataclasses.replace(TEACHER, loss=loss))
    assert lines_of(markdown, "| teacher")[0].startswith(f"| teacher |  |  | {loss} | {loss} |")
    assert {row["gap_closed"] for row in results["rows"]} == {None}


EVIL = "<script>alert('&')</script>"


class Tags(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def test_what_comes_from_outside_is_text_and_never_a_tag(reported):
    stages = {"seed-0/distilled": [*DISTILLED, warning(20, f"broke {EVIL}")]}
    markdown, html, _ = reported(stages, baseline=False, teacher=TEACHER, data=f"{EVIL}.txt", student=f"s{EVIL}")
    page = Tags(html)
    assert "script" not in page.names
    for shown in (f"distilled, seed 0, step 20: broke {EVIL}", f"text: {EVIL}.txt;", f"Student: s{EVIL}."):
        assert shown in page.text
    assert "<script" not in markdown
    assert "step 20: broke &lt;script>alert('&amp;')&lt;/script>" in markdown


def test_the_teachers_name_is_text_in_the_title_too(blank_images, a_run):
    folder = a_run()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"teacher": f"</title>{EVIL}"}))
    report.write(folder)
    page = Tags((folder / "report.html").read_text())
    assert "script" not in page.names
    assert f"Teacher: </title>{EVIL}." in page.text


def test_the_page_needs_nothing_beside_it(drawn):
    html = drawn()[1]
    page = Tags(html)
    assert page.names.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    loaded = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset", "data", "action")]
    assert len(loaded) >= 6
    prefix = "data:image/svg+xml;base64,"
    assert [value for value in loaded if not value.startswith(prefix)] == []
    for image in [html, *(base64.b64decode(value.removeprefix(prefix)).decode() for value in loaded)]:
        assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:)?//|url\(\s*["']?(?!#)|@import""", image)


def test_writing_it_again_changes_no_byte(a_run):
    folder = a_run()
    report.write(folder)
    first = {name: (folder / name).read_bytes() for name in FILES}
    report.write(folder)
    assert {name for name in FILES if (folder / name).read_bytes() != first[name]} == set()
    assert {path.name for path in folder.iterdir()} == FILES | {"config.json", "teacher.json", "seed-0"}


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_file_is_written_whole_or_not_at_all(a_run, blank_images, monkeypatch, name):
    folder = a_run()
    for each in FILES:
        (folder / each).write_text("before")

    def full_disk(path: Path) -> None:
        if name in path.name:
            raise OSError("No space left on device")

    monkeypatch.setattr(whole, "_sync", full_disk)
    with pytest.raises(OSError, match="No space"):
        report.write(folder)
    assert (folder / name).read_text() == "before"


def test_images_open_and_tell_what_made_them(a_run):
    folder = a_run(seed=3, seeds=2, stages={"seed-3/ce-only": BASELINE, "seed-3/distilled": DISTILLED})
    report.write(folder)
    for name, panels in {"curves": 2, "shares": 1, "optimizer": 2, "speed": 1}.items():
        with Image.open(folder / f"{name}.png") as image:
            assert image.size == (600 * panels, 498), name
            pixels = image.convert("RGB").getcolors(1 << 20) or []
            colored = sum(count for count, color in pixels if max(color) - min(color) > 60)  # letters and axes are gray  # pyright: ignore[reportArgumentType]
            assert colored > 200 * panels, name
            assert image.info["Description"] == (
                "fastdistill 0.0.7, torch 2.9, transformers 5.1, python 3.12;\ncpu, fp32; seeds 3 to 4"
            )


def test_seeds_versions_and_settings_are_in_every_file(reported):
    markdown, html, results = reported(lr=0.0123)
    made = "fastdistill 0.0.7, torch 2.9, transformers 5.1, python 3.12; cpu, fp32; seed 0."
    assert made in markdown
    assert made in " ".join(html.split())
    assert (results["versions"], results["device"], results["precision"]) == (VERSIONS, "cpu", "fp32")
    assert results["config"]["seed"] == 0
    assert "peak learning rate 0.0123, cosine" in markdown
    _, *settings = cells(html.split("<details")[1])
    settings = {name: value for name, value in settings}
    assert settings.keys() == {field.name for field in dataclasses.fields(Config)}
    assert (settings["lr"], settings["baseline"], settings["student"]) == ("0.0123", "True", "")


def test_warnings_are_told_with_their_student_and_step_and_the_first_twenty_of_each(reported):
    many = [*DISTILLED, *(warning(20, f"trouble {i}") for i in range(22))]
    stages = {"seed-0/ce-only": [*BASELINE, warning(7, "only one")], "seed-0/distilled": many}
    markdown, html, results = reported(stages)
    listed = re.findall(r"^- (.*(?:one|trouble|log).*)$", markdown, re.MULTILINE)
    assert listed == [
        "ce-only, seed 0, step 7: only one",
        *(f"distilled, seed 0, step 20: trouble {i}" for i in range(20)),
        "distilled, seed 0: 2 more in its log",
    ]
    assert "<li>ce-only, seed 0, step 7: only one</li>" in html
    assert [len(student["warnings"]) for student in results["students"]] == [1, 22]


def test_a_run_without_warnings_says_so(reported):
    markdown, html, _ = reported()
    assert "## Warnings\n\nNone.\n" in markdown
    assert "<p>None.</p>" in html


def test_speed_is_told_by_phase_with_memory_and_time(reported):
    seconds = {"data": 0.1, "teacher": 0.5, "backward": 1.4}
    timed = [
        evaluation(0, 60),
        trained(10, seconds=seconds, elapsed=4.0, peak_memory_bytes=3 << 20),
        trained(14, seconds=seconds, elapsed=3700.0, peak_memory_bytes=5 << 20),
        trained(20, seconds=seconds, elapsed=3725.6, peak_memory_bytes=2 << 20),
        evaluation(20, 30),
    ]
    markdown, html, results = reported({"seed-0/ce-only": BASELINE, "seed-0/distilled": timed})
    columns = ["model", "tokens/s", "ms a step", "data", "teacher", "backward", "peak memory", "wall clock"]
    row = ["distilled, seed 0", "1,400", "300.0", "5%", "25%", "70%", "5 MiB", "1:02:06"]
    assert f"| {' | '.join(columns)} |" in markdown
    assert f"| {' | '.join(row)} |" in markdown
    assert columns in cells(html)
    assert ["ce-only, seed 0", "1,500", "", "", "", "", "", ""] in cells(html)
    assert results["seconds"] == 3725.6
    assert results["speed"][1]["step_seconds"] == pytest.approx({"data": 0.015, "teacher": 0.075, "backward": 0.21})
    assert 'alt="time of a step, distilled, seed 0"' in html


def test_older_logs_have_no_columns_for_what_they_do_not_tell(reported):
    markdown, html, results = reported()
    assert "| model | tokens/s |\n" in markdown
    assert results["seconds"] is None
    assert "time of a step" not in html


def test_what_a_student_kept_is_shown_as_far_as_the_log_tells():
    told = Evaluation(1.0, 10, kl=0.1, top1_agreement=0.25, top5_overlap=0.5, shared_mass=0.75, compared=10)
    older = Evaluation(1.0, 10, kl=0.1, top1_agreement=0.25, compared=10)
    rows = [Row("teacher", None, told), Row("untrained student", None, older)]
    table = report_parts.retention(rows)
    columns = dict(zip(table.columns, zip(*table.rows, strict=True), strict=True))
    assert columns["top-1 agreement"] == ("25.0%", "25.0%")
    assert columns["top-5 overlap"] == ("50.0%", "")
    assert columns["shared mass"] == ("75.0%", "")
    assert "shared mass" not in report_parts.retention(rows[1:] * 2).columns


def test_begin_keeps_the_teacher_and_the_versions_that_run(a_run):
    folder = a_run()
    run_files.begin(folder, dataclasses.replace(TEACHER, kl=math.nan), device="cuda:1", precision="bf16")
    teacher = run_files.read(folder).teacher
    assert (teacher.device, teacher.precision, teacher.evaluation.loss) == ("cuda:1", "bf16", TEACHER.loss)
    assert math.isnan(teacher.evaluation.kl or 0)
    assert teacher.versions["fastdistill"] == fastdistill.__version__
    assert teacher.versions.keys() == VERSIONS.keys()


def test_an_older_run_lacks_settings_and_has_their_defaults(a_run):
    folder = a_run()
    (folder / "config.json").write_text('{"max_steps": 20, "baseline": true}')
    assert run_files.read(folder).config == Config(max_steps=20, baseline=True)


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[[object], tuple[int, str, str]]:
    """`fastdistill report RUN`: exit code, output, errors."""

    def call(run: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdistill", "report", str(run)])
        code = fastdistill.__main__.main()
        return code, *capsys.readouterr()

    return call


def test_the_command_writes_the_report_and_says_where(a_run, command):
    folder = a_run()
    code, out, errors = command(folder)
    assert (code, errors) == (0, "")
    assert str(folder / "report.html") in out
    assert {path.name for path in folder.iterdir()} >= FILES


def break_settings(folder: Path) -> None:
    (folder / "config.json").write_text('{"batchsize": 2}')


def break_values(folder: Path) -> None:
    (folder / "config.json").write_text('{"lr": -1.0}')


def forget_settings(folder: Path) -> None:
    (folder / "config.json").unlink()


def forget_teacher(folder: Path) -> None:
    (folder / "teacher.json").unlink()


def break_teacher(folder: Path) -> None:
    (folder / "teacher.json").write_text('{"evaluation": {"loss": 1.0}}')


def forget_evaluations(folder: Path) -> None:
    for log in folder.glob("seed-*/*/log.jsonl"):
        log.write_text("")


def break_log(folder: Path) -> None:
    (folder / "seed-0/distilled/log.jsonl").write_text("broken\n")


def block_file(folder: Path) -> None:
    (folder / "report.md").mkdir()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (break_settings, "config.json: unknown key 'batchsize': did you mean batch_size?"),
        (break_values, "--lr must be greater than 0, got -1.0"),
        (forget_settings, "RUN must be the folder of a run of train.py, got .*/run: there is no config.json in it"),
        (forget_teacher, "has no evaluation yet: teacher.json"),
        (break_teacher, "teacher.json cannot be understood: TypeError"),
        (forget_evaluations, "has no evaluation yet: no student's log has one"),
        (break_log, "seed-0/distilled/log.jsonl, line 1 is not JSON"),
        (block_file, "RUN .*/run: Is a directory: .*report.md"),
    ],
)
def test_what_is_no_whole_run_is_one_line_and_not_a_success(a_run, blank_images, command, fault, message):
    folder = a_run()
    fault(folder)
    code, out, errors = command(folder)
    assert (code, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert errors.startswith("fastdistill report: ")
    assert str(folder) in errors
    assert re.search(message, errors)


def test_a_folder_that_is_not_there_is_named(tmp_path, command):
    code, _, errors = command(tmp_path / "absent")
    assert code == 2
    assert "RUN must be the folder of a run of train.py, got" in errors
    assert errors.strip().endswith("absent: there is no such folder")


def test_without_the_train_extra_it_says_what_is_needed(a_run, command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastdistill.training.report", None)
    with pytest.raises(SystemExit) as stop:
        command(a_run())
    assert stop.value.code == 2
    assert "fastdistill report needs the [train] extra" in capsys.readouterr().err
