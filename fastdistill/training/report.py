"""The end of a run on one page: a table of teacher and students side by side, the curves, what produced them."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

import fastdistill
from fastdistill.training.config import Config
from fastdistill.training.evaluate import Evaluation, perplexity
from fastdistill.training.monitor import read_log

BEST, LAST = "best checkpoint", "last"


@dataclass(frozen=True)
class Row:
    """One model on the held-out text; `seed` is None where it is the same for all, `step` where it has none."""

    name: str
    seed: int | None
    evaluation: Evaluation
    step: int | None = None


def write(output: Path, config: Config, rows: Sequence[Row], *, seconds: float) -> None:
    """Write `report.md`, `results.json` and `curves.png` into `output`."""
    plot(output, config, rows)
    versions = {
        "fastdistill": fastdistill.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    results = {
        "config": dataclasses.asdict(config),
        "versions": versions,
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(row) | {"perplexity": perplexity(row.evaluation.loss)} for row in rows],
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    text = [
        "# Teacher, untrained student and students side by side",
        table(rows),
        comparison(rows),
        _protocol(config, rows),
        _text_seen(config),
        "![held-out loss](curves.png)",
        f"Recipe: {recipe(config)}. {seconds:.0f} s; " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".",
    ]
    (output / "report.md").write_text("\n\n".join(part for part in text if part) + "\n")


def _protocol(config: Config, rows: Sequence[Row]) -> str:
    """How the numbers in the table were measured."""
    student = rows[-1].evaluation
    before = "before it" if config.packing == "stream" else "before it in its document, whose first has none"
    text = (
        f"Held-out loss: mean cross-entropy in nats over {student.tokens:,} held-out tokens, each predicted once from "
        f"at most {config.seq_len - 1} {before}; perplexity is its exp. KL(teacher || student) and top-1 agreement "
        "with the teacher are at temperature 1. A best checkpoint is the one with the lowest held-out loss: it is "
        "chosen on the text it is reported on."
    )
    if student.bits_per_byte is None or student.compared is None:
        return text
    return text + (
        " Teacher and student have different tokenizers: loss and perplexity are per token of their own and cannot be "
        f"compared between them, bits per byte can. KL and agreement are over {student.compared:,} positions, and over "
        "the strings that both tokenizers have, the others taken together."
    )


def _text_seen(config: Config) -> str:
    share = f", {config.data_share:.0%} of its training part, drawn anew for each seed" if config.data_share < 1 else ""
    teacher = "; the teacher learned from all of it" if config.teacher == "demo" else ""
    return f"The students' text: {config.data}{share}{teacher}."


def table(rows: Sequence[Row]) -> str:
    """Markdown table of the rows."""
    columns = ["model", "seed", "step", "held-out loss", "perplexity", "KL to teacher", "top-1 agreement"]
    if rows[0].evaluation.bits_per_byte is not None:
        columns.append("bits per byte")
    lines = [f"| {' | '.join(columns)} |", f"| --- |{' ---: |' * (len(columns) - 1)}"]
    for row in rows:
        e = row.evaluation
        cells = [
            row.name,
            "" if row.seed is None else str(row.seed),
            "" if row.step is None else str(row.step),
            f"{e.loss:.3f}",
            f"{perplexity(e.loss):.2f}",
            "" if e.kl is None else f"{e.kl:.3f}",
            "" if e.top1_agreement is None else f"{e.top1_agreement:.1%}",
        ]
        if e.bits_per_byte is not None:
            cells.append(f"{e.bits_per_byte:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def comparison(rows: Sequence[Row]) -> str:
    """Distilled against CE-only, seed by seed, win or not; empty without a baseline."""
    loss = {(row.name, row.seed): row.evaluation.loss for row in rows}
    lines = []
    for seed in sorted({row.seed for row in rows if row.name.startswith("ce-only") and row.seed is not None}):
        at_end, at_best = (loss[f"distilled, {at}", seed] - loss[f"ce-only, {at}", seed] for at in (LAST, BEST))
        lines.append(f"- seed {seed}: {at_end:+.3f} at equal steps, {at_best:+.3f} best checkpoint against best")
    title = "Held-out loss of the distilled student minus that of cross-entropy only (below 0: distillation wins):"
    return "\n".join([title, "", *lines]) if lines else ""


def recipe(config: Config) -> str:
    """The settings that made the student, in one line."""
    loss = f"{config.kd_weight:g} T^2 KL (T {config.temperature:g}, {config.divergence}) + {config.lm_weight:g} CE"
    if config.layerwise_weight:
        loss += f" + {config.layerwise_weight:g} layerwise ({config.layerwise_loss})"
    steps = f"{config.max_steps} steps" if config.max_steps else f"{config.epochs:g} epochs"
    return (
        f"{loss}; {steps} of {config.batch_size} x {config.grad_accum} sequences of {config.seq_len} tokens; AdamW, "
        f"peak learning rate {config.lr:g}, {config.schedule}, {config.warmup_steps} steps of warm-up, weight decay "
        f"{config.weight_decay:g}"
    )


def plot(output: Path, config: Config, rows: Sequence[Row]) -> None:
    """Held-out loss by step for each recipe and seed, the teacher as a line; and the shares of the distilled total."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors = {"ce-only": "tab:orange", "distilled": "tab:blue"}
    for recipe_name, color in colors.items():
        for log in sorted(output.glob(f"seed-*/{recipe_name}/log.jsonl")):
            records = read_log(log, "eval")
            first = log.parent.parent.name == f"seed-{config.seed}"
            label = recipe_name.replace("ce-only", "cross-entropy only") if first else None
            left.plot([r["step"] for r in records], [r["loss"] for r in records], color=color, label=label, marker=".")
    teacher = rows[0].evaluation
    if teacher.bits_per_byte is None:  # with another tokenizer its nats a token are of other tokens
        left.axhline(teacher.loss, color="black", linestyle="--", linewidth=1, label=f"teacher {teacher.loss:.3f}")
    left.set(xlabel="optimizer step", ylabel="nats a token", title="held-out loss")
    left.legend()

    records = read_log(output / f"seed-{config.seed}" / "distilled" / "log.jsonl", "train")
    for name, color in zip(records[0]["components"], ("tab:purple", "tab:green", "tab:gray"), strict=False):
        weighted = [r["components"][name]["weighted"] for r in records]
        right.plot([r["step"] for r in records], weighted, color=color, label=f"{name}_loss")
    right.set(xlabel="optimizer step", title="components of the distilled student's loss, weighted", ylim=(0, None))
    right.legend()
    figure.savefig(output / "curves.png", dpi=120)
    plt.close(figure)
