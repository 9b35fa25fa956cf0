"""What a run has come to, in numbers: the models side by side, recipe against recipe, and the speed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastdistill.training.evaluate import Evaluation, perplexity
from fastdistill.training.run_files import BASELINE, DISTILLED, Run, Stage
from fastdistill.training.trajectory import AT_MOST_LEFT, Trajectory, held_out

BEST, LAST = "best checkpoint", "last"


@dataclass(frozen=True)
class Row:
    """One model on the held-out text; `seed` is None where it is the same for all, `step` where it has none.

    `total_steps` is given where the student has not come to its end yet, and says where that is.
    """

    name: str
    seed: int | None
    evaluation: Evaluation
    step: int | None = None
    total_steps: int | None = None


def rows(run: Run) -> list[Row]:
    """The teacher, the untrained student, and for each seed and recipe the best checkpoint and the last."""
    untrained = run.evaluated[0].evaluations[0]
    found = [Row("teacher", None, run.teacher.evaluation), Row("untrained student", None, untrained)]
    for stage in run.evaluated:
        best, last = stage.best_step, stage.last_step
        total_steps = None if stage.finished else stage.total_steps
        found.append(Row(f"{stage.recipe}, {BEST}", stage.seed, stage.evaluations[best], best))
        found.append(Row(f"{stage.recipe}, {LAST}", stage.seed, stage.evaluations[last], last, total_steps))
    return found


def gaps_closed(rows: Sequence[Row]) -> list[float | None]:
    """For each row, how much of the way in perplexity from the untrained student (0) to the teacher (1) it has come.

    None where this says nothing: tokenizers differ, the teacher is no better, or a perplexity is not finite.
    """
    teacher, untrained = (perplexity(row.evaluation.loss) for row in rows[:2])
    way = untrained - teacher
    if rows[0].evaluation.bits_per_byte is not None or not way > 0:
        return [None] * len(rows)
    closed = [(untrained - perplexity(row.evaluation.loss)) / way for row in rows]
    return [share if math.isfinite(share) else None for share in closed]


@dataclass(frozen=True)
class Difference:
    """Held-out loss of the distilled student minus that of the baseline, in nats a token: below 0 distillation wins."""

    seed: int
    steps: tuple[int, int]
    """Of the distilled student and the baseline: their ends, or before that the last at which both were evaluated."""
    at_steps: float
    at_best: float
    final: bool


def differences(run: Run) -> list[Difference]:
    """Seed by seed, for those where both students have been evaluated after a step."""
    stages = {(stage.recipe, stage.seed): stage for stage in run.evaluated}
    found = []
    for seed in sorted({stage.seed for stage in run.evaluated}):
        distilled, baseline = stages.get((DISTILLED, seed)), stages.get((BASELINE, seed))
        if distilled is None or baseline is None:
            continue
        final = distilled.finished and baseline.finished
        common = max(distilled.evaluations.keys() & baseline.evaluations.keys())
        steps = (distilled.last_step, baseline.last_step) if final else (common, common)
        if common > 0:
            at_steps, at_best = (
                distilled.evaluations[a].loss - baseline.evaluations[b].loss
                for a, b in (steps, (distilled.best_step, baseline.best_step))
            )
            found.append(Difference(seed, steps, at_steps, at_best, final))
    return found


@dataclass(frozen=True)
class Waypoint:
    """An evaluation of a student beside what was expected of it when it began."""

    student: str
    step: int
    progress: float
    at_most: float
    found: float


def expectation(run: Run) -> Trajectory | None:
    return Trajectory.of(run.evaluated[0].evaluations[0], run.teacher.evaluation)


def waypoints(run: Run) -> list[Waypoint]:
    """Of each student the first evaluation at or after each of the shares of its steps that `AT_MOST_LEFT` names."""
    expected, found = expectation(run), []
    if expected is None:
        return []
    for stage in run.evaluated:
        total = stage.total_steps or math.inf
        shares = sorted(AT_MOST_LEFT)[1:]
        reached = (next((step for step in stage.evaluations if step >= share * total), None) for share in shares)
        for step in dict.fromkeys(step for step in reached if step is not None):
            loss = held_out(stage.evaluations[step])
            found.append(Waypoint(stage.name, step, step / total, expected.upper(step / total), loss))
    return found


@dataclass(frozen=True)
class Speed:
    """How fast one student was trained; what an older log does not tell is None or empty."""

    stage: str
    tokens_per_second: float
    """Median over the lines of the log."""
    step_seconds: dict[str, float]
    """Mean seconds of a step by phase."""
    peak_memory_bytes: int | None
    elapsed: float | None
    """Seconds by the clock, evaluations included."""


def speeds(run: Run) -> list[Speed]:
    return [_speed(stage) for stage in run.stages if stage.train]


def _speed(stage: Stage) -> Speed:
    timed = step_times(stage)
    steps = sum(line.steps for line in timed)
    phases = {phase: sum(line.seconds.get(phase, 0.0) for line in timed) / steps for phase in phases_of(stage)}
    peak_memory_bytes, elapsed = (
        max((record[name] for record in stage.train if record.get(name) is not None), default=None)
        for name in ("peak_memory_bytes", "elapsed")
    )
    tokens_per_second = statistics.median(record["tokens_per_second"] for record in stage.train)
    return Speed(stage.name, tokens_per_second, phases, peak_memory_bytes, elapsed)


class StepTime(NamedTuple):
    """What a line of the log tells of the time: seconds by phase, of the steps since the line before."""

    step: int
    steps: int
    seconds: dict[str, float]


def step_times(stage: Stage) -> list[StepTime]:
    """For each line that tells."""
    return [
        StepTime(record["step"], record["step"] - before, record["seconds"])
        for record, before in zip(stage.train, [0, *stage.steps], strict=False)
        if "seconds" in record
    ]


def phases_of(stage: Stage) -> list[str]:
    """The phases of a step that the log times, in its order."""
    return list(dict.fromkeys(phase for line in step_times(stage) for phase in line.seconds))
