"""softmax_kl on logits beside eager PyTorch, torch.compile, Liger-Kernel, TRL and torchtune.

All divide by the number of tokens that count, and differ in this:

- "eager" and torch.compile multiply what is not counted by 0; "eager, counted rows" takes the counted rows first.
- Liger-Kernel's divergence takes log-probabilities, which PyTorch makes; its cross-entropy is added, and T^2 by us.
- TRL's `generalized_jsd_loss` (of GKDTrainer) has neither cross-entropy nor T^2, torchtune's losses no T either and no
  JSD: they do the forms without. torchtune's forward KL leaves out the teacher's entropy, which has no gradient.

Bytes are the floor: 2 elements a pair of logits that count are read, and backward writes a gradient for every pair; so
3 elements a pair where all count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill
from bench.operation import Cannot, Case, Loss, Operation, compiled, counted, normal, random_valid
from bench.peak_memory import peak_memory_mb
from bench.rivals import imported, torchtune_losses
from fastdistill import reference
from fastdistill.testing import DEVICE


class Form(NamedTuple):
    divergence: str
    temperature: float = 1.0
    ce_weight: float = 0.0

    @property
    def beta(self) -> float:
        """What Liger-Kernel and TRL call the divergence by."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}[self.divergence]


FORMS = {
    "forward_kl + ce at T = 2": Form("forward_kl", 2.0, 1.0),
    "forward_kl": Form("forward_kl"),
    "reverse_kl": Form("reverse_kl"),
    "jsd": Form("jsd"),
}


def make_inputs(case: Case) -> dict[str, Any]:
    tokens, vocab = case.shape
    mask = random_valid(tokens, case.valid)
    targets = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return {
        "student_logits": normal(tokens, vocab, seed=0, scale=2, dtype=case.torch_dtype),
        "teacher_logits": normal(tokens, vocab, seed=1, scale=2, dtype=case.torch_dtype),
        "targets": targets.masked_fill(~mask, -100),
        "mask": mask,
    }


def keywords(form: Form, valid: float, targets: Tensor, mask: Tensor) -> dict[str, Any]:
    """fastdistill's and its definition's; targets say which tokens count where they are needed, else the mask does."""
    which = {"targets": targets} if form.ce_weight else {"mask": mask if valid < 1 else None}
    return form._asdict() | which


def divergence(form: Form, log_s: Tensor, log_t: Tensor) -> Tensor:
    """Of each id, to be summed."""
    kl = partial(F.kl_div, log_target=True, reduction="none")  # of its second argument from its first
    if form.divergence == "forward_kl":
        return kl(log_s, log_t)
    if form.divergence == "reverse_kl":
        return kl(log_t, log_s)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0))
    return (kl(log_m, log_s) + kl(log_m, log_t)) / 2


def eager_loss(
    form: Form, valid: float, student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor
) -> Tensor:
    """As one writes it: a plain composition, in float32."""
    log_s, log_t = (
        F.log_softmax(x if form.temperature == 1 else x / form.temperature, -1, dtype=torch.float32)
        for x in (student_logits, teacher_logits)
    )
    per_token = divergence(form, log_s, log_t).sum(-1)
    loss = form.temperature**2 * (per_token.mean() if valid == 1 else (per_token * mask).sum() / mask.sum())
    return loss + form.ce_weight * F.cross_entropy(student_logits.float(), targets) if form.ce_weight else loss


def eager(case: Case) -> Loss:
    return partial(eager_loss, FORMS[case.form], case.valid)


def compiled_eager(case: Case) -> Loss:
    return compiled(eager(case))


def eager_counted(case: Case) -> Loss:
    if case.valid == 1:
        raise Cannot("where all rows count it is eager")

    def loss(mask: Tensor, **others: Tensor) -> Tensor:
        rows = {name: tensor[mask] for name, tensor in others.items()}
        return eager_loss(FORMS[case.form], 1, **rows, mask=mask)

    return loss


def ours(case: Case, impl: str | None = None) -> Loss:
    form = FORMS[case.form]

    def loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        how = keywords(form, case.valid, targets, mask)
        return fastdistill.softmax_kl(student_logits, teacher_logits, **how, impl=impl).loss

    return loss


def liger(case: Case) -> Loss:
    module = imported("liger_kernel.transformers")
    if DEVICE != "cuda":
        raise Cannot("Liger-Kernel's losses on logits are Triton kernels, which need a GPU")
    form = FORMS[case.form]
    jsd, cross_entropy = module.LigerJSD(beta=form.beta), module.LigerCrossEntropyLoss()

    def loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        t = form.temperature
        log_s, log_t = (F.log_softmax(x / t, -1, dtype=torch.float32) for x in (student_logits, teacher_logits))
        value = t**2 * jsd(log_s, log_t, targets if case.valid < 1 else None)
        return value + form.ce_weight * cross_entropy(student_logits, targets) if form.ce_weight else value

    return loss


def without_temperature(case: Case, library: str) -> Form:
    form = FORMS[case.form]
    if form.ce_weight or form.temperature != 1:
        raise Cannot(f"{library} has neither the cross-entropy in its loss nor T^2")
    return form


def trl(case: Case) -> Loss:
    function = imported("trl.experimental.gkd.gkd_trainer").GKDTrainer.generalized_jsd_loss
    form = without_temperature(case, "TRL")

    def loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        labels = targets if case.valid < 1 else None
        return function(student_logits, teacher_logits, labels, beta=form.beta)

    return loss


def torchtune_name(case: Case) -> str:
    form = without_temperature(case, "torchtune")
    kinds = {"forward_kl": "ForwardKL", "reverse_kl": "ReverseKL"}
    if form.divergence not in kinds:
        raise Cannot("torchtune has no JSD")
    return kinds[form.divergence]


def torchtune(case: Case) -> Loss:
    whole = getattr(torchtune_losses(), f"{torchtune_name(case)}Loss")()

    def loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return whole(student_logits, teacher_logits, targets)

    return loss


def torchtune_chunks(case: Case, chunks: int) -> Loss:
    """Takes lists of logits, and targets `[1, N]`."""
    return getattr(torchtune_losses(), f"{torchtune_name(case)}WithChunkedOutputLoss")(num_output_chunks=chunks)


def torchtune_chunked(case: Case, chunks: int = 8) -> Loss:
    chunked = torchtune_chunks(case, chunks)

    def loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        return chunked(student_logits.chunk(chunks), teacher_logits.chunk(chunks), targets[None])

    return loss


def definition(case: Case, implementation: str) -> Loss:
    form = FORMS[case.form]
    leaves_out_entropy = implementation.startswith("torchtune") and form.divergence == "forward_kl"

    def loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
        how = keywords(form, case.valid, targets, mask)
        output = reference.softmax_kl(student_logits, teacher_logits, **how, metrics=leaves_out_entropy)
        return output.loss + output.teacher_entropy if output.teacher_entropy is not None else output.loss

    return loss


IMPLEMENTATIONS: dict[str, Callable[[Case], Loss]] = {
    "eager": eager,
    "eager, counted rows": eager_counted,
    "torch.compile": compiled_eager,
    "fastdistill": ours,
    "Liger-Kernel": liger,
    "TRL": trl,
    "torchtune": torchtune,
    "torchtune, chunked": torchtune_chunked,
}
if DEVICE == "cuda":  # on a CPU it is what "fastdistill" is
    IMPLEMENTATIONS["fastdistill, PyTorch path"] = partial(ours, impl="torch")


def work(case: Case, pass_: str) -> float:
    tokens, vocab = case.shape
    read, written = 2 * counted(tokens, case.valid), 0 if pass_ == "forward" else tokens
    return (read + written) * vocab * case.torch_dtype.itemsize


def gpu_cases() -> list[Case]:
    """One case in the middle, and from there one step along each axis at a time; small batches of each vocabulary."""
    middle = Case((8192, 128256), "forward_kl + ce at T = 2", 1.0, "bfloat16")
    return [
        middle,
        *(middle._replace(shape=(2048, vocab)) for vocab in (32000, 50257, 128256, 151936)),
        *(middle._replace(shape=(64, vocab)) for vocab in (32000, 151936)),
        *(middle._replace(dtype=dtype) for dtype in ("float32", "float16")),
        *(middle._replace(valid=valid) for valid in (0.5, 0.1)),
        *(middle._replace(shape=(2048, 128256), form=form) for form in FORMS if FORMS[form].temperature == 1),
        middle._replace(shape=(2048, 128256), form="forward_kl", valid=0.1),
    ]


OPERATION = Operation(
    name="softmax_kl",
    make_inputs=make_inputs,
    leaves=("student_logits",),
    implementations=IMPLEMENTATIONS,
    definition=definition,
    tokens=lambda case: case.shape[0],
    roof="copy",
    work=work,
    tiny_shape=(10, 101),
    cases={
        "tiny": [Case((10, 101), form, 1.0 if form == "reverse_kl" else 0.5) for form in FORMS],
        "cpu": [
            Case((1024, 50257), "forward_kl + ce at T = 2"),
            *(Case((256, 50257), form) for form in ("forward_kl", "jsd")),
            Case((1024, 50257), "forward_kl", 0.1),
        ],
        "cuda": gpu_cases(),
    },
)


def test_softmax_kl(measure, case, implementation, pass_):
    measure(OPERATION, case, implementation, pass_)


def test_peak_memory_is_that_of_the_step_whatever_this_process_used_before():
    rows, vocab = 256, 16384
    torch.ones(40, rows, vocab)
    peak_mb = peak_memory_mb("softmax_kl", "eager", Case((rows, vocab), "forward_kl"))
    assert 3 < peak_mb * 1e6 / (4 * rows * vocab) < 20
