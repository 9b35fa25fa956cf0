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
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdistill.training import checkpoint, export, report
from fastdistill.training.config import Config, UsageError, abandon_output, open_output, parse
from fastdistill.training.data import (
    Blocks,
    Corpus,
    check_same_tokenizer,
    draw,
    load_corpus,
    make_blocks,
    sample_order,
    train_tokenizer,
)
from fastdistill.training.engine import StopRequest, make_accelerator, make_optimizer
from fastdistill.training.evaluate import Evaluation, evaluate
from fastdistill.training.guard import BadStepGuard, FirstStepGuard, TrainingFault
from fastdistill.training.models import build_student, cached_teacher, check_context, demo_teacher, kept_layers, load
from fastdistill.training.monitor import Monitor
from fastdistill.training.objective import DistillationModule, Teacher, Weights
from fastdistill.training.schedule import learning_rate


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
    started = time.perf_counter()
    accelerator = make_accelerator(config.precision)
    print(f"fastdistill: {accelerator.device}, mixed precision {accelerator.mixed_precision}; the run is in {output}")

    corpus = load_corpus(config.data)
    teacher_model, tokenizer = obtain_teacher(config, corpus, output, accelerator)
    check_context(teacher_model, config.seq_len, "teacher")
    teacher = Teacher(teacher_model.to(accelerator.device))
    held_out = make_blocks(corpus.held_out, tokenizer, config.seq_len)
    all_text = make_blocks(corpus.train, tokenizer, config.seq_len)
    print(f"{corpus.name}: {all_text.num_targets():,} tokens to learn from, {held_out.num_targets():,} held out")

    rows = [
        report.Row("teacher", None, evaluate(teacher_model, held_out, batch_size=config.batch_size, teacher=teacher))
    ]
    for seed in range(config.seed, config.seed + config.seeds):
        text = draw(all_text, config.data_share, seed)
        alone = dataclasses.replace(config, kd_weight=0.0, layerwise_weight=0.0, lm_weight=1.0)
        recipes = {"ce-only": alone, "distilled": config} if config.baseline else {"distilled": config}
        for name, recipe in recipes.items():
            print(f"\n{name}, seed {seed}: {total_steps(recipe, text)} steps on {text.num_targets():,} tokens of text")
            set_seed(seed)
            module = make_module(recipe, teacher_model, tokenizer)
            stage = Stage(f"{name} {seed}", output / f"seed-{seed}" / name, recipe, seed, text, held_out, tokenizer)
            result = train(stage, module, teacher, accelerator)
            if len(rows) == 1:
                rows.append(report.Row("untrained student", None, result.untrained))
            rows.append(report.Row(f"{name}, {report.BEST}", seed, result.best, result.best_step))
            rows.append(report.Row(f"{name}, {report.LAST}", seed, result.last, result.steps))

    report.write(output, config, rows, seconds=time.perf_counter() - started)
    export.student(output / f"seed-{config.seed}" / "distilled" / "best", output / "student", config, rows)
    print(f"\n{(output / 'report.md').read_text()}")
    print(f"The student is in {output / 'student'}; it writes:\n{export.sample(output / 'student')}")


def obtain_teacher(
    config: Config, corpus: Corpus, output: Path, accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher that is named; or the demo's, from the cache or trained here on all of the text, and cached."""
    if config.teacher != "demo":
        return load(config.teacher)
    recipe = dataclasses.replace(
        config, kd_weight=0.0, layerwise_weight=0.0, lm_weight=1.0, batch_size=8, grad_accum=1, seed=0, stop_at=None,
        max_steps=config.teacher_steps, lr=config.teacher_lr, eval_steps=100, log_steps=100, save_steps=100,
    )  # fmt: skip
    cached = cached_teacher(recipe, corpus.fingerprint())
    if checkpoint.is_whole(cached):
        print(f"teacher: the one trained before, {cached}")
        return load(str(cached))
    print(f"teacher: {recipe.max_steps} steps on all of the text, once; it will be kept in {cached}")
    set_seed(recipe.seed)
    tokenizer = train_tokenizer(corpus.train, config.vocab_size)
    model = demo_teacher(tokenizer, depth=config.teacher_depth, width=config.teacher_width, seq_len=config.seq_len)
    text, held_out = (make_blocks(part, tokenizer, config.seq_len) for part in (corpus.train, corpus.held_out))
    stage = Stage("teacher", output / "teacher", recipe, recipe.seed, text, held_out, tokenizer)
    train(stage, DistillationModule(model, Weights.of(recipe)), None, accelerator)
    checkpoint.copy_folder(stage.folder / "last", cached)
    return load(str(cached))


def make_module(recipe: Config, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> DistillationModule:
    """The student, loaded or built from the teacher's layers, with its losses."""
    if recipe.student:
        student, own_tokenizer = load(recipe.student)
        check_same_tokenizer(own_tokenizer, tokenizer)
        check_context(student, recipe.seq_len, "student")
        layer_map = []
    else:
        layers = kept_layers(recipe.student_layers, teacher.config.get_text_config().num_hidden_layers)
        student, layer_map = build_student(teacher, layers), list(enumerate(layers))
    return DistillationModule(
        student, Weights.of(recipe), temperature=recipe.temperature, divergence=recipe.divergence, layer_map=layer_map
    )


def total_steps(recipe: Config, text: Blocks) -> int:
    window = recipe.batch_size * recipe.grad_accum
    return recipe.max_steps or math.ceil(recipe.epochs * len(text) / window)


@dataclass(frozen=True)
class Stage:
    """One model to train: where, how, and on what."""

    name: str
    folder: Path
    recipe: Config
    seed: int
    text: Blocks
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
    student, weights, teacher_layers = module.student, module.weights, module.teacher_layers
    module, optimizer = accelerator.prepare(module, make_optimizer(module, recipe))

    # Where the run stands. All of it goes into a checkpoint, and nothing else is needed to go on exactly.
    state = {"step": 0, "samples": 0, "best_step": 0, "bad_steps": {}, "monitor": None}
    newest = checkpoint.latest(folder / "checkpoints", warn=lambda message: print(f"{stage.name}: {message}"))
    if newest:
        state = checkpoint.load(newest, module, optimizer.optimizer, accelerator.scaler)
        print(f"{stage.name}: going on from step {state['step']}")
    step, samples, best_step = state["step"], state["samples"], state["best_step"]
    bad_steps = BadStepGuard(recipe.max_bad_steps, **state["bad_steps"])
    monitor = Monitor(folder / "log.jsonl", stage.name, weights.active(), steps, step, state["monitor"])

    def evaluate_held_out() -> Evaluation:
        result = evaluate(student, stage.held_out, batch_size=recipe.batch_size, teacher=teacher)
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
        position = {**counters, **evaluations, "monitor": monitor.state()}
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

            # The whole window first: every micro-batch is divided by the window's tokens, so that 1 x 8 equals 8 x 1.
            rows = sample_order(len(text), samples, window, stage.seed)
            batches = [text.batch(part, accelerator.device) for part in rows.split(recipe.batch_size)]
            counts = DistillationModule.count(batches)
            samples += window
            sums: dict[str, torch.Tensor] = {}
            for batch in batches:
                states = teacher(batch["input_ids"], teacher_layers) if teacher and weights.need_teacher() else None
                losses = module(batch, states, counts)
                accelerator.backward(losses.total)
                for name, value in {**losses.raw, "total": losses.total.detach()}.items():
                    sums[name] = sums.get(name, 0) + value
            norm = accelerator.clip_grad_norm_(module.parameters(), recipe.clip)

            # One read of the device for all: the loss must be known to be finite before it moves the weights.
            *values, norm, tokens = torch.stack([*sums.values(), torch.as_tensor(norm), counts.targets]).tolist()
            raw = dict(zip(sums, values, strict=True))
            total = raw.pop("total")
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

            monitor.add(raw, total, int(tokens))
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
