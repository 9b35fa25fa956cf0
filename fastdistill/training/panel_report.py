"""`fastdistill evaluate`: the models side by side as tables, curves and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

import fastdistill
from fastdistill.training import plots, report_html, report_markdown
from fastdistill.training.command_line import Parser
from fastdistill.training.config import UsageError
from fastdistill.training.evaluate import perplexity
from fastdistill.training.panel import Bucket, Comparison, Settings, compare
from fastdistill.training.plots import Plot
from fastdistill.training.report import strict
from fastdistill.training.report_parts import Section, Table
from fastdistill.training.results import Row, gaps_closed
from fastdistill.training.whole import write_file

_COLORS = {"teacher": "black", "untrained student": "tab:gray", "student": "tab:blue"}


def main(argv: Sequence[str]) -> int:
    """0 when the models were measured and what was asked for is written, 2 for what cannot be done as asked."""
    try:
        parser = Parser(
            prog="fastdistill evaluate", description="Measure a student on held-out text, beside its teacher."
        )
        parser.add_argument("student", help="model folder, hub name or .gguf file")
        parser.add_fields(Settings)
        settings = Settings(**parser.flags(argv))
        output = Path(settings.output) if settings.output else None
        if output:
            output.mkdir(parents=True, exist_ok=True)
        comparison = compare(settings, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        drawn = curves(comparison)
        shown = sections(comparison, drawn if output else [])
        print(report_markdown.page(shown))
        if output:
            write(output, comparison, drawn, shown)
            print(f"Kept in {output / 'evaluation.html'}, and in evaluation.md, evaluation.json and images beside it")
    except (UsageError, OSError) as error:
        print(f"fastdistill evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def write(output: Path, comparison: Comparison, drawn: Sequence[Plot], shown: Sequence[Section]) -> None:
    """All files, each whole. In the JSON what is not finite is named, as in a run's results.json."""
    for plot in drawn:
        write_file(output / f"{plot.name}.png", plots.png(plot, made_with()))
    settings = dataclasses.asdict(comparison.settings)
    table = Table(
        ["setting", "value"], [[name, "" if value is None else str(value)] for name, value in settings.items()]
    )
    write_file(output / "evaluation.html", report_html.page(shown[0].title, shown, table))
    write_file(output / "evaluation.md", report_markdown.page(shown))
    write_file(output / "evaluation.json", json.dumps(strict(numbers(comparison)), indent=2, allow_nan=False) + "\n")


def numbers(comparison: Comparison) -> dict[str, Any]:
    """Everything, for programs."""
    panels = [
        dataclasses.asdict(panel) | {"perplexity": perplexity(panel.evaluation.loss), "gap_closed": closed}
        for panel, closed in zip(comparison.panels, closed_gaps(comparison), strict=True)
    ]
    return dataclasses.asdict(comparison) | {"panels": panels, "made_with": made_with()}


def closed_gaps(comparison: Comparison) -> list[float | None]:
    """How much of the way in perplexity from the untrained student to its teacher each model has come."""
    if not (comparison.settings.untrained and comparison.one_tokenizer):
        return [None] * len(comparison.panels)
    # Losses a token are of the same tokens here, whatever bits a byte say beside them.
    evaluations = [dataclasses.replace(panel.evaluation, bits_per_byte=None) for panel in comparison.panels]
    return gaps_closed([Row("", None, evaluation) for evaluation in evaluations])


def made_with() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"fastdistill {fastdistill.__version__}, torch {torch.__version__}, {device}"


def sections(comparison: Comparison, drawn: Sequence[Plot]) -> list[Section]:
    """What is to be read, in its order."""
    found = [
        Section(
            f"{comparison.settings.student} on {comparison.settings.data}",
            [_quality(comparison), _protocol(comparison), *comparison.notes],
        ),
        Section("By how much was read before", [_buckets(comparison, "by_place", "tokens before", "d"), *drawn[:1]]),
        Section("By the teacher's entropy", [_buckets(comparison, "by_entropy", "nats", "g"), *drawn[1:]]),
        Section("Tasks of lm-evaluation-harness", [_tasks(comparison)]),
        Section("Size and speed", [_footprints(comparison), _measured(comparison)]),
    ]
    return [section for section in found if any(not isinstance(p, Table) or p.rows for p in section.parts)]


def _quality(comparison: Comparison) -> Table:
    columns: dict[str, Callable[[Any], tuple[float | None, str]]] = {
        "loss": lambda e: (e.loss, ".4f"),
        "perplexity": lambda e: (perplexity(e.loss), ".3f"),
        "bits per byte": lambda e: (e.bits_per_byte, ".4f"),
        "KL to teacher": lambda e: (e.kl, ".4f"),
        "top-1": lambda e: (e.top1_agreement, ".1%"),
        "top-5": lambda e: (e.top5_overlap, ".1%"),
        "shared mass": lambda e: (e.shared_mass, ".1%"),
    }
    lines = []
    for panel, closed in zip(comparison.panels, closed_gaps(comparison), strict=True):
        cells = [_shown(*show(panel.evaluation)) for show in columns.values()]
        lines.append([panel.name, *cells, _shown(panel.word_perplexity, ".1f"), _shown(closed, ".1%")])
    return _without_empty(["model", *columns, "word perplexity", "gap closed"], lines)


def _protocol(comparison: Comparison) -> str:
    settings, evaluation = comparison.settings, comparison.panels[-1].evaluation
    again = comparison.seq_len - comparison.stride
    text = (
        f"Loss: mean cross-entropy in nats over {comparison.tokens:,} tokens of {comparison.documents:,} documents "
        f"({settings.part}), each predicted once, in rows of {comparison.seq_len} tokens ({settings.packing}) of which "
        f"up to {again} are read again as context. Perplexity is its exp; word perplexity is exp of the nats of all "
        f"tokens over {comparison.words:,} words, split at white space; bits per byte are of the bytes of the tokens "
        "predicted. The first token of a document is not predicted unless the tokenizer begins a text by itself"
        + (", or the document before is seen" if settings.packing == "stream" else "")
        + ", its end is."
    )
    if comparison.settings.teacher:
        over = f" over {evaluation.compared or 0:,} positions" if evaluation.compared != evaluation.tokens else ""
        text += (
            f" Against the teacher, at temperature 1{over}: KL(teacher || student) in nats; how often the most "
            "probable token is the same; how many of the teacher's five most probable are among the student's; and the "
            "probability that both give the same tokens, sum min(p_s, p_t)."
        )
    return text


def _buckets(comparison: Comparison, which: str, key: str, form: str) -> Table:
    """A line for each bucket of the student's, and the models' columns beside each other."""
    models = {panel.name: {b.low: b for b in getattr(panel, which)} for panel in comparison.panels}
    lows = sorted({low: None for found in models.values() for low in found})
    columns, lines = [key, "tokens"], []
    for name in models:
        columns += [f"loss, {name}"]
    columns += ["KL, student", "top-1, student"]
    for low in lows:
        own = models["student"].get(low)
        high = next(b.high for found in models.values() for b in [found.get(low)] if b)
        line = [_range(low, high, form), f"{own.tokens or own.compared:,}" if own else ""]
        line += [_shown(found[low].loss if low in found else None, ".3f") for found in models.values()]
        lines.append([*line, *([_shown(own.kl, ".3f"), _shown(own.top1_agreement, ".1%")] if own else ["", ""])])
    return _without_empty(columns, lines)


def _range(low: float, high: float, form: str) -> str:
    if form == "d":
        return (
            f"{low:.0f}" if high == low + 1 else f"{low:.0f} to {high - 1:.0f}" if high < math.inf else f"{low:.0f} on"
        )
    return f"{low:g} to {high:g}" if high < math.inf else f"{low:g} on"


def _tasks(comparison: Comparison) -> Table:
    """A line for each task and metric; a standard error stands beside what it is of."""
    models = [panel.tasks for panel in comparison.panels]
    lines = []
    for task, found in models[-1].items():
        for metric in (name for name in found if "_stderr" not in name):
            cells = [_score(scores.get(task, {}), metric) for scores in models]
            lines.append([f"{task}, {metric.removesuffix(',none')}", *cells])
    return Table(["task", *(panel.name for panel in comparison.panels)], lines)


def _score(scores: dict[str, float], metric: str) -> str:
    error = scores.get(metric.replace(",", "_stderr,", 1))
    return "" if metric not in scores else f"{scores[metric]:.4f}" + (f" ± {error:.4f}" if error else "")


def _footprints(comparison: Comparison) -> Table:
    columns = ["model", "parameters", "weights, MB", "read, tokens/s", "written, tokens/s", "memory of a pass, MB"]
    lines = []
    for panel in comparison.panels:
        f = panel.footprint
        lines.append(
            [
                f"{panel.name}: {panel.model}",
                f"{f.parameters:,}",
                f"{f.weight_bytes / 1e6:,.1f}",
                f"{f.read_per_second:,.0f}",
                f"{f.written_per_second:,.1f}",
                f"{f.peak_bytes / 1e6:,.1f}",
            ]
        )
    return Table(columns, lines)


def _measured(comparison: Comparison) -> str:
    return (
        f"Read: a forward pass over rows of {comparison.seq_len} tokens, {comparison.settings.batch_size} at a time, "
        "and the prediction after each row. Written: greedily, one row, with a cache. Each after a run that is not "
        f"timed, the median of several. Memory: the most that such a pass allocates beside the weights. {made_with()}."
    )


def _without_empty(columns: list[str], lines: list[list[str]]) -> Table:
    """Without the columns in which no model has anything."""
    told = [i for i in range(len(columns)) if any(line[i] for line in lines)]
    return Table([columns[i] for i in told], [[line[i] for i in told] for line in lines])


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form) if abs(value) < 1e7 else f"{value:.4g}"


def curves(comparison: Comparison) -> list[Plot]:
    """Loss by place, and with a teacher the KL and agreement by its entropy."""
    place = [
        plots.Panel(
            "loss by place", lambda axes: _draw(axes, comparison, "by_place", "loss"), "tokens read before, from"
        )
    ]
    if not comparison.settings.teacher:
        return [Plot("by-place", place)]
    place.append(
        plots.Panel(
            "KL to the teacher by place",
            lambda axes: _draw(axes, comparison, "by_place", "kl"),
            "tokens read before, from",
        )
    )
    entropy = [
        plots.Panel(
            title,
            lambda axes, field=field: _draw(axes, comparison, "by_entropy", field),
            "teacher's entropy in nats, from",
        )
        for title, field in (
            ("KL to the teacher by its entropy", "kl"),
            ("top-1 agreement by the teacher's entropy", "top1_agreement"),
        )
    ]
    return [Plot("by-place", place), Plot("by-entropy", entropy)]


def _draw(axes: Axes, comparison: Comparison, which: str, field: str) -> None:
    """A point for each bucket, at its lower edge."""
    for panel in comparison.panels:
        found: list[Bucket] = [b for b in getattr(panel, which) if getattr(b, field) is not None]
        if panel.name == "teacher" and field != "loss":
            continue
        axes.plot(
            [bucket.low for bucket in found], [getattr(bucket, field) for bucket in found], marker="o", markersize=4,
            color=_COLORS[panel.name], label=panel.name,
        )  # fmt: skip
    if which == "by_place":
        axes.set_xscale("symlog", base=4)
        axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylabel("share" if field == "top1_agreement" else "nats a token")
