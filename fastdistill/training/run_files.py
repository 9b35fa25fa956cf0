"""What a run keeps in its folder, written and read back: settings, the teacher's evaluation, a log for each student."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

import fastdistill
from fastdistill.training.config import Config, UsageError
from fastdistill.training.evaluate import Evaluation
from fastdistill.training.settings_file import read_settings
from fastdistill.training.whole import write_file

BASELINE, DISTILLED = "ce-only", "distilled"

_FIELDS = {
    "train": {"total", "components", "learning_rate", "gradient_norm", "tokens_per_second"},
    "eval": {"loss", "tokens"},
    "warning": {"message"},
}
"""What a log's record of each event has at least, beside `event` and `step`."""


class RunError(Exception):
    """A folder that is no run, or one whose files cannot be read; the message says which and why."""


@dataclass(frozen=True)
class Teacher:
    """`teacher.json`: how the teacher did on the held-out text, and what computed it."""

    evaluation: Evaluation
    versions: dict[str, str]
    device: str
    precision: str


@dataclass(frozen=True)
class Stage:
    """One student, as far as its log goes. `total_steps` is None where neither log nor settings tell."""

    seed: int
    recipe: str
    records: list[dict[str, Any]]
    total_steps: int | None
    ended: bool
    """Whether its result is kept: it stopped by itself, early or not."""

    @property
    def name(self) -> str:
        return f"{self.recipe}, seed {self.seed}"

    @property
    def step(self) -> int:
        """The last optimizer step that the log tells of."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def finished(self) -> bool:
        return self.ended or (self.total_steps is not None and self.step >= self.total_steps)

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == "train"]

    @property
    def steps(self) -> list[int]:
        """Those of `train`."""
        return [record["step"] for record in self.train]

    @cached_property
    def warnings(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["event"] == "warning"]

    @cached_property
    def evaluations(self) -> dict[int, Evaluation]:
        """By step, in rising order."""
        names = [field.name for field in dataclasses.fields(Evaluation)]
        evaluations = [record for record in self.records if record["event"] == "eval"]
        return {e["step"]: Evaluation(**{name: e[name] for name in names if name in e}) for e in evaluations}

    @property
    def best_step(self) -> int:
        """The step of the lowest held-out loss, the earliest of equals; one that is not a number is never lower."""
        return min(self.evaluations, key=lambda step: self.evaluations[step].loss)

    @property
    def last_step(self) -> int:
        """The step of the last evaluation."""
        return max(self.evaluations)


@dataclass(frozen=True)
class Run:
    """A run in which the teacher and at least one student have been evaluated; `stages` by seed, CE-only first."""

    config: Config
    teacher: Teacher
    stages: list[Stage]

    @property
    def has_one_tokenizer(self) -> bool:
        """Whether teacher and student cut the text alike, so that their nats a token can be compared."""
        return self.teacher.evaluation.bits_per_byte is None

    @property
    def evaluated(self) -> list[Stage]:
        return [stage for stage in self.stages if stage.evaluations]

    def not_begun(self) -> list[str]:
        """The students that the settings ask for and that have no log."""
        recipes = (BASELINE, DISTILLED) if self.config.baseline else (DISTILLED,)
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        begun = {stage.name for stage in self.stages}
        names = [f"{recipe}, seed {seed}" for seed in seeds for recipe in recipes]
        return [name for name in names if name not in begun]


def open_output(config: Config) -> Path:
    """The run's folder, made and writable, with the configuration in it, as it was last begun or gone on with.

    A new run is given no folder that holds something else.
    """
    path = Path(config.output_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not config.resume and any(path.iterdir()):
            raise UsageError(f"--output-dir {path} is not empty: choose another, or go on with its run by --resume")
        settings = dataclasses.asdict(dataclasses.replace(config, resume=False))
        write_file(path / "config.json", json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--output-dir {path} cannot be written: {error.strerror}: {error.filename}") from error
    return path


def abandon_output(output: Path) -> None:
    """Remove a new run's folder if no student's training is in it, so that its name is free again."""
    if {file.name for file in output.iterdir()} <= {"config.json", "student_layers.json", "teacher.json"}:
        shutil.rmtree(output)


def begin(output: Path, teacher: Evaluation, *, device: str, precision: str) -> None:
    """Write `teacher.json` into the run's folder, with the versions that are running: before the first student."""
    versions = {
        "fastdistill": fastdistill.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    content = dataclasses.asdict(Teacher(teacher, versions, device, precision))
    write_file(output / "teacher.json", json.dumps(content, indent=2) + "\n")


def read(output: Path) -> Run:
    """The run in the folder `output`, as far as it has come.

    Raises `RunError` if there is no run, if nothing has been evaluated yet, or if a file cannot be understood.
    """
    try:
        config = Config(**read_settings(output / "config.json", called="config.json"))
    except UsageError as error:
        raise RunError(f"{output}: {error}") from error
    if not (output / "teacher.json").is_file():
        raise RunError(f"{output} has no evaluation yet: teacher.json, the first to be written, is missing")
    seeds = sorted(int(folder.name[5:]) for folder in output.glob("seed-*") if folder.name[5:].isdecimal())
    places = [(seed, recipe, output / f"seed-{seed}" / recipe) for seed in seeds for recipe in (BASELINE, DISTILLED)]
    stages = [_stage(*place, config) for place in places if (place[-1] / "log.jsonl").is_file()]
    run = Run(config, _teacher(output / "teacher.json"), stages)
    if not run.evaluated:
        raise RunError(f"{output} has no evaluation yet: no student's log has one")
    return run


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, without a last line that was cut off while it was written.

    Raises `RunError` with file and line for any other line that is not a record.
    """
    *lines, unfinished = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if unfinished:
        with contextlib.suppress(RunError):
            records.append(_record(unfinished, str(path)))
    return records


def _record(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RunError(f"{place} is not JSON: {error}") from error
    if not isinstance(record, dict) or "event" not in record or not isinstance(record.get("step"), int):
        raise RunError(f"{place} is not a record with an event and a step: {line}")
    missing = _FIELDS.get(record["event"], set()) - record.keys()
    if missing:
        raise RunError(f"{place}: the {record['event']} record has no {', '.join(sorted(missing))}")
    return record


def _stage(seed: int, recipe: str, folder: Path, config: Config) -> Stage:
    records = read_log(folder / "log.jsonl")
    logged = [record["total_steps"] for record in records if "total_steps" in record]
    settled = config.without_teacher() if recipe == BASELINE else config
    total_steps = logged[-1] if logged else settled.max_steps
    stage = Stage(seed, recipe, records, total_steps, (folder / "result.json").exists())
    first = next(iter(stage.evaluations), 0)
    if first != 0:
        raise RunError(f"{folder / 'log.jsonl'}: the first evaluation must be that of step 0, got step {first}")
    return stage


def _teacher(path: Path) -> Teacher:
    try:
        content = json.loads(path.read_text())
        return Teacher(**content | {"evaluation": Evaluation(**content["evaluation"])})
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be understood: {type(error).__name__}: {error}") from error
