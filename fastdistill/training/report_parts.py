"""What a report says, as text, tables and plots; how it looks is for Markdown and HTML to say."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from fastdistill.training.config import COMPONENTS, Config
from fastdistill.training.evaluate import perplexity
from fastdistill.training.plots import Plot
from fastdistill.training.results import (
    Difference,
    Row,
    Waypoint,
    differences,
    expectation,
    gaps_closed,
    rows,
    speeds,
    waypoints,
)
from fastdistill.training.run_files import Run

TITLE = "Teacher, untrained student and students side by side"
_WARNINGS_SHOWN = 20


@dataclass(frozen=True)
class Table:
    """Cells as they are shown; the first column is words and the others are mostly numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Items:
    """A list of short lines."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A paragraph is a string."""

    title: str
    parts: Sequence[str | Table | Items | Plot]


def sections(run: Run, plots: Sequence[Plot]) -> list[Section]:
    """The report in its order; the first section stands under its title."""
    speed_plots = [plot for plot in plots if plot.name == "speed"]
    found = [
        Section(TITLE, [*_state(run), retention(rows(run)), *_comparison(differences(run)), _protocol(run)]),
        Section("Expected and found", _trajectory(run)),
        Section("Curves", [plot for plot in plots if plot not in speed_plots]),
        Section("Warnings", _warnings(run)),
        Section("Speed", [*_speed(run), *speed_plots]),
        Section(
            "How it was made", [_models_and_text(run.config), f"Recipe: {recipe(run.config)}.", made_with(run) + "."]
        ),
    ]
    return [section for section in found if section.parts]


def _state(run: Run) -> list[str]:
    """What is still to come, if anything."""
    open_stages = [stage for stage in run.stages if not stage.finished]
    lines = [f"{s.name}, is at step {s.step}" + (f" of {s.total_steps}" * bool(s.total_steps)) for s in open_stages]
    lines += [f"{name}, has not begun" for name in run.not_begun()]
    return [f"In progress: {'; '.join(lines)}."] if lines else []


def retention(rows: Sequence[Row]) -> Table:
    """The models side by side: what the student has kept of its teacher."""
    columns = ["model", "seed", "step", "held-out loss", "perplexity", "KL to teacher", "top-1 agreement"]
    told = any(row.evaluation.top5_overlap is not None for row in rows)  # older logs do not
    columns += ["top-5 overlap", "shared mass"] * told
    two_tokenizers = rows[0].evaluation.bits_per_byte is not None
    columns.append("bits per byte" if two_tokenizers else "gap closed")
    lines = []
    for row, closed in zip(rows, gaps_closed(rows), strict=True):
        e = row.evaluation
        lines.append(
            [
                row.name,
                _shown(row.seed, "d"),
                _shown(row.step, "d") + (f" of {row.total_steps}" if row.total_steps else ""),
                f"{e.loss:.3f}",
                _shown_perplexity(e.loss),
                _shown(e.kl, ".3f"),
                _shown(e.top1_agreement, ".1%"),
                *[_shown(e.top5_overlap, ".1%"), _shown(e.shared_mass, ".1%")] * told,
                _shown(e.bits_per_byte, ".3f") if two_tokenizers else _shown(closed, ".1%"),
            ]
        )
    return Table(columns, lines)


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _shown_perplexity(loss: float) -> str:
    value = perplexity(loss)
    return f"{value:.2f}" if value < 1e6 else f"{value:.4g}"


def _comparison(found: Sequence[Difference]) -> list[str | Items]:
    """Distilled against CE-only, seed by seed, win or not."""
    title = "Held-out loss of the distilled student minus that of cross-entropy only (below 0: distillation wins):"
    lines = []
    for d in found:
        distilled, baseline = d.steps
        if not d.final:
            where = f"step {distilled}, the last that both were evaluated at"
        elif distilled == baseline:
            where = "equal steps"
        else:
            where = f"their ends, after {distilled} and {baseline} steps"
        so_far = "" if d.final else " so far"
        lines.append(
            f"seed {d.seed}: {d.at_steps:+.3f} at {where}, {d.at_best:+.3f} best checkpoint against best{so_far}"
        )
    return [title, Items(lines)] if lines else []


def _protocol(run: Run) -> str:
    """How the numbers in the table were measured."""
    student = run.evaluated[0].evaluations[0]
    before = "before it" if run.config.packing == "stream" else "before it in its document, whose first has none"
    text = (
        f"Held-out loss: mean cross-entropy in nats over {student.tokens:,} held-out tokens, each predicted once from "
        f"at most {run.config.seq_len - 1} {before}; perplexity is its exp. KL(teacher || student) and agreement "
        "with the teacher are at temperature 1: top-1 is how often the most probable token is the same, top-5 how many "
        "of the teacher's five most probable are among the student's, shared mass the probability that both give the "
        "same tokens. A best checkpoint is the one with the lowest held-out loss: it is "
        "chosen on the text it is reported on."
    )
    if run.has_one_tokenizer:
        return text + (
            " Gap closed: how much of the way in perplexity from the untrained student to the teacher a model has come."
        )
    return text + (
        " Teacher and student have different tokenizers: loss and perplexity are per token of their own and cannot be "
        f"compared between them, bits per byte can. KL and agreement are over {student.compared or 0:,} positions, and "
        "over the strings that both tokenizers have, the others taken together."
    )


def _trajectory(run: Run) -> list[str | Table]:
    """Held-out losses beside the band that was announced when the run began."""
    expected, found = expectation(run), waypoints(run)
    if expected is None or not found:
        return []
    lines = [
        [w.student, str(w.step), f"{w.progress:.0%}", f"{w.at_most:.3f}", f"{w.found:.3f}", _shown_edge(w)]
        for w in found
    ]
    columns = ["model", "step", "of its steps", "expected at most", "held-out loss", ""]
    return [Table(columns, lines), f"Expected before the first step: {expected.describe()}."]


def _shown_edge(waypoint: Waypoint) -> str:
    return "" if waypoint.found <= waypoint.at_most else "above"


def _warnings(run: Run) -> list[str | Items]:
    lines = []
    for stage in run.stages:
        shown = stage.warnings[:_WARNINGS_SHOWN]
        lines += [f"{stage.name}, step {warning['step']}: {warning['message']}" for warning in shown]
        if len(stage.warnings) > len(shown):
            lines.append(f"{stage.name}: {len(stage.warnings) - len(shown)} more in its log")
    return [Items(lines)] if lines else ["None."]


def _speed(run: Run) -> list[str | Table]:
    """A row for each student, a column for each thing that a log tells."""
    found = speeds(run)
    # The student with the most phases first, so that each stands in the order of a step.
    by_detail = sorted(found, key=lambda speed: -len(speed.step_seconds))
    phases = list(dict.fromkeys(phase for speed in by_detail for phase in speed.step_seconds))
    lines = []
    for speed in found:
        whole = sum(speed.step_seconds.values())
        shares = [
            _shown(speed.step_seconds[phase] / whole if phase in speed.step_seconds else None, ".0%")
            for phase in phases
        ]
        memory = "" if speed.peak_memory_bytes is None else f"{speed.peak_memory_bytes / 2**20:,.0f} MiB"
        clock = "" if speed.elapsed is None else str(timedelta(seconds=round(speed.elapsed)))
        step = f"{1000 * whole:.1f}" if speed.step_seconds else ""
        lines.append([speed.stage, f"{speed.tokens_per_second:,.0f}", step, *shares, memory, clock])
    columns = ["model", "tokens/s", "ms a step", *phases, "peak memory", "wall clock"]
    told = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    table = Table([columns[i] for i in told], [[line[i] for i in told] for line in lines])
    note = "Tokens a second are of training steps alone, the median of the log's lines"
    note += "; a step's time is the mean, with the share of each phase." if phases else "."
    return [table, note] if lines else []


def _models_and_text(config: Config) -> str:
    demo = config.teacher == "demo"
    teacher = "the demo's own" if demo else config.teacher
    student = config.student or f"layers of the teacher ({config.student_layers})"
    share = f", {config.data_share:.0%} of its training part, drawn anew for each seed" if config.data_share < 1 else ""
    all_of_it = "; the teacher learned from all of it" if demo else ""
    return f"Teacher: {teacher}. Student: {student}. The students' text: {config.data}{share}{all_of_it}."


def recipe(config: Config) -> str:
    """The settings that made the student, in one line."""
    temperature = f"T {config.temperature:g}"
    if config.temperature_end is not None:
        temperature += f" to {config.temperature_end:g}, {config.temperature_schedule}"
    loss = f"{config.kd_weight:g} T^2 KL ({temperature}, {config.divergence}) + {config.lm_weight:g} CE"
    forms = {
        "layerwise": f" ({config.layerwise_loss})",
        "attention": f" ({config.attention_loss})",
        "routing_feature": f" (over {config.routing_over}; {config.load_balance_weight:g} load_balance)",
    }
    for name in COMPONENTS[2:]:
        if weight := getattr(config, f"{name}_weight"):
            loss += f" + {weight:g} {name}{forms.get(name, '')}"
    loss += f", curriculum {config.curriculum}" * (config.curriculum != "none")
    loss += f", balanced by {config.balance}" * (config.balance != "none")
    steps = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs:g} epochs"
    steps += f" ({config.baseline_steps} without the teacher)" * bool(config.baseline_steps)
    return (
        f"{loss}; {steps} of {config.batch_size} x {config.grad_accum} sequences of {config.seq_len} tokens; AdamW, "
        f"peak learning rate {config.lr:g}, {config.schedule}, {config.warmup_steps} steps of warm-up, weight decay "
        f"{config.weight_decay:g}"
    )


def made_with(run: Run) -> str:
    """Versions, and on a second line device, precision and seeds."""
    first, last = run.config.seed, run.config.seed + run.config.seeds - 1
    seeds = f"seed {first}" if first == last else f"seeds {first} to {last}"
    versions = ", ".join(f"{name} {version}" for name, version in run.teacher.versions.items())
    return f"{versions};\n{run.teacher.device}, {run.teacher.precision}; {seeds}"


def settings(config: Config) -> Table:
    """Every setting of the run."""
    values = dataclasses.asdict(config).items()
    return Table(["setting", "value"], [[name, "" if value is None else str(value)] for name, value in values])
