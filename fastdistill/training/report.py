"""The report of a run, from the files in its folder alone: while it goes on, at its end, or years later."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from fastdistill.training import plots, report_html, report_markdown, report_parts, results, run_files
from fastdistill.training.evaluate import perplexity
from fastdistill.training.results import Row
from fastdistill.training.run_files import Run, RunError
from fastdistill.training.whole import write_file

REFRESH_SECONDS = 20


def main(run: Path) -> int:
    """`fastdistill report RUN`: 0 when the report is written, 2 when `run` is not what one can be made of."""
    if not (run / "config.json").is_file():
        what = "there is no config.json in it" if run.is_dir() else "there is no such folder"
        print(f"fastdistill report: RUN must be the folder of a run of train.py, got {run}: {what}", file=sys.stderr)
        return 2
    try:
        write(run)
    except RunError as error:
        print(f"fastdistill report: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fastdistill report: RUN {run}: {error.strerror}: {error.filename}", file=sys.stderr)
        return 2
    print(f"The report is in {run / 'report.html'}, and in report.md, results.json and images beside it")
    return 0


def rows(output: Path) -> list[Row]:
    """The models of the run in `output` side by side; raises `RunError` where there are none yet."""
    return results.rows(run_files.read(output))


def write(output: Path) -> None:
    """Write `report.md`, `report.html`, `results.json`, `curves.png` and other images into `output`, each whole.

    Raises `RunError` if the folder is no run, has no evaluation yet or cannot be understood. In `results.json` what
    is not finite is one of the strings "NaN", "Infinity" and "-Infinity", since JSON has no such numbers.
    """
    run = run_files.read(output)
    drawn = plots.plots(run)
    sections = report_parts.sections(run, drawn)
    for plot in drawn:
        write_file(output / f"{plot.name}.png", plots.png(plot, report_parts.made_with(run)))
    title = f"{report_parts.TITLE}: {run.config.teacher}"
    write_file(output / "report.html", report_html.page(title, sections, report_parts.settings(run.config)))
    write_file(output / "results.json", json.dumps(strict(_results(run)), indent=2, allow_nan=False) + "\n")
    write_file(output / "report.md", report_markdown.page(sections))


def refresh(output: Path) -> None:
    """`write`, unless that was done in the last seconds: a run that evaluates often is not held up."""
    page = output / "report.html"
    if not page.exists() or time.time() - page.stat().st_mtime > REFRESH_SECONDS:
        write(output)


def _results(run: Run) -> dict[str, Any]:
    """Every number of the report, for programs."""
    models, expected = results.rows(run), results.expectation(run)
    speeds = results.speeds(run)
    elapsed = [speed.elapsed for speed in speeds if speed.elapsed is not None]
    return {
        "config": dataclasses.asdict(run.config),
        "versions": run.teacher.versions,
        "device": run.teacher.device,
        "precision": run.teacher.precision,
        "seconds": round(sum(elapsed), 1) if elapsed else None,
        "rows": [
            dataclasses.asdict(row) | {"perplexity": perplexity(row.evaluation.loss), "gap_closed": closed}
            for row, closed in zip(models, results.gaps_closed(models), strict=True)
        ],
        "expected": expected
        and {
            **dataclasses.asdict(expected),
            "waypoints": [dataclasses.asdict(waypoint) for waypoint in results.waypoints(run)],
        },
        "differences": [dataclasses.asdict(difference) for difference in results.differences(run)],
        "students": [
            {
                "seed": stage.seed,
                "recipe": stage.recipe,
                "step": stage.step,
                "total_steps": stage.total_steps,
                "finished": stage.finished,
                "warnings": [{"step": warning["step"], "message": warning["message"]} for warning in stage.warnings],
            }
            for stage in run.stages
        ],
        "speed": [dataclasses.asdict(speed) for speed in speeds],
    }


def strict(value: Any) -> Any:
    """The same for strict JSON: what is not finite by its name."""
    match value:
        case dict():
            return {key: strict(each) for key, each in value.items()}
        case list() | tuple():
            return [strict(each) for each in value]
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
