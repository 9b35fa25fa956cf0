"""fastdistill's training step beside an eager loop and transformers' Trainer: time, memory, batch (docs/train-step.md):

python -m bench.train_step measure docs/train-step.json
python -m bench.train_step draw docs/train-step.json docs/train-step.png
python -m bench.train_step table docs/train-step.json

A step is teacher, student, loss, backward, clipping and AdamW, in float32, on a GPU if there is one: half T^2 KL and
half cross-entropy, of random GPT-2s, the teacher twice as deep. Every run is of two steps from a new optimizer, the
second of which counts. Memory is all that tensors take at once, weights and Adam's state with them. `measure` takes ten
minutes and 6 GB.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench import kept
from bench.attention import MB, quartiles
from bench.gpu_largest_batch import GIGABYTES, TEMPERATURE, eager_loss, largest, make_batch
from bench.machine import machine
from bench.presets import Case, markdown
from fastdistill.testing import DEVICE
from fastdistill.training import engine
from fastdistill.training.blocks import Batch
from fastdistill.training.clock import Clock
from fastdistill.training.config import Config
from fastdistill.training.estimate import CPU, estimate
from fastdistill.training.hf_trainer import DistillationTrainer
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.memory import most_allocated
from fastdistill.training.objective import DistillationModule
from fastdistill.training.pairing import ONE_TOKENIZER
from fastdistill.training.teacher import Teacher

LEARNING_RATE, BETAS, LARGEST_NORM = 1e-4, (0.9, 0.95), 1.0
"""Of AdamW, without decay and fused, and of the clipping: what train.py has, given to all."""

STEPS = 2
"""Of a run: the first makes Adam's state, the second is measured."""

ROUNDS = 5

LARGE = partial(Case, "gpt2", 256, 4, 50257, seq_len=128)
"""GPT-2's vocabulary, whose logits are most of the memory."""

SMALL = partial(Case, "gpt2", 128, 2, 1024, seq_len=128)
"""The demo's vocabulary and depth, whose logits are little."""

TIMED = [LARGE(batch_size=4), LARGE(batch_size=8), SMALL(batch_size=8)]

LAWS = [[LARGE(batch_size=rows) for rows in (4, 8, 16)], [SMALL(batch_size=rows) for rows in (192, 256, 320)]]
"""Cases of which the first and second give bytes by rows, and the third is to confirm them. With the small vocabulary
those whose tokens fill two chunks of `linear_softmax_kl`: before that, a row takes more."""

PHASES = ("teacher", "student", "loss", "backward", "optimizer")


class Run(NamedTuple):
    seconds: list[dict[str, float]]
    """Of each step, by phase."""
    loss: float
    """The mean of the steps."""


def eager_loop(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, steps: int) -> Run:
    """The loop as it is written by hand."""
    optimizer = torch.optim.AdamW(student.parameters(), LEARNING_RATE, BETAS, weight_decay=0.0, fused=True)
    ids, clock, seconds, losses = batch.student.input_ids, Clock(student.device), [], []
    for _ in range(steps):
        clock.start()
        with torch.no_grad():
            teacher_logits = teacher(input_ids=ids, use_cache=False).logits
        clock.mark("teacher")
        logits = student(input_ids=ids, use_cache=False).logits
        clock.mark("student")
        loss = eager_loss(logits, teacher_logits, ids)
        clock.mark("loss")
        loss.backward()
        clock.mark("backward")
        nn.utils.clip_grad_norm_(student.parameters(), LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimizer")
        seconds.append(clock.read())
        losses.append(loss.item())
    return Run(seconds, sum(losses) / steps)


def fastdistill_loop(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, steps: int) -> Run:
    """train.py's step, without what it does beside: data, guards, its log."""
    config = Config(
        temperature=TEMPERATURE, kd_weight=0.5, lm_weight=0.5, layerwise_weight=0.0,
        lr=LEARNING_RATE, weight_decay=0.0, clip=LARGEST_NORM,
    )  # fmt: skip
    layer_map = LayerMap.between("uniform", student, teacher, None)
    module = DistillationModule.of(config, student, teacher, layer_map, ONE_TOKENIZER)
    teaches, optimizer = Teacher(teacher), engine.make_optimizer(module, config)
    module.clock = clock = Clock(student.device)
    seconds, losses = [], []
    for step in range(steps):
        clock.start()
        module.begin(step, steps)
        counts = module.count([batch])
        states = teaches(batch.teacher, module.of_teacher)
        clock.mark("teacher")
        loss = module(batch, states, counts).total
        engine.backward(loss, 1, None)
        clock.mark("backward")
        norm = engine.clip_gradients(module, optimizer, config.clip, None)
        engine.step_if_finite(optimizer, config.lr, norm, None)
        clock.mark("optimizer")
        seconds.append(clock.read())
        losses.append(loss.item())
    return Run(seconds, sum(losses) / steps)


class EagerTrainer(Trainer):
    """A Trainer with the loss that is written by hand."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, **others: Any):
        super().__init__(*args, **others)
        self.teacher = teacher

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        ids = inputs["input_ids"]
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids=ids, use_cache=False).logits
        return eager_loss(model(input_ids=ids, use_cache=False).logits, teacher_logits, ids)


class StepTimes(TrainerCallback):
    """From where a Trainer begins a step, its batch at hand, to where it ends it."""

    def __init__(self, clock: Clock):
        self.clock, self.seconds = clock, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.mark("step")
        self.seconds.append(self.clock.read())


def trainer_loop(
    make: Callable[..., Trainer], student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, steps: int
) -> Run:
    """A step an epoch, which has the batch's rows in an order of its own; nothing is logged, saved or evaluated."""
    times = StepTimes(Clock(student.device))
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=len(batch.targets), max_grad_norm=LARGEST_NORM,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", optim="adamw_torch_fused", weight_decay=0.0,
            adam_beta1=BETAS[0], adam_beta2=BETAS[1], use_cpu=DEVICE == "cpu", dataloader_pin_memory=DEVICE != "cpu",
            logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        rows = [{"input_ids": ids, "labels": ids} for ids in batch.student.input_ids.cpu()]
        trainer = make(student, arguments, teacher=teacher, train_dataset=rows, callbacks=[times])
        trainer.remove_callback(PrinterCallback)
        return Run(times.seconds, trainer.train().training_loss)


EAGER, TRAINER, OURS, OUR_TRAINER = "eager loop", "Trainer", "fastdistill", "DistillationTrainer"

distillation_trainer = partial(
    DistillationTrainer, kd_weight=0.5, lm_weight=0.5, layerwise_weight=0.0, temperature=TEMPERATURE
)

LOOPS: dict[str, Callable[..., Run]] = {
    EAGER: eager_loop,
    TRAINER: partial(trainer_loop, EagerTrainer),
    OURS: fastdistill_loop,
    OUR_TRAINER: partial(trainer_loop, distillation_trainer),
}


def make_models(case: Case, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Student and teacher, the same at each call."""
    torch.manual_seed(0)
    shapes = case.model(case.depth), case.model(2 * case.depth)
    student, teacher = (AutoModelForCausalLM.from_config(shape, dtype=dtype).to(DEVICE) for shape in shapes)
    return student.train(), teacher.eval().requires_grad_(False)


def batch_of(case: Case) -> Batch:
    return make_batch(case.batch_size, case.seq_len, case.vocab_size)


def times(case: Case, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Milliseconds of a run's last step by phase, a round each. The loops take turns."""
    models, batch = {name: make_models(case) for name in LOOPS}, batch_of(case)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOOPS}
    for _ in range(rounds):
        for name, loop in LOOPS.items():
            last = loop(*models[name], batch, STEPS).seconds[-1]
            found[name].append({phase: 1e3 * seconds for phase, seconds in last.items()})
    return found


def peak(name: str, case: Case) -> int:
    """Bytes of all tensors alive at once in a run."""
    gc.collect()  # what an earlier Trainer held would be seen to be freed
    models, batch = make_models(case), batch_of(case)
    weights = sum(parameter.nbytes for model in models for parameter in model.parameters())
    return weights + most_allocated(lambda: LOOPS[name](*models, batch, STEPS), torch.device(DEVICE))


def estimated_rows(case: Case) -> int:
    """The largest batch of fastdistill's step, of models as in `case`, by the estimate of a CPU's memory."""

    def fits(rows: int) -> bool:
        of = case._replace(batch_size=rows)
        return estimate(of.config, of.model(of.depth), of.model(2 * of.depth), CPU).peak <= GIGABYTES * 1e9

    return largest(fits)


def measure() -> dict[str, Any]:
    timed, peaks = [], []
    for case in dict.fromkeys(chain(TIMED, *LAWS)):
        for name in LOOPS:
            peaks.append({"implementation": name, **case._asdict(), "bytes": peak(name, case)})
            print(case, name, f"{peaks[-1]['bytes'] / MB:,.0f} MB", flush=True)
    for case in TIMED:
        for name, ms in times(case, ROUNDS).items():
            timed.append({"implementation": name, **case._asdict(), "ms": ms})
            print(case, name, f"{median(totals(ms)):,.0f} ms", flush=True)
    estimated = [estimated_rows(cases[0]) for cases in LAWS] if DEVICE == "cpu" else []
    return {"machine": machine(), "times": timed, "peaks": peaks, "estimated_rows": estimated}


def by_case(rows: list[dict[str, Any]], field: str) -> dict[Case, dict[str, Any]]:
    """What was measured of each case, by implementation."""
    found: dict[Case, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(Case(*(row[name] for name in Case._fields)), {})[row["implementation"]] = row[field]
    return found


def totals(rounds: Sequence[dict[str, float]]) -> list[float]:
    return [sum(phases.values()) for phases in rounds]


def verdict(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Even where 1 lies within the quartiles of the ratios."""
    lower, _, upper = quartiles(ours, theirs)
    return "slower" if lower > 1 else "faster" if upper < 1 else "even"


def table(results: dict[str, Any]) -> str:
    """Markdown: the tables of docs/train-step.md, in its order, with empty lines between them."""
    here, ms, peaks = results["machine"], by_case(results["times"], "ms"), by_case(results["peaks"], "bytes")
    return "\n\n".join(
        (
            f"{here['gpu'] or here['cpu']}, CPU threads: {here['threads']}, torch {here['torch']}.",
            time_table(ms),
            phase_table(ms),
            memory_table({case: peaks[case] for case in TIMED}),
            law_table(peaks, results["estimated_rows"]),
            losses(ms, peaks),
        )
    )


SIZES = ["vocabulary", "rows"]


def sizes(case: Case) -> list[str]:
    return [f"{case.vocab_size:,}", str(case.batch_size)]


def time_table(cases: dict[Case, dict[str, Any]]) -> str:
    """Medians and quartiles, of times and of ratios of one round to the eager loop."""
    lines = [["", *SIZES, "ms a step", "of the eager loop", "beside it"]]
    for case, measured in cases.items():
        eager = totals(measured[EAGER])
        for name, rounds in measured.items():
            lower, middle, upper = quartiles(ms := totals(rounds), [1.0] * len(rounds))
            line = [name, *sizes(case), f"{middle:,.0f} ({lower:,.0f} to {upper:,.0f})"]
            if name == EAGER:
                lines.append([*line, "", ""])
                continue
            lower, middle, upper = quartiles(ms, eager)
            lines.append([*line, f"{middle:.2f} ({lower:.2f} to {upper:.2f})", verdict(ms, eager)])
    return markdown(lines, texts=1)


def phase_table(cases: dict[Case, dict[str, Any]]) -> str:
    """Median milliseconds of each phase, of the loops that have them."""
    lines = [["ms", *SIZES, *PHASES]]
    for case, measured in cases.items():
        for name in (EAGER, OURS):
            medians = [f"{median(phases[phase] for phases in measured[name]):,.0f}" for phase in PHASES]
            lines.append([name, *sizes(case), *medians])
    return markdown(lines, texts=1)


def memory_table(cases: dict[Case, dict[str, Any]]) -> str:
    lines = [[*SIZES, *(f"{name}, MB" for name in LOOPS), f"{OURS} / {EAGER}"]]
    for case, measured in cases.items():
        cells = [f"{measured[name] / MB:,.0f}" for name in LOOPS]
        lines.append([*sizes(case), *cells, f"{measured[OURS] / measured[EAGER]:.2f}"])
    return markdown(lines, texts=0)


class Law(NamedTuple):
    """Bytes of a step by its rows."""

    fixed: float
    a_row: float
    error: float
    """Of what it says of a third number of rows, relative to what was measured."""

    @classmethod
    def of(cls, points: Sequence[tuple[int, int]]) -> Law:
        """Through the first two of three `(rows, bytes)`."""
        (fewer, least), (more, most), (rows, measured) = points
        a_row = (most - least) / (more - fewer)
        fixed = least - a_row * fewer
        return cls(fixed, a_row, (fixed + a_row * rows) / measured - 1)

    @property
    def largest(self) -> int:
        """Rows whose step takes no more than 16 GB."""
        return int((GIGABYTES * 1e9 - self.fixed) // self.a_row)


def laws(peaks: dict[Case, dict[str, Any]]) -> list[tuple[list[Case], dict[str, Law]]]:
    return [
        (cases, {name: Law.of([(case.batch_size, peaks[case][name]) for case in cases]) for name in LOOPS})
        for cases in LAWS
    ]


def law_table(peaks: dict[Case, dict[str, Any]], estimated: Sequence[int]) -> str:
    """Beside the laws what is estimated of fastdistill's steps; the lesser number of rows is compared."""
    heads = ["", SIZES[0], "rows measured", "MB and", "MB a row", "off at the third", f"rows in {GIGABYTES} GB"]
    lines = [[*heads, "rows, estimated", "of the eager loop's"]]
    for (cases, found), fewer in zip_longest(laws(peaks), estimated):
        for name, law in found.items():
            rows = ", ".join(str(case.batch_size) for case in cases)
            bounds = [law.largest] + [fewer] * (name in (OURS, OUR_TRAINER) and fewer is not None)
            numbers = [f"{law.fixed / MB:,.0f}", f"{law.a_row / MB:,.1f}", f"{law.error:+.2%}", f"{law.largest:,}"]
            numbers.append(f"{fewer:,}" if len(bounds) > 1 else "")
            of_eager = f"{min(bounds) / found[EAGER].largest:.2f}"
            lines.append([name, f"{cases[0].vocab_size:,}", rows, *numbers, of_eager])
    return markdown(lines, texts=1)


def losses(ms: dict[Case, dict[str, Any]], peaks: dict[Case, dict[str, Any]]) -> str:
    """Where fastdistill takes more time, by `verdict`, or memory than the eager loop."""

    def where(cases: list[Case]) -> str:
        of = [f"vocabulary {case.vocab_size:,}, {case.batch_size} rows" for case in cases]
        return "; ".join(of) or "nowhere here"

    slower = [case for case, each in ms.items() if verdict(totals(each[OURS]), totals(each[EAGER])) == "slower"]
    larger = [case for case, each in peaks.items() if each[OURS] > each[EAGER]]
    return f"- fastdistill is slower than the eager loop: {where(slower)}.\n- It holds more: {where(larger)}."


def draw(results: dict[str, Any], path: Path) -> None:
    """Phases of a step, and memory by rows with the laws that go on from it."""
    ms, peaks = by_case(results["times"], "ms"), by_case(results["peaks"], "bytes")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    bars = [(case, name) for case in TIMED for name in LOOPS]
    bottom = [0.0] * len(bars)
    for phase in (*PHASES, "step"):
        heights = [median(each.get(phase, 0.0) for each in ms[case][name]) for case, name in bars]
        left.barh(range(len(bars)), heights, left=bottom, label="not divided" if phase == "step" else phase)
        bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    names = [f"{name}, {case.vocab_size:,}, {case.batch_size}" for case, name in bars]
    left.set_yticks(range(len(bars)), names, fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("ms a step; vocabulary and rows at the left")
    left.legend(fontsize=7)
    cases, found = laws(peaks)[0]
    for (name, law), style in zip(found.items(), ("-r", "-k", "-b", ":c"), strict=True):
        right.plot([case.batch_size for case in cases], [peaks[case][name] / MB for case in cases], f"o{style[1]}")
        ends = [cases[0].batch_size, 1.2 * cases[-1].batch_size]
        right.plot(ends, [(law.fixed + law.a_row * rows) / MB for rows in ends], style, label=name)
    right.set_xlabel(f"rows of {cases[0].seq_len} tokens, vocabulary {cases[0].vocab_size:,}")
    right.set_ylabel("peak, MB")
    right.set_ylim(bottom=0)
    right.grid(alpha=0.3)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(kept.main(__doc__, measure=measure, table=table, draw=draw))
