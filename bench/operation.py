"""What a benchmark is: an operation, its cases, who computes it, and how one pass of it is prepared and run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdistill.testing import DEVICE, in_float64, relative_error

PASSES = ("forward", "backward", "both")

LIMITS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Of relative errors against float64: does an implementation compute this loss at all? Some round every logarithm to
the half precision that logits come in, and are not turned away for it."""


class Cannot(Exception):
    """Raised by an implementation for a case that it cannot do; the message is the reason."""


class Case(NamedTuple):
    shape: tuple[int, ...]
    form: str
    """A key of the operation's FORMS: what else the loss depends on."""
    valid: float = 1.0
    """Share of tokens that count."""
    dtype: str = "float32"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        return "-".join(["x".join(map(str, self.shape)), self.form, str(self.valid), self.dtype])


Loss = Callable[..., Tensor]
"""Takes the inputs of a case by name."""


@dataclass(frozen=True, eq=False)
class Operation:
    name: str
    make_inputs: Callable[[Case], dict[str, Any]]
    leaves: tuple[str, ...]
    """Names of the inputs that get gradients."""
    implementations: dict[str, Callable[[Case], Loss]]
    """Who computes the loss. The first, "eager", is what the others are compared with."""
    definition: Callable[[Case, str], Loss]
    """The truth in float64: of the case, for an implementation by name, whose value may differ by a constant."""
    tokens: Callable[[Case], int]
    roof: str
    """"copy" where memory bounds the operation, "product" where arithmetic does."""
    work: Callable[[Case, str], float | None]
    """Bytes ("copy") or floating-point operations ("product") that a case's pass cannot do without; None where it is
    the implementation's choice in which pass they are done."""
    tiny_shape: tuple[int, ...]
    cases: dict[str, list[Case]]
    """Of a test ("tiny"), of a CPU ("cpu") and of a GPU ("cuda")."""

    def tiny(self, case: Case) -> Case:
        return case._replace(shape=self.tiny_shape)


def counted(tokens: int, valid: float) -> int:
    return max(1, round(tokens * valid))


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Made on the device itself: a CPU would need seconds for the logits of a large vocabulary."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype).mul_(scale)


def random_valid(tokens: int, valid: float) -> Tensor:
    """bool `[tokens]`, of which the share `valid`, anywhere, is True."""
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))
    return (order < counted(tokens, valid)).to(DEVICE)


def valid_positions(sequences: int, positions: int, valid: float) -> Tensor:
    """bool `[sequences, positions]`: the first of each sequence count, the rest is padding."""
    return (torch.arange(positions, device=DEVICE) < counted(positions, valid)).expand(sequences, positions)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # of other shapes too
    return torch.compile(function, dynamic=False)


class Step(NamedTuple):
    prepare: Callable[[], None]
    """What is not timed: frees what the last run left, makes the graph of a backward pass, empties a GPU's caches."""
    run: Callable[[], None]
    free: Callable[[], None]
    """Gives up what the last run left."""


@cache
def _loss(make: Callable[[Case], Loss], case: Case) -> Loss:
    """Kept, so that what is compiled is compiled once for all passes."""
    return make(case)


def make_step(operation: Operation, implementation: str, case: Case, pass_: str) -> Step:
    inputs = operation.make_inputs(case)
    leaves = [leaf.requires_grad_() for name in operation.leaves for leaf in tree_leaves(inputs[name])]
    loss = partial(_loss(operation.implementations[implementation], case), **inputs)
    kept: list[Tensor] = []

    def free() -> None:
        kept.clear()
        for leaf in leaves:
            leaf.grad = None

    def prepare() -> None:
        free()
        if pass_ == "backward":
            kept.append(loss())
        if DEVICE == "cuda":
            _overwrite_caches()
            torch.cuda.synchronize()

    def run() -> None:
        if pass_ == "forward":
            kept.append(loss())
        else:
            (kept.pop() if pass_ == "backward" else loss()).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return Step(prepare, run, free)


def in_turn(step: Step, eager: Step) -> tuple[Step, list[float]]:
    """The step with a run of eager's before each of its own, and a list to which the seconds of those are added.

    Whatever slows a machine for longer than a run slows both, and their ratio is that of the implementations.
    """
    seconds: list[float] = []

    def prepare() -> None:
        step.free()
        eager.prepare()
        start = perf_counter()
        eager.run()
        seconds.append(perf_counter() - start)
        eager.free()
        step.prepare()

    return step._replace(prepare=prepare), seconds


@cache
def _more_than_the_caches() -> Tensor:
    """256 MB; the largest L2 caches have 126."""
    return torch.empty(64 << 20, device=DEVICE)


def _overwrite_caches() -> None:
    _more_than_the_caches().zero_()


def errors(operation: Operation, implementation: str, case: Case) -> list[float]:
    """Relative errors of the loss and of each gradient against float64, at the values that the case's dtype holds."""

    def differentiated(loss: Loss, inputs: dict[str, Any]) -> list[Tensor]:
        leaves = [leaf.requires_grad_() for name in operation.leaves for leaf in tree_leaves(inputs[name])]
        value = loss(**inputs)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    truth = differentiated(operation.definition(case, implementation), in_float64(operation.make_inputs(case)))
    found = differentiated(_loss(operation.implementations[implementation], case), operation.make_inputs(case))
    return [relative_error(x, true) for x, true in zip(found, truth, strict=True)]


@cache
def compare(operation: Operation, implementation: str, case: Case) -> None:
    """Nothing is timed that computes another loss."""
    found = errors(operation, implementation, case)
    if not max(found) < LIMITS[case.dtype]:
        raise AssertionError(f"{implementation} is another loss than {operation.name}'s: relative errors {found}")


def result(
    operation: Operation,
    implementation: str,
    case: Case,
    pass_: str,
    seconds: float,
    eager_seconds: list[float],
    roof: float,
    peak_mb: float | None,
) -> dict[str, Any]:
    """What is kept of a measurement beside its times: `seconds` is their median, `eager_seconds` has the run of eager's
    before each, or nothing; `roof` is in GB/s ("copy") or TFLOP/s ("product").
    """
    kept: dict[str, Any] = {
        "operation": operation.name,
        "implementation": implementation,
        "pass": pass_,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "valid": case.valid,
        "options": case.form,
        "tokens_per_s": operation.tokens(case) / seconds,
    }
    work = operation.work(case, pass_)
    if work is not None:
        unit, size = ("gb_per_s", 1e9) if operation.roof == "copy" else ("tflop_per_s", 1e12)
        rate = work / seconds / size
        kept |= {unit: rate, "roof": roof, "of_roof": rate / roof}
    if eager_seconds:
        kept["eager_seconds"] = eager_seconds
    return kept if peak_mb is None else kept | {"peak_mb": peak_mb}
