"""linear_softmax_kl, whose gradients go to hidden states and head, beside eager PyTorch and others on the same work.

The forms are softmax_kl's, and so is what TRL and torchtune lack. In this they differ:

- "eager" and torch.compile hold the logits of all tokens; "eager, counted rows" takes the counted tokens first.
- Liger-Kernel's is the chunked JSD, at the beta that is the divergence and with T^2 in its weight; its chunks are
  compiled PyTorch, which a CPU runs too. Its fused linear KL wants the teacher's probabilities of all tokens and is in
  gpu_linear_softmax_kl.py.
- TRL's is DistillationTrainer's, in tiles of the vocabulary. torchtune's takes logits in chunks that the caller makes.

fastdistill and Liger-Kernel make the gradients in forward, and their backward hands them over; hence there are TFLOP/s
of both passes together alone. They count the four products of the tokens that count, 2 N V (3 Ds + Dt).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import fastdistill
from bench import bench_softmax_kl as logits
from bench.bench_softmax_kl import FORMS, keywords, without_temperature
from bench.operation import Cannot, Case, Loss, Operation, compiled, counted, normal, random_valid
from bench.rivals import imported
from fastdistill.testing import DEVICE, random_targets


def make_inputs(case: Case) -> dict[str, Any]:
    tokens, vocab, *widths = case.shape
    inputs = {}
    for seed, (model, width) in enumerate(zip(("student", "teacher"), widths, strict=True)):
        inputs[f"{model}_hidden"] = normal(tokens, width, seed=2 * seed, dtype=case.torch_dtype)
        inputs[f"{model}_weight"] = normal(
            vocab, width, seed=2 * seed + 1, scale=2 / width**0.5, dtype=case.torch_dtype
        )
    mask = random_valid(tokens, case.valid)
    targets = random_targets(tokens, vocab=vocab, ignored=0, device=DEVICE)
    return inputs | {"targets": targets.masked_fill(~mask, -100), "mask": mask}


def eager_loss(
    of_logits: Loss,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    targets: Tensor,
    mask: Tensor,
) -> Tensor:
    return of_logits(
        student_logits=F.linear(student_hidden, student_weight),
        teacher_logits=F.linear(teacher_hidden, teacher_weight),
        targets=targets,
        mask=mask,
    )


def eager(case: Case) -> Loss:
    return partial(eager_loss, logits.eager(case))


def compiled_eager(case: Case) -> Loss:
    return compiled(eager(case))


def eager_counted(case: Case) -> Loss:
    if case.valid == 1:
        raise Cannot("where all rows count it is eager")
    whole = eager(case._replace(valid=1.0))

    def loss(
        student_hidden: Tensor, teacher_hidden: Tensor, targets: Tensor, mask: Tensor, **weights: Tensor
    ) -> Tensor:
        return whole(
            student_hidden=student_hidden[mask],
            teacher_hidden=teacher_hidden[mask],
            targets=targets[mask],
            mask=mask,
            **weights,
        )

    return loss


def ours(case: Case, impl: str | None = None) -> Loss:
    def loss(targets: Tensor, mask: Tensor, **heads: Tensor) -> Tensor:
        how = keywords(FORMS[case.form], case.valid, targets, mask)
        return fastdistill.linear_softmax_kl(**heads, **how, impl=impl).loss

    return loss


def liger(case: Case) -> Loss:
    form = FORMS[case.form]
    chunked = imported("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=form.ce_weight,
        weight_soft_loss=form.temperature**2,
        beta=form.beta,
        temperature=form.temperature,
    )

    def loss(targets: Tensor, mask: Tensor, **heads: Tensor) -> Tensor:
        return chunked(*(heads[name] for name in HEADS), targets)

    return loss


def trl(case: Case) -> Loss:
    module = imported("trl.trainer.distillation_trainer")
    if not hasattr(module, "_chunked_divergence_loss"):
        raise Cannot("this version of TRL has no loss on hidden states")
    form = without_temperature(case, "TRL")

    def loss(targets: Tensor, mask: Tensor, **heads: Tensor) -> Tensor:
        order = ("student_hidden", "teacher_hidden", "student_weight", "teacher_weight")
        value, _, _ = module._chunked_divergence_loss(*(heads[name] for name in order), mask, form.beta)
        return value

    return loss


def torchtune(case: Case, chunks: int = 8) -> Loss:
    of_logits = logits.torchtune_chunks(case, chunks)

    def loss(
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        targets: Tensor,
        mask: Tensor,
    ) -> Tensor:
        students = [F.linear(chunk, student_weight) for chunk in student_hidden.chunk(chunks)]
        teachers = [F.linear(chunk, teacher_weight) for chunk in teacher_hidden.chunk(chunks)]
        return of_logits(students, teachers, targets[None])

    return loss


def definition(case: Case, implementation: str) -> Loss:
    return partial(eager_loss, logits.definition(case, implementation))


HEADS = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")

IMPLEMENTATIONS: dict[str, Callable[[Case], Loss]] = {
    "eager": eager,
    "eager, counted rows": eager_counted,
    "torch.compile": compiled_eager,
    "fastdistill": ours,
    "Liger-Kernel": liger,
    "TRL": trl,
    "torchtune, chunked": torchtune,
}
if DEVICE == "cuda":  # on a CPU it is what "fastdistill" is
    IMPLEMENTATIONS["fastdistill, PyTorch path"] = partial(ours, impl="torch")


def work(case: Case, pass_: str) -> float | None:
    tokens, vocab, student_width, teacher_width = case.shape
    if pass_ != "both":
        return None
    return 2.0 * counted(tokens, case.valid) * vocab * (3 * student_width + teacher_width)


def gpu_cases() -> list[Case]:
    """One case in the middle, and from there one step along each axis at a time, with a model's widths."""
    middle = Case((8192, 128256, 2048, 4096), "forward_kl + ce at T = 2", 1.0, "bfloat16")
    return [
        middle,
        *(middle._replace(shape=(n, 128256, 2048, 4096)) for n in (64, 2048)),
        middle._replace(shape=(8192, 32000, 2048, 4096)),
        middle._replace(shape=(8192, 50257, 768, 768), dtype="float16"),
        middle._replace(shape=(8192, 151936, 1024, 2560)),
        middle._replace(shape=(2048, 50257, 768, 768), dtype="float32"),
        *(middle._replace(valid=valid) for valid in (0.5, 0.1)),
        *(middle._replace(shape=(2048, 128256, 2048, 4096), form=form) for form in ("forward_kl", "jsd")),
    ]


OPERATION = Operation(
    name="linear_softmax_kl",
    make_inputs=make_inputs,
    leaves=("student_hidden", "student_weight"),
    implementations=IMPLEMENTATIONS,
    definition=definition,
    tokens=lambda case: case.shape[0],
    roof="product",
    work=work,
    tiny_shape=(10, 101, 8, 12),
    cases={
        "tiny": [Case((10, 101, 8, 12), form, 0.5) for form in ("forward_kl + ce at T = 2", "forward_kl")],
        "cpu": [
            Case((512, 50257, 768, 768), "forward_kl + ce at T = 2"),
            Case((256, 50257, 768, 768), "forward_kl"),
            Case((512, 50257, 768, 768), "forward_kl", 0.1),
        ],
        "cuda": gpu_cases(),
    },
)


def test_linear_softmax_kl(measure, case, implementation, pass_):
    measure(OPERATION, case, implementation, pass_)
