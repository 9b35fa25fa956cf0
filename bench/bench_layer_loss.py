"""layer_loss over mapped layers beside what one would write without it, eager and compiled.

Liger-Kernel, TRL and torchtune have no loss on hidden states. torch.compile is given one layer, and run on each: the
graph of 32 would take it minutes.

Bytes are the floor: 2 elements a pair of the tokens that count are read, and backward writes a gradient for every
pair; so 3 elements a pair where all count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill
from bench.operation import Case, Loss, Operation, compiled, counted, normal, valid_positions
from fastdistill import reference
from fastdistill.testing import DEVICE

FORMS: dict[str, dict[str, Any]] = {
    "mse": {"metric": "mse", "normalize": "none"},
    "mse layer_norm": {"metric": "mse", "normalize": "layer_norm"},
    "mse teacher_rms": {"metric": "mse", "normalize": "teacher_rms"},
    "cosine": {"metric": "cosine", "normalize": "none"},
}


def make_inputs(case: Case) -> dict[str, Any]:
    layers, *state = case.shape
    states = {
        f"{model}_states": [
            normal(*state, seed=seed + layer, scale=2, dtype=case.torch_dtype) for layer in range(layers)
        ]
        for model, seed in (("student", 0), ("teacher", 1000))
    }
    return states | {"mask": valid_positions(state[0], state[1], case.valid)}


def distance(s: Tensor, t: Tensor, metric: str, normalize: str) -> Tensor:
    """Of each token, `[B, S]`."""
    s, t = s.float(), t.float()
    if metric == "cosine":
        return 1 - F.cosine_similarity(s, t, dim=-1)
    if normalize == "layer_norm":
        s, t = F.layer_norm(s, s.shape[-1:]), F.layer_norm(t, t.shape[-1:])
    error = F.mse_loss(s, t, reduction="none").mean(-1)
    return error / (t.square().mean(-1) + 1e-5) if normalize == "teacher_rms" else error


def layer(form: dict[str, str], valid: float, s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """The shortest composition in PyTorch."""
    if valid == 1:
        return distance(s, t, **form).mean()
    return (distance(s, t, **form) * mask).sum() / mask.sum()


def of_layers(
    one: Callable[..., Tensor], student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], mask: Tensor
) -> Tensor:
    return torch.stack([one(s, t, mask) for s, t in zip(student_states, teacher_states, strict=True)]).mean()


def eager(case: Case) -> Loss:
    return partial(of_layers, partial(layer, FORMS[case.form], case.valid))


def compiled_eager(case: Case) -> Loss:
    return partial(of_layers, compiled(partial(layer, FORMS[case.form], case.valid)))


def ours(case: Case, impl: str | None = None) -> Loss:
    def loss(student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], mask: Tensor) -> Tensor:
        counts = mask if case.valid < 1 else None
        return fastdistill.layer_loss(student_states, teacher_states, counts, **FORMS[case.form], impl=impl).loss

    return loss


def definition(case: Case, implementation: str) -> Loss:
    form = FORMS[case.form]
    return lambda **inputs: reference.layer_loss(**inputs, **form).loss


IMPLEMENTATIONS: dict[str, Callable[[Case], Loss]] = {
    "eager": eager,
    "torch.compile": compiled_eager,
    "fastdistill": ours,
}
if DEVICE == "cuda":  # on a CPU it is what "fastdistill" is
    IMPLEMENTATIONS["fastdistill, PyTorch path"] = partial(ours, impl="torch")


def work(case: Case, pass_: str) -> float:
    layers, sequences, positions, width = case.shape
    tokens = sequences * positions
    read, written = 2 * sequences * counted(positions, case.valid), 0 if pass_ == "forward" else tokens
    return layers * (read + written) * width * case.torch_dtype.itemsize


def gpu_cases() -> list[Case]:
    """One case in the middle, and from there one step along each axis at a time."""
    middle = Case((32, 4, 2048, 4096), "mse layer_norm", 1.0, "bfloat16")
    return [
        *(middle._replace(form=form) for form in FORMS),
        *(middle._replace(shape=shape) for shape in ((32, 1, 64, 4096), (32, 1, 2048, 4096), (6, 4, 2048, 768))),
        *(middle._replace(valid=valid) for valid in (0.5, 0.1)),
        middle._replace(dtype="float16"),
        middle._replace(shape=(12, 4, 2048, 4096), dtype="float32"),
    ]


OPERATION = Operation(
    name="layer_loss",
    make_inputs=make_inputs,
    leaves=("student_states",),
    implementations=IMPLEMENTATIONS,
    definition=definition,
    tokens=lambda case: case.shape[1] * case.shape[2],
    roof="copy",
    work=work,
    tiny_shape=(2, 2, 10, 8),
    cases={
        "tiny": [Case((2, 2, 10, 8), form, 1.0 if form == "mse" else 0.5) for form in FORMS],
        "cpu": [
            *(Case((12, 8, 512, 768), form) for form in ("mse layer_norm", "cosine")),
            Case((12, 8, 512, 768), "mse layer_norm", 0.1),
            Case((6, 2, 512, 768), "mse layer_norm"),
        ],
        "cuda": gpu_cases(),
    },
)
"""Layers, sequences, positions, width."""


def test_layer_loss(measure, case, implementation, pass_):
    measure(OPERATION, case, implementation, pass_)
