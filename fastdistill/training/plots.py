"""The curves of a run, drawn from its logs: each a panel of its own; some of them side by side as one image."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from fastdistill.training.results import expectation, phases_of, step_times
from fastdistill.training.run_files import BASELINE, DISTILLED, Run, Stage
from fastdistill.training.trajectory import AT_MOST_LEFT

_RECIPES = {BASELINE: ("cross-entropy only", "tab:orange"), DISTILLED: ("distilled", "tab:blue")}
_PARTS = ("tab:purple", "tab:green", "tab:gray", "tab:olive", "tab:cyan", "tab:pink", "tab:brown", "tab:red")

# Inches: a panel, its margins for labels and legend, and what stands below all panels of an image.
_WIDTH, _HEIGHT = 5.0, 3.85
_LEFT, _BOTTOM, _FOOTER = 0.75, 1.1, 0.3
_POINTS = 400

_T = TypeVar("_T")


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    draw: Callable[[Axes], object]
    x_label: str = "optimizer step"


@dataclass(frozen=True)
class Plot:
    """Panels that belong together."""

    name: str
    panels: Sequence[Panel]

    @property
    def title(self) -> str:
        return "; ".join(panel.title for panel in self.panels)


def plots(run: Run) -> list[Plot]:
    """Those for which the logs hold something: `curves` always; `shares`, `optimizer` and `speed`."""
    seeds = {stage.seed for stage in run.evaluated}
    thin = " (thin: further seeds)" if len(seeds) > 1 else ""
    curves = [Panel(f"held-out loss{thin}", lambda axes: _held_out_loss(axes, run))]
    trained = [stage for stage in run.stages if len(stage.train) > 1]
    if not trained:
        return [Plot("curves", curves)]
    stage = next((stage for stage in trained if stage.recipe == DISTILLED), trained[0])
    curves.append(Panel(f"weighted loss components, {stage.name}", lambda axes: _components(axes, stage)))
    shares = [Panel(f"shares of the loss, {stage.name}", lambda axes: _shares(axes, stage))]
    optimizer = [
        Panel("learning rate", lambda axes: _learning_rate(axes, stage)),
        Panel(f"gradient norm{thin}", lambda axes: _by_recipe(axes, trained, "gradient_norm", "norm before clipping")),
    ]
    speed = [
        Panel(f"time of a step, {stage.name}", lambda axes: _step_time(axes, stage)),
        Panel(f"speed{thin}", lambda axes: _by_recipe(axes, trained, "tokens_per_second", "tokens a second")),
    ]
    return [
        Plot("curves", curves),
        *([Plot("shares", shares)] if len(_component_names(stage)) > 1 else []),
        Plot("optimizer", optimizer),
        Plot("speed", speed if len(step_times(stage)) > 1 else speed[1:]),
    ]


def png(plot: Plot, footer: str) -> bytes:
    """The panels side by side, with `footer` in small letters below them and in the file's description."""
    count = len(plot.panels)
    figure = Figure((_WIDTH * count, _HEIGHT + _FOOTER))
    for i, panel in enumerate(plot.panels):
        _draw(panel, figure, left=i * _WIDTH, bottom=_FOOTER)
    figure.text(0.1 / (_WIDTH * count), 0.02, footer, fontsize=6.5, color="dimgray", parse_math=False)
    return _saved(figure, "png", {"Title": plot.title, "Description": footer})


def svg(panel: Panel) -> bytes:
    """One panel alone."""
    figure = Figure((_WIDTH, _HEIGHT))
    _draw(panel, figure)
    return _saved(figure, "svg", {"Title": panel.title, "Date": None})


def _saved(figure: Figure, form: str, metadata: dict[str, str | None]) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastdistill"}):  # otherwise its ids are random
        figure.savefig(file, format=form, dpi=120, metadata=metadata)
    return file.getvalue()


def _draw(panel: Panel, figure: Figure, left: float = 0.0, bottom: float = 0.0) -> None:
    """Draw a panel with its lower left corner there, in inches."""
    # Placed by hand: a layout engine would draw everything twice.
    inches = (left + _LEFT, bottom + _BOTTOM, _WIDTH - _LEFT - 0.15, _HEIGHT - _BOTTOM - 0.35)
    width, height = figure.get_size_inches()
    axes = figure.add_axes((inches[0] / width, inches[1] / height, inches[2] / width, inches[3] / height))
    panel.draw(axes)
    axes.set_title(panel.title, fontsize=9.5, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=9)
    axes.yaxis.label.set_fontsize(9)
    if axes.get_xscale() == "linear":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:  # below, where it covers no curve
        below = -(_BOTTOM - 0.05) / inches[3]
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, below), ncols=3, frameon=False, fontsize=8, borderpad=0)


def _held_out_loss(axes: Axes, run: Run) -> None:
    for stage, style in _styled(run.evaluated):
        losses = [evaluation.loss for evaluation in stage.evaluations.values()]
        marker = "." if len(losses) <= 50 else None
        axes.plot(list(stage.evaluations), _finite(losses), marker=marker, **style)
    teacher = run.teacher.evaluation.loss
    if run.has_one_tokenizer:
        axes.axhline(teacher, color="black", linestyle="--", linewidth=1, label=f"teacher {teacher:.3f}")
        stage = next((stage for stage in run.evaluated if stage.recipe == DISTILLED), run.evaluated[0])
        expected, steps = expectation(run), stage.total_steps
        if expected and steps:
            edges = [expected.upper(share) for share in AT_MOST_LEFT]
            shares = [share * steps for share in AT_MOST_LEFT]
            axes.fill_between(shares, expected.goal, edges, color="black", alpha=0.06, linewidth=0, label="expected")
    axes.set_ylabel("nats a token")


def _component_names(stage: Stage) -> list[str]:
    """Those of any line of the log, since a curriculum lets some come in later."""
    return list(dict.fromkeys(name for record in stage.train for name in record["components"]))


def _of_component(stage: Stage, name: str, field: str) -> list[float]:
    """Line by line; 0 before it came in."""
    return [record["components"].get(name, {}).get(field, 0.0) for record in stage.train]


def _components(axes: Axes, stage: Stage) -> None:
    for name, color in zip(_component_names(stage), cycle(_PARTS), strict=False):
        axes.plot(
            _steps(stage.steps), _means(_of_component(stage, name, "weighted")), color=color, label=f"{name}_loss"
        )
    axes.set_ylim(0, None)
    axes.set_ylabel("loss times its weight")


def _shares(axes: Axes, stage: Stage) -> None:
    names = _component_names(stage)
    shares = [_means([100 * share for share in _of_component(stage, name, "share")]) for name in names]
    _stack(axes, _steps(stage.steps), shares, [f"{name}_loss" for name in names])
    axes.set_ylim(0, 100)
    axes.set_ylabel("% of the total")


def _learning_rate(axes: Axes, stage: Stage) -> None:
    rates = [record["learning_rate"] for record in stage.train]
    axes.plot(_steps(stage.steps), _means(rates), color="black", linewidth=1.2)
    axes.set_ylim(0, None)
    axes.set_ylabel("learning rate")


def _by_recipe(axes: Axes, stages: Sequence[Stage], field: str, label: str) -> None:
    for stage, style in _styled(stages):
        axes.plot(_steps(stage.steps), _means([record[field] for record in stage.train]), **style)
    axes.set_ylim(0, None)
    axes.set_ylabel(label)


def _step_time(axes: Axes, stage: Stage) -> None:
    timed, phases = step_times(stage), phases_of(stage)
    times = [_means([1000 * line.seconds.get(phase, 0.0) / line.steps for line in timed]) for phase in phases]
    _stack(axes, _steps([line.step for line in timed]), times, phases)
    axes.set_ylim(0, None)
    axes.set_ylabel("ms")


def _stack(axes: Axes, steps: list[int], heights: list[list[float]], labels: list[str]) -> None:
    axes.stackplot(steps, heights, labels=labels, colors=_PARTS, alpha=0.75, linewidth=0)
    axes.margins(x=0)


def _styled(stages: Sequence[Stage]) -> Iterable[tuple[Stage, dict[str, Any]]]:
    """Each stage with its recipe's colour; the first of a recipe is named, and the other seeds are thinner."""
    seen = set()
    for stage in stages:
        label, color = _RECIPES[stage.recipe]
        first = stage.recipe not in seen
        seen.add(stage.recipe)
        yield stage, {"color": color, "linewidth": 1.5 if first else 0.8, "label": label if first else None}


def _steps(lines: Sequence[int]) -> list[int]:
    """The steps at which `_means` stand: the last of each group."""
    return [group[-1] for group in _groups(lines)]


def _means(lines: Sequence[float]) -> list[float]:
    """A curve over the lines of a log; what is not finite becomes a gap in it."""
    return _finite(sum(group) / len(group) for group in _groups(lines))


def _groups(lines: Sequence[_T]) -> list[Sequence[_T]]:
    """Neighbouring lines together, as few as make no more than `_POINTS` groups: more points than that are not seen."""
    size = math.ceil(len(lines) / _POINTS)
    return [lines[first : first + size] for first in range(0, len(lines), size)]


def _finite(values: Iterable[float]) -> list[float]:
    return [value if math.isfinite(value) else math.nan for value in values]
