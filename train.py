"""Distil a causal language model into a smaller one: `python train.py`, `python train.py --help`.

Reads top to bottom: the command, the run (a teacher, then for each seed a student with and without it), the loop.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdistill.training import checkpoint, demo, export, report, run_files
from fastdistill.training.blocks import Blocks, collate
from fastdistill.training.config import Config, UsageError, abandon_output, open_output, parse
from fastdistill.training.data import Cutter, TrainingText, prepare
from fastdistill.training.engine import StopRequest, make_accelerator, make_optimizer, teacher_dtype
from fastdistill.training.evaluate import Evaluation, evaluate
from fastdistill.training.guard import BadStepGuard, FirstStepGuard, TrainingFault
from fastdistill.training.loading import load
from fastdistill.training.models import check_fit
from fastdistill.training.monitor import Monitor
from fastdistill.training.objective import DistillationModule, Teacher, Weights
from fastdistill.training.pairing import Pairing, describe, pair
from fastdistill.training.schedule import learning_rate
from fastdistill.training.sources import Source, open_sources
from fastdistill.training.student import obtain_student


class Stopped(Exception):
    """The run ends before its last step, as it was asked to; all that it needs to go on is saved."""


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is written
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = parse(argv)
        output = open_output(config)
    except UsageError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    try:
        run(config, output)
    except UsageError as error:
        abandon_output(output)
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except TrainingFault as error:
        print(f"train.py: stopped: {error}", file=sys.stderr)
        return 1
    except (Stopped, KeyboardInterrupt) as stop:
        go_on = [os.path.relpath(sys.executable), "train.py", "--resume", "--output-dir", str(output)]
        print(f"\n{stop or 'Interrupted'}. To go on:\n  {shlex.join(go_on)}", file=sys.stderr)
        return 0 if isinstance(stop, Stopped) and config.stop_at else 130
    return 0


def run(config: Config, output: Path) -> None:
    accelerator = make_accelerator(config.precision)
    print(f"fastdistill: {accelerator.device}, mixed precision {accelerator.mixed_precision}; the run is in {output}")

    sources = open_sources(config.data, text_field=config.text_field, streaming=config.streaming)
    for note in chain.from_iterable(source.notes for source in sources):
        print(note)
    teacher_model, teacher_tokenizer = obtain_teacher(config, sources, output, accelerator)
    student_tokenizer = load(config.student)[1] if config.student else teacher_tokenizer
    pairing = pair(student_tokenizer, teacher_tokenizer, config, accelerator.device)
    all_text, held_out = prepare(sources, Cutter(pairing.tokenizers, config.seq_len, config.packing))
    print(describe(pairing, held_out))
    print(f"{all_text.describe()} to learn from, {held_out.num_targets():,} tokens held out")

    check_fit(teacher_model, config, "teacher")
    teacher = Teacher(teacher_model, accelerator.device)
    itself = {"batch_size": config.batch_size, "teacher": Teacher(teacher_model)}
    teacher_alone = evaluate(teacher_model, held_out.side(-1), pairing.of_teacher(), **itself)
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    run_files.begin(output, teacher_alone, device=str(accelerator.device), precision=precision)
    for seed in range(config.seed, config.seed + config.seeds):
        text = all_text.draw(config.data_share, seed)
        alone = dataclasses.replace(config, kd_weight=0.0, layerwise_weight=0.0, lm_weight=1.0)
        recipes = {"ce-only": alone, "distilled": config} if config.baseline else {"distilled": config}
        for name, recipe in recipes.items():
            print(f"\n{name}, seed {seed}: {total_steps(recipe, text)} steps on {text.describe()}")
            set_seed(seed)
            student, layer_map = obtain_student(recipe, teacher_model, all_text.sample, output / "student_layers.json")
            module = DistillationModule.of(recipe, student, layer_map, pairing)
            if recipe.layerwise_weight and seed == config.seed:
                print(layer_map.picture(recipe.projection))
            folder = output / f"seed-{seed}" / name
            stage = Stage(f"{name} {seed}", folder, recipe, seed, text, held_out, student_tokenizer)
            train(stage, module, teacher, accelerator)

    report.write(output)
    rows = report.rows(output)
    export.student(output / f"seed-{config.seed}" / "distilled" / "best", output / "student", config, rows)
    print(f"\n{(output / 'report.md').read_text()}")
    print(f"The student is in {output / 'student'}; it writes:\n{export.sample(output / 'student')}")


def obtain_teacher(
    config: Config, sources: list[Source], output: Path, accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher that is named; or the demo's, from the cache or trained here on all of the text, and cached."""
    device = torch.device("cpu") if config.teacher_device == "cpu" else accelerator.device
    if config.teacher != "demo":
        dtype = teacher_dtype(config, accelerator)
        return load(config.teacher, dtype=dtype, bits=config.teacher_bits, device=device)
    recipe = demo.teacher_recipe(config)
    kept = demo.kept_teacher(recipe, sources)
    if checkpoint.is_whole(kept):
        print(f"teacher: the one trained before, {kept}")
        return load(str(kept), device=device)
    print(f"teacher: {recipe.max_steps} steps on all of the text, once; it will be kept in {kept}")
    set_seed(recipe.seed)
    tokenizer = demo.tokenizer_of(sources, config.vocab_size)
    pairing = Pairing((tokenizer,), "one tokenizer")
    text, held_out = prepare(sources, Cutter(pairing.tokenizers, config.seq_len, config.packing))
    module = DistillationModule(demo.untrained_teacher(tokenizer, config), Weights.of(recipe), pairing=pairing)
    stage = Stage("teacher", output / "teacher", recipe, recipe.seed, text, held_out, tokenizer)
    train(stage, module, None, accelerator)
    checkpoint.copy_folder(stage.folder / "last", kept)
    return load(str(kept), device=device)


def total_steps(recipe: Config, text: TrainingText) -> int:
    window = recipe.batch_size * recipe.grad_accum
    return recipe.max_steps or math.ceil(recipe.epochs * text.num_blocks() / window)


@dataclass(frozen=True)
class Stage:
    """One model to train: where, how, and on what."""

    name: str
    folder: Path
    recipe: Config
    seed: int
    text: TrainingText
    held_out: Blocks
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Result:
    """What a finished stage is known by; kept as result.json beside the models `best` and `last`."""

    untrained: Evaluation
    best: Evaluation
    best_step: int
    last: Evaluation
    steps: int

    @classmethod
    def read(cls, path: Path) -> Result:
        fields = json.loads(path.read_text())
        for name in ("untrained", "best", "last"):
            fields[name] = Evaluation(**fields[name])
        return cls(**fields)


def train(stage: Stage, module: DistillationModule, teacher: Teacher | None, accelerator: Accelerator) -> Result:
    """Train `module`; a step is an optimizer step. Goes on from the newest checkpoint in the stage's folder."""
    recipe, folder, text = stage.recipe, stage.folder, stage.text
    if (folder / "result.json").exists():
        print(f"{stage.name}: finished before, in {folder}")
        return Result.read(folder / "result.json")
    folder.mkdir(parents=True, exist_ok=True)
    steps, window = total_steps(recipe, text), recipe.batch_size * recipe.grad_accum
    walk, pairing = text.walk(stage.seed), module.pairing
    student, weights, teacher_layers, count = module.student, module.weights, module.teacher_layers, module.count
    module, optimizer = accelerator.prepare(module, make_optimizer(module, recipe))

    # Where the run stands. All of it goes into a checkpoint, and nothing else is needed to go on exactly.
    state = {"step": 0, "samples": 0, "best_step": 0, "bad_steps": {}, "monitor": None, "walk": walk.state()}
    newest = checkpoint.latest(folder / "checkpoints", warn=lambda message: print(f"{stage.name}: {message}"))
    if newest:
        state = checkpoint.load(newest, module, optimizer.optimizer, accelerator.scaler)
        print(f"{stage.name}: going on from step {state['step']}")
    walk.seek(state["walk"])
    step, samples, best_step = state["step"], state["samples"], state["best_step"]
    bad_steps = BadStepGuard(recipe.max_bad_steps, **state["bad_steps"])
    monitor = Monitor(folder / "log.jsonl", stage.name, weights.active(), steps, step, state["monitor"])

    def evaluate_held_out() -> Evaluation:
        result = evaluate(student, stage.held_out, pairing, batch_size=recipe.batch_size, teacher=teacher)
        monitor.evaluation(step, result)
        return result

    if newest:
        untrained, best, last = (Evaluation(**state[name]) for name in ("untrained", "best", "last"))
    else:
        untrained = best = last = evaluate_held_out()
        export.model(student, stage.tokenizer, folder / "best")

    def save_checkpoint() -> None:
        counters = {"samples": samples, "best_step": best_step, "bad_steps": bad_steps.state()}
        evaluations = {"untrained": vars(untrained), "best": vars(best), "last": vars(last)}
        position = {**counters, **evaluations, "monitor": monitor.state(), "walk": walk.state()}
        checkpoint.save(folder / "checkpoints", step, module, optimizer.optimizer, accelerator.scaler, position)
        checkpoint.rotate(folder / "checkpoints", recipe.keep_checkpoints)

    first_step = FirstStepGuard()
    with monitor, StopRequest() as stop:
        while step < steps:
            monitor.start_step()
            rate = learning_rate(
                step, peak=recipe.lr, total_steps=steps, warmup_steps=recipe.warmup_steps, shape=recipe.schedule
            )
            for group in optimizer.param_groups:
                group["lr"] = rate

            # The whole window first: every micro-batch is divided by the window's tokens, so that 1 x 8 equals 8 x 1,
            # and rows of like length go together without weighing a token by the length of its row.
            blocks = sorted(walk.take(samples, window), key=lambda block: len(block[0].ids))
            parts = [blocks[i : i + recipe.batch_size] for i in range(0, window, recipe.batch_size)]
            batches = [collate(part, accelerator.device, align=pairing.align) for part in parts]
            counts = count(batches)
            samples += window
            sums: dict[str, torch.Tensor] = {}
            means: dict[str, torch.Tensor] = {}
            for batch in batches:
                states = teacher(batch.teacher, teacher_layers) if teacher and weights.need_teacher() else None
                losses = module(batch, states, counts)
                accelerator.backward(losses.total)
                for name, value in {**losses.raw, "total": losses.total.detach()}.items():
                    sums[name] = sums.get(name, 0) + value
                for name, value in losses.diagnostics.items():
                    means[name] = means.get(name, 0) + value / len(batches)
            norm = accelerator.clip_grad_norm_(module.parameters(), recipe.clip)

            # One read of the device for all: the loss must be known to be finite before it moves the weights.
            numbers = [torch.as_tensor(norm), counts.targets, *sums.values(), *means.values()]
            norm, tokens, *values = torch.stack(numbers).tolist()
            raw = dict(zip(sums, values[: len(sums)], strict=True))
            total = raw.pop("total")
            diagnostics = dict(zip(means, values[len(sums) :], strict=True))
            # With a gradient scaler an infinite norm is its to handle: it skips the step and lowers its scale.
            must_be_finite = {**raw, "total": total} | ({} if accelerator.scaler else {"gradient norm": norm})
            finite = bad_steps.accept(must_be_finite)
            if finite or accelerator.scaler:
                first_step.before_step(module)
                optimizer.step()
            optimizer.zero_grad()
            if not finite or accelerator.optimizer_step_was_skipped:
                monitor.warn(step, f"step skipped, not finite: loss {total}, gradient norm {norm}")
                if accelerator.scaler and accelerator.scaler.get_scale() < 1:
                    raise TrainingFault("float16 gradients overflow even at a loss scale below 1")
                continue
            first_step.after_step(rate)
            step += 1

            monitor.add(raw, total, diagnostics, int(tokens))
            if step % recipe.log_steps == 0 or step == steps:
                detailed = step % recipe.detail_steps == 0
                monitor.log(step, learning_rate=rate, gradient_norm=norm, skipped=bad_steps.skipped, detailed=detailed)
            if step % recipe.eval_steps == 0 or step == steps:
                last = evaluate_held_out()
                if last.loss < best.loss:
                    best, best_step = last, step
                    export.model(student, stage.tokenizer, folder / "best")
            stopping = step < steps and (stop.requested or step == recipe.stop_at)
            if stopping or step % recipe.save_steps == 0 or step == steps:
                save_checkpoint()
            if stopping:
                raise Stopped(f"{stage.name}: stopped and saved at step {step} of {steps}")

    export.model(student, stage.tokenizer, folder / "last")
    result = Result(untrained, best, best_step, last, step)
    checkpoint.write_atomically(folder / "result.json", json.dumps(dataclasses.asdict(result), indent=2))
    accelerator.free_memory()
    return result


if __name__ == "__main__":
    sys.exit(main())
