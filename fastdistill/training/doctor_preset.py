"""What doctor says of a preset on this machine: number format, chunks, memory, time, and a step that is measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastdistill.training import hardware
from fastdistill.training.config import Config
from fastdistill.training.estimate import Device, Estimate
from fastdistill.training.finding import FAULT, GOOD, NOTE, Finding
from fastdistill.training.hardware import Gpu
from fastdistill.training.loading import DTYPES
from fastdistill.training.measured_step import MICRO_BATCHES, STEPS, measure_step
from fastdistill.training.memory import as_flags, easier
from fastdistill.training.precision import Precision
from fastdistill.training.preset_shapes import PAIRS, STAND_IN, estimate_preset
from fastdistill.training.presets import PRESETS
from fastdistill.training.shapes import Shape

MARGIN = 0.15
"""By which estimates may be off: what tests hold them to on a CPU. On a GPU that is an assumption."""

LIBRARIES = 500_000_000
"""Bytes that cuBLAS and PyTorch take on a GPU beside tensors: an assumption."""

SHARE = 1 / 3
"""Of the rate of one large matrix product that a whole step reaches: an assumption."""

PRODUCT_SECONDS, PRODUCT_WIDTHS = 0.3, {"cpu": 1024, "cuda": 4096}


class Plan(NamedTuple):
    """A preset with the settings that were given, on one device. `free` is its memory in bytes, where it is known."""

    preset: str
    config: Config
    device: torch.device
    precision: Precision
    shape: Device
    free: int | None

    @classmethod
    def of(cls, preset: str, changed: dict[str, Any], gpu: Gpu | None) -> Plan:
        """On `gpu`, the first that PyTorch sees, or on the CPU.

        Raises:
            UsageError: for settings that cannot be.
        """
        config = Config(**PRESETS[preset].settings | changed)
        device = torch.device("cuda", 0) if gpu else torch.device("cpu")
        precision = Precision.choose(config.precision, device)
        capability = gpu.capability[0] if gpu and gpu.capability else None
        shape = Device(gpu.name if gpu else "CPU", capability, precision.name)
        return cls(preset, config, device, precision, shape, gpu.free if gpu else hardware.cpu_memory()[0])

    def estimate(self, config: Config | None = None) -> Estimate:
        return estimate_preset(self.preset, self.shape, config or self.config)

    def fits(self, found: Estimate) -> bool:
        return self.free is None or self.needed(found) <= self.free

    def needed(self, found: Estimate) -> int:
        """Bytes that must be free: the estimate, and what it may be short by."""
        return round(found.peak * (1 + MARGIN)) + LIBRARIES * (self.device.type == "cuda")


def plan(preset: str, changed: dict[str, Any], gpu: Gpu | None, *, is_served: bool, measure: bool) -> Iterator[Finding]:
    """`is_served`: whether PyTorch can compute on the device, so that something may be measured there."""
    here = Plan.of(preset, changed, gpu)
    found, config = here.estimate(), here.config
    student, teacher = (Shape.of(each) for each in PAIRS[preset][:2])
    sizes = f"a student of {count(student.parameters)} and a teacher of {count(teacher.parameters)} parameters"
    stand_in = ", which stands in for the one that you name" * (PAIRS[preset].teacher is STAND_IN)
    yield Finding(GOOD, "preset", f"{preset}: {sizes}{stand_in}")
    yield Finding(GOOD, "precision", here.precision.describe(), numbers={"precision": here.precision.name})
    rows = f"{config.batch_size} x {config.grad_accum} rows of {config.seq_len:,} tokens a step"
    taken = f"the fused loss takes {found.chunk_tokens:,} of them at a time"
    yield Finding(GOOD, "batch", f"{rows}; {taken}", numbers={"chunk_tokens": found.chunk_tokens})
    yield _memory(here, found)
    try:
        rate = _product_rate(here) if is_served else None
    except RuntimeError:  # no memory is left on the device
        rate = None
    yield _time(here, found, rate)
    if measure and is_served:
        yield from _measured(here, found, rate)


def _memory(here: Plan, found: Estimate) -> Finding:
    parts = ", ".join(f"{part} {size(each)}" for part, each in sorted(found.memory.items(), key=lambda x: -x[1]))
    with_margin = f"{size(here.needed(found))} with what it may be short by"
    text = f"{size(found.peak)} of tensors, estimated ({with_margin}): {parts}"
    numbers = {"estimated_bytes": found.peak, "needed_bytes": here.needed(found), "parts": found.memory}
    if here.free is None:
        return Finding(NOTE, "memory", f"{text}. How much is free here is not known", numbers=numbers)
    if here.fits(found):
        return Finding(GOOD, "memory", f"{text}. {size(here.free)} are free: it fits", numbers=numbers)
    return Finding(FAULT, "memory", f"{text}. {size(here.free)} are free: too little", _way_in(here), numbers)


def _way_in(here: Plan) -> str:
    """The flags with which the same steps would fit."""
    config, settings = here.config, {}
    while changed := easier(config):
        settings |= changed
        config = dataclasses.replace(config, **changed)
        found = here.estimate(config)
        if here.fits(found):
            return f"{' '.join(as_flags(settings))}: the same steps, {size(here.needed(found))}"
    return "a shorter --seq-len, a smaller student or --teacher-device cpu: no batch is small enough"


def _product_rate(here: Plan) -> float:
    """FLOP/s of one large matrix product in the number format of the run, measured now."""
    width, dtype = PRODUCT_WIDTHS[here.device.type], DTYPES[here.precision.name]
    matrix = torch.randn(width, width, device=here.device).to(dtype)

    def now() -> float:
        if here.device.type == "cuda":
            torch.cuda.synchronize(here.device)
        return time.perf_counter()

    product = matrix @ matrix  # the first makes what the library needs
    start, products = now(), 0
    while now() - start < PRODUCT_SECONDS:
        torch.mm(matrix, matrix, out=product)
        products += 1
    return 2 * width**3 * products / (now() - start)


def _time(here: Plan, found: Estimate, rate: float | None) -> Finding:
    work = f"{found.step_flops:.1e} FLOP a step"
    if found.run_flops:
        work += f", {found.run_flops:.1e} a run"
    work += " without the training of the demo's teacher" * (here.preset == "demo")
    numbers = {"step_flops": found.step_flops, "run_flops": found.run_flops, "product_flops_per_second": rate}
    if rate is None:
        return Finding(NOTE, "time", f"{work}; no rate can be measured on this GPU now", numbers=numbers)
    times = _times(found, found.step_flops / rate / SHARE)
    how = f"at a third (assumed) of the {rate / 1e9:,.0f} GFLOP/s of one large product (measured)"
    return Finding(GOOD, "time", f"about {times}: {work}, {how}", numbers=numbers)


def _times(found: Estimate, step: float) -> str:
    """Of a step that takes so many seconds, and of the run."""
    run = f", {duration(found.run_flops / found.step_flops * step)} a run" if found.run_flops else ""
    return f"{duration(step)} a step{run}"


def _measured(here: Plan, found: Estimate, rate: float | None) -> Iterator[Finding]:
    """Steps of random models of these sizes: what they really take, beside the estimates."""
    if not here.fits(found):
        text = f"not run: {size(here.needed(found))} are needed by the estimate, {size(here.free or 0)} are free"
        yield Finding(NOTE, "measured", text)
        return
    share_of_step = min(MICRO_BATCHES, here.config.grad_accum) / here.config.grad_accum
    wait = f", about {duration(STEPS * share_of_step * found.step_flops / rate / SHARE)}" if rate else ""
    yield Finding(NOTE, "measuring", f"{STEPS} steps of random models of these sizes{wait}")
    pair = PAIRS[here.preset]
    try:
        step = measure_step(here.config, pair.student, pair.teacher, here.device, two_tokenizers=pair.two_tokenizers)
    except (RuntimeError, MemoryError) as error:
        text = f"a step fails: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        yield Finding(
            FAULT, "measured", text, "less, as by --batch-size, if it is memory; else please report this output"
        )
        return
    off = found.peak / step.bytes - 1
    text = f"{size(step.bytes)} of tensors, estimated {size(found.peak)} ({off:+.1%}); {_times(found, step.seconds)}"
    numbers = {"bytes": step.bytes, "estimate_off_by": off, "seconds_per_step": step.seconds}
    yield Finding(GOOD if abs(off) <= MARGIN else NOTE, "measured", text, numbers=numbers)


def size(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 1e9 else f"{amount / 1e6:.0f} MB"


def count(number: int) -> str:
    """135M of 134,515,008."""
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    for unit, length in (("s", 1), ("min", 60), ("h", 3600)):
        if seconds < 100 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:.2g} days"
