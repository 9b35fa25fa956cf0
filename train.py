"""Distil a causal language model into a smaller one: `python train.py`, `python train.py --help`.

Reads top to bottom: the command, the run (a teacher, then for each seed a student with and without it), the loop.
"""

from __future__ import annotations

import copy
import io
import math
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdistill.training import checkpoint, demo, engine, export, memory, random_state, report, run_files, whole
from fastdistill.training.averaged import AveragedWeights
from fastdistill.training.blocks import collate
from fastdistill.training.clock import Clock
from fastdistill.training.command_line import introduction, parse
from fastdistill.training.config import Config, UsageError
from fastdistill.training.data import Cutter, prepare
from fastdistill.training.ending import ending
from fastdistill.training.evaluate import evaluate
from fastdistill.training.guard import BadStepGuard, MovementGuard, Patience, TrainingFault
from fastdistill.training.loading import load
from fastdistill.training.models import check_fit
from fastdistill.training.monitor import Monitor
from fastdistill.training.objective import DistillationModule, Weights
from fastdistill.training.pairing import Pairing, describe, pair
from fastdistill.training.precision import Precision
from fastdistill.training.reading import Reading
from fastdistill.training.schedule import learning_rate
from fastdistill.training.sources import Source, open_sources
from fastdistill.training.stage import Progress, Result, Stage
from fastdistill.training.stop import Stopped, StopRequest
from fastdistill.training.student import obtain_student
from fastdistill.training.teacher import Teacher
from fastdistill.training.window import Losses


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file shows each line when it is written
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    output, speaks = None, True
    try:
        config = parse(argv)
        accelerator = engine.make_accelerator(config)
        speaks = accelerator.is_main_process
        output = engine.on_main(accelerator, lambda: run_files.open_output(config))
        run(config, output, accelerator)
        return 0
    except (UsageError, TrainingFault, Stopped, KeyboardInterrupt, OSError, SafetensorError) as error:
        code, message = ending(error, output)
        if code == 2 and output and speaks:
            run_files.abandon_output(output)
    if speaks:
        print(f"train.py: {message}", file=sys.stderr)
    return code


def run(config: Config, output: Path, accelerator: Accelerator) -> None:
    started, say = time.monotonic(), accelerator.print
    precision, devices = Precision.choose(config.precision, accelerator.device), engine.describe(accelerator)
    say(f"fastdistill: {devices}, {precision.describe()}; the run is in {output}{introduction(config)}")

    with accelerator.main_process_first():  # the others find in the cache what it has made
        sources = open_sources(config.data, text_field=config.text_field, streaming=config.streaming)
    for note in chain.from_iterable(source.notes for source in sources):
        say(note)
    teacher_model, teacher_tokenizer = obtain_teacher(config, sources, output, accelerator, precision)
    tokenizer = load(config.student)[1] if config.student else teacher_tokenizer
    pairing = pair(tokenizer, teacher_tokenizer, config, accelerator.device)
    with accelerator.main_process_first():
        all_text, held_out = prepare(sources, Cutter(pairing.tokenizers, config.seq_len, config.packing))
    say(describe(pairing, held_out))
    say(f"{all_text.describe()} to learn from, {held_out.num_targets():,} tokens held out")

    check_fit(teacher_model, config, "teacher")
    with accelerator.main_process_first():
        untrained, layer_map = obtain_student(config, teacher_model, all_text.sample, output / "student_layers.json")
    # Here once, so that a loss that cannot be had is refused before anything is trained.
    if DistillationModule.of(config, untrained, teacher_model, layer_map, pairing).components:
        say(layer_map.picture(config.projection))
    teacher = Teacher(teacher_model, accelerator.device, shard=config.teacher_device == "sharded")
    itself = {"batch_size": config.batch_size, "teacher": Teacher(teacher_model), "accelerator": accelerator}
    teacher_alone = evaluate(teacher_model, held_out.side(-1), pairing.of_teacher(), **itself)
    if accelerator.is_main_process:
        run_files.begin(output, teacher_alone, device=devices, precision=precision.name)
    best: dict[str, Path] = {}
    deadline = started + 3600 * config.max_hours if config.max_hours else None
    for seed in range(config.seed, config.seed + config.seeds):
        text = all_text.draw(config.data_share, seed)
        baseline = {"ce-only": config.without_teacher()} if config.baseline else {}
        for name, recipe in {**baseline, "distilled": config}.items():
            folder = output / f"seed-{seed}" / name
            stage = Stage(f"{name} {seed}", folder, recipe, seed, text, held_out, tokenizer, deadline, teacher_alone)
            module = DistillationModule.of(recipe, copy.deepcopy(untrained), teacher_model, layer_map, pairing)
            steps = stage.total_steps(accelerator.num_processes)
            say(f"\n{name}, seed {seed}: {steps} steps on {text.describe()}{module.announced(steps)}")
            result = train(stage, module, teacher, accelerator, precision)
            best.setdefault(name, stage.best_folder(result.best_step))  # of the first seed

    if accelerator.is_main_process:
        report.write(output)
        export.student(best["distilled"], output / "student", config, report.rows(output))
        print(f"\n{(output / 'report.md').read_text()}")
        print(f"The student is in {output / 'student'}; it writes:\n{export.sample(output / 'student')}")


def obtain_teacher(
    config: Config, sources: list[Source], output: Path, accelerator: Accelerator, precision: Precision
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The teacher that is named; or the demo's, from the cache or trained here on all of the text, and cached."""
    device = accelerator.device if config.teacher_device == "auto" else torch.device("cpu")
    if config.teacher != "demo":
        dtype = precision.name if config.teacher_dtype == "auto" else config.teacher_dtype
        with accelerator.main_process_first():
            return load(config.teacher, dtype=dtype, bits=config.teacher_bits, device=device)
    recipe = demo.teacher_recipe(config)
    kept = demo.kept_teacher(recipe, sources)
    if engine.on_main(accelerator, lambda: whole.is_whole(kept)):
        accelerator.print(f"teacher: the one trained before, {kept}")
        return load(str(kept), device=device)
    accelerator.print(f"teacher: {recipe.max_steps} steps on all of the text, once; it will be kept in {kept}")
    set_seed(recipe.seed)
    tokenizer = demo.tokenizer_of(sources, config.vocab_size)
    text, held_out = prepare(sources, Cutter((tokenizer,), config.seq_len, config.packing))
    one, untrained = Pairing((tokenizer,), "one tokenizer"), demo.untrained_teacher(tokenizer, config)
    module = DistillationModule(untrained, Weights.of(recipe), pairing=one)
    stage = Stage("teacher", output / "teacher", recipe, recipe.seed, text, held_out, tokenizer)
    train(stage, module, None, accelerator, precision)
    engine.on_main(accelerator, lambda: whole.copy_folder(stage.folder / "last", kept))
    return load(str(kept), device=device)


def train(
    stage: Stage, module: DistillationModule, teacher: Teacher | None, accelerator: Accelerator, precision: Precision
) -> Result:
    """Train `module`; a step is an optimizer step. Goes on from the newest checkpoint in the stage's folder."""
    recipe, folder, say = stage.recipe, stage.folder, accelerator.print
    main, rank, ranks = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    if finished := Result.read(folder):
        say(f"{stage.name}: finished before, in {folder}")
        return finished
    engine.on_main(accelerator, lambda: folder.mkdir(parents=True, exist_ok=True))
    steps, window, walk = stage.total_steps(ranks), stage.window(ranks), stage.text.walk(stage.seed)
    wrapped, scaler, clock = engine.wrap(module, accelerator, recipe), precision.scaler(), Clock(accelerator.device)
    optimizer, averaged = engine.make_optimizer(module, recipe), AveragedWeights(module, recipe.ema_decay)
    trained = checkpoint.Trained(module, optimizer, averaged, scaler)
    set_seed(stage.seed, device_specific=True)

    # Where the run stands. All of it goes into a checkpoint, and nothing else is needed to go on exactly.
    now, state = Progress(), {}
    newest, damaged = engine.on_main(accelerator, lambda: checkpoint.latest(folder / "checkpoints"))
    if newest:
        state = checkpoint.load(newest, trained)
        now = Progress.of(state)
        walk.seek(state["walk"])
        damaged += stage.check_best(now)
        say(f"{stage.name}: going on from step {now.step}")
    bad_steps = BadStepGuard(recipe.max_bad_steps, **state.get("bad_steps", {}))
    patience = Patience(recipe.patience, recipe.min_delta, recipe.patience_from, **state.get("patience", {}))
    monitor = Monitor(
        folder, stage.name, module.weights.active(), steps, now.step, state.get("monitor"),
        teacher=stage.teacher, tensorboard=recipe.tensorboard,
    )  # fmt: skip
    movement, module.clock, first, before = MovementGuard(), clock, now.step + 1, (now.samples, None)
    pending, stopping = None, False

    def evaluate_held_out() -> None:
        """Of the weights, or of their mean; as a model they are kept when they are the best so far."""
        with averaged.in_place():
            now.last = evaluate(
                module, stage.held_out, batch_size=recipe.batch_size, teacher=teacher, accelerator=accelerator
            )
            if now.best is None or now.last.loss < now.best.loss:
                now.best, now.best_step = now.last, now.step
                export.model(module.student, stage.tokenizer, stage.best_folder(now.step))
        monitor.evaluation(now.step, now.last)
        patience.observe(now.step, now.last.loss)
        if main and teacher:
            report.refresh(folder.parents[1])

    def save_checkpoint(samples: int, generators: dict[str, torch.Tensor] | None = None) -> None:
        guards = {"bad_steps": bad_steps.state(), "patience": patience.state(), "monitor": monitor.state()}
        position = {**now.state(), **guards, "samples": samples, "walk": walk.state()}
        checkpoint.save(folder / "checkpoints", now.step, trained, position, generators)
        if main:
            kept = checkpoint.rotate(folder / "checkpoints", recipe.keep_checkpoints)
            stage.keep_best({now.best_step, *(each["best_step"] for each in kept)})

    def settle() -> bool:
        """Take in what the latest optimizer step has made known, once; whether it moved the weights."""
        nonlocal pending, stopping
        if pending is None:
            return True
        (reading, rate), pending = pending, None
        values = reading.values()
        losses, norm, stopping = Losses.of(values), values["gradient norm"], values["stop"] > 0
        # With a gradient scaler an infinite norm is its to handle: it skips the step and lowers its scale.
        finite = bad_steps.accept({**losses.raw, "total": losses.total} | ({} if scaler else {"gradient norm": norm}))
        if not (finite and math.isfinite(norm)):
            monitor.warn(now.step, f"step skipped, not finite: loss {losses.total}, gradient norm {norm}")
            if scaler and scaler.get_scale() < 1:
                raise TrainingFault("float16 gradients overflow even at a loss scale below 1")
            return False
        now.step += 1
        averaged.update(now.step)
        monitor.add(losses, tokens=int(values["tokens"]), learning_rate=rate, gradient_norm=norm)
        if now.step == first:
            movement.check(rate)
        return True

    def save_before_window() -> None:
        """Drop the window that was begun: it is begun again when the run goes on."""
        optimizer.zero_grad()
        settle()
        save_checkpoint(*before)

    with monitor, StopRequest(stage.deadline) as stop, memory.rescue(ranks == 1 and save_before_window, recipe):
        for message in damaged:
            monitor.warn(now.step, message)
        if now.best is None:
            evaluate_held_out()
            now.untrained = now.untrained or now.last
        while now.step < steps and not patience.exhausted:
            before = now.samples, random_state.capture()
            clock.start()
            # The whole window first: every micro-batch is divided by the window's tokens, so that 1 x 8 equals 8 x 1,
            # and rows of like length go together without weighing a token by the length of its row.
            blocks = sorted(walk.take(now.samples, window), key=lambda block: len(block[0].ids))
            parts = [blocks[i : i + recipe.batch_size] for i in range(0, window, recipe.batch_size)][rank::ranks]
            batches = [collate(part, accelerator.device, align=module.pairing.align) for part in parts]
            module.begin(now.step + (pending is not None), steps)
            counts = engine.over_processes(module.count(batches), accelerator)
            now.samples += window
            clock.mark("data")
            sums: dict[str, torch.Tensor] = {}
            for number, batch in enumerate(batches, 1):
                states = teacher(batch.teacher, module.of_teacher) if teacher and module.needs_teacher else None
                clock.mark("teacher")
                with engine.exchanging(wrapped, now=number == len(batches)):
                    with precision.autocast():
                        losses = wrapped(batch, states, counts)
                    engine.backward(losses.total, ranks, scaler)
                for name, value in losses.flat(1 / (len(batches) * ranks)).items():
                    sums[name] = sums.get(name, 0) + value.detach()
                clock.mark("backward")
            norm = engine.clip_gradients(module, optimizer, recipe.clip, scaler)

            settle()  # the step before: its numbers came while the device made these gradients, and nothing waited
            rate = learning_rate(
                now.step, peak=recipe.lr, total_steps=steps, warmup_steps=recipe.warmup_steps, shape=recipe.schedule
            )
            movement.watch(module)
            engine.step_if_finite(optimizer, rate, norm, scaler)
            clock.mark("optimizer")
            sums["stop"] = torch.full_like(norm, stop.requested)
            sums = engine.over_processes(sums, accelerator)
            module.balance(Losses.of(sums))
            pending = Reading({**sums, "gradient norm": norm, "tokens": counts["lm"]}), rate

            if not (stopping or stage.is_due(now.step + 1, steps)) or not settle():
                continue
            before = now.samples, random_state.capture()
            monitor.took(clock.read())
            if now.step % recipe.log_steps == 0 or now.step == steps:
                monitor.log(now.step, skipped=bad_steps.skipped, detailed=now.step % recipe.detail_steps == 0)
                movement.check(rate)
            if now.step % recipe.eval_steps == 0 or now.step == steps:
                evaluate_held_out()
            stopping = now.step < steps and (stopping or now.step == recipe.stop_at)
            if stopping or now.step % recipe.save_steps == 0 or now.step == steps or patience.exhausted:
                save_checkpoint(*before)
            if stopping:
                raise Stopped(
                    f"{stage.name}: stopped and saved at step {now.step} of {steps}", asked=not stop.signalled
                )

    if patience.exhausted:
        say(f"{stage.name}: stopped early at step {now.step}: {patience.waited} evaluations without a better one")
    with averaged.in_place():
        export.model(module.student, stage.tokenizer, folder / "last")
    engine.on_main(accelerator, lambda: now.result().write(folder))
    return now.result()


if __name__ == "__main__":
    sys.exit(main())
