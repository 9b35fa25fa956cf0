"""softmax_kl's kernels at their edges: rows in parts, unaligned rows, ties, offsets past int32, the one-launch form."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import ops, reference, softmax_kl
from fastdistill.checks import DIVERGENCES
from fastdistill.kernels import softmax_kl as kernels
from fastdistill.kernels.launch import LaunchPlan
from fastdistill.testing import (
    DEVICE,
    assert_gradient_close,
    assert_matches,
    assert_value_close,
    differentiate,
    in_float64,
    random_logits,
    random_mask,
    random_normal,
    random_targets,
)

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
STUDENT = ("student_logits",)


def assert_kernel_matches(arguments: dict[str, Any], dloss: float | Tensor = 1.0) -> None:
    assert_matches(partial(softmax_kl, impl="triton"), reference.softmax_kl, arguments, STUDENT, dloss)


@pytest.mark.parametrize(
    ("vocab", "divergence"), [*((50257, divergence) for divergence in DIVERGENCES), (151936, "forward_kl")]
)
def test_a_few_rows_of_a_large_vocabulary_match_the_definition(vocab, divergence):
    arguments = random_logits(2, vocab) | {"targets": random_targets(2, vocab=vocab, ignored=0), "ce_weight": 0.5}
    assert_kernel_matches(arguments | {"divergence": divergence, "temperature": 2.0, "metrics": True})


@each_divergence
@pytest.mark.parametrize(("vocab", "splits"), [(1, 4), (129, 2), (4097, 1), (4097, 16)])  # a part has 0 tiles, 1, many
def test_a_row_in_parts_matches_the_definition(vocab, splits, divergence, monkeypatch):
    monkeypatch.setattr(kernels, "row_plan", lambda rows, row_bytes: LaunchPlan(1, splits))
    arguments = random_logits(3, vocab + 5, teacher_vocab=vocab, dtype=torch.float16)
    arguments |= {"targets": random_targets(3, vocab=vocab + 5, ignored=0), "mask": random_mask(3, dtype=torch.float32)}
    arguments |= {"divergence": divergence, "temperature": 3.0, "ce_weight": 0.5, "metrics": True}
    assert_kernel_matches(arguments)


@each_divergence
@pytest.mark.parametrize("banned", ["student", "teacher"])
def test_a_row_in_parts_may_hold_minus_infinity_in_one_alone(banned, divergence, monkeypatch):
    """The first of two parts is nothing but -inf, on one side."""
    monkeypatch.setattr(kernels, "row_plan", lambda rows, row_bytes: LaunchPlan(1, 2))
    arguments = random_logits(16, 1024) | {"divergence": divergence, "metrics": True}
    arguments[f"{banned}_logits"][:, :512] = -torch.inf
    assert_kernel_matches(arguments | {"reduction": "none"})


@pytest.mark.parametrize("target", [0, 2, 3, 700, 1023, 1024, 1030, 1034])
@pytest.mark.parametrize("splits", [1, 4])
def test_the_targets_column_has_its_gradient_wherever_it_lies(splits, target, monkeypatch):
    """In ragged ends, in whole vectors, in the teacher's range and beyond it."""
    monkeypatch.setattr(kernels, "row_plan", lambda rows, row_bytes: LaunchPlan(1, splits))
    arguments = random_logits(3, 1035, teacher_vocab=1027) | {"targets": torch.full((3,), target, device=DEVICE)}
    for weights in ({"kl_weight": 0.5, "ce_weight": 0.5}, {"kl_weight": 0.0, "ce_weight": 0.5}):
        assert_kernel_matches(arguments | weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("student_offset", "teacher_offset"), [(0, 0), (1, 1), (3, 5), (7, 0), (0, 4)])
def test_rows_may_begin_anywhere_and_nothing_beside_them_is_read(student_offset, teacher_offset, dtype):
    rows, vocab = 3, 4099
    arguments: dict[str, Any] = {"targets": random_targets(rows, vocab=vocab), "ce_weight": 0.5, "metrics": True}
    offsets = {"student_logits": student_offset, "teacher_logits": teacher_offset}
    for name, logits in random_logits(rows, vocab, dtype=dtype).items():
        buffer = torch.full((offsets[name] + rows * vocab + 3,), torch.nan, dtype=dtype, device=DEVICE)
        place = buffer[offsets[name] :][: rows * vocab].view(rows, vocab)
        arguments[name] = place.copy_(logits)
    assert_kernel_matches(arguments)


def test_offsets_may_exceed_int32():
    """Bit for bit what nearer rows give that begin as the far ones do, on a multiple of 16 bytes."""
    vocab, near, far = 129, 136, 2**31 + 8
    values = random_logits(2, 1, vocab, dtype=torch.float16)
    results = []
    for stride in (near, far):
        logits = {}
        for name, value in values.items():
            buffer = torch.empty(stride + vocab, dtype=torch.float16, device=DEVICE)
            logits[name] = buffer.as_strided((2, 1, vocab), (stride, vocab, 1)).copy_(value)
        results.append(differentiate(partial(softmax_kl, impl="triton"), logits, STUDENT))
    (expected, (expected_gradient,)), (output, (gradient,)) = results
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("vocab", [3, 129, 1027])
def test_of_equal_largest_logits_the_first_id_counts(vocab, splits, monkeypatch):
    monkeypatch.setattr(kernels, "row_plan", lambda rows, row_bytes: LaunchPlan(1, splits))
    rows = 24
    logits = {name: (x * 0.6).round() for name, x in random_logits(rows, vocab).items()}
    output = softmax_kl(**logits, metrics=True, reduction="none", impl="triton")
    first = {name: [row.index(max(row)) for row in x.tolist()] for name, x in logits.items()}
    expected = [float(s == t) for s, t in zip(first["student_logits"], first["teacher_logits"], strict=True)]
    assert output.top1_agreement.tolist() == expected  # type: ignore[union-attr]
    shared_tops = sum(x.count(x[0]) > 1 for x in first.values())
    assert vocab > 3 or shared_tops == 2


@pytest.mark.parametrize(
    ("dtype", "divergence", "terms", "power"),
    [
        *((torch.float16, divergence, "kl", 1) for divergence in DIVERGENCES),
        *((torch.float32, divergence, "both", 2) for divergence in DIVERGENCES),
        (torch.float16, "forward_kl", "ce", 1),
        (torch.float32, "jsd", "both", 0),
    ],
)
def test_one_launch_gives_what_two_give(dtype, divergence, terms, power):
    rows, vocab, temperature = 5, 4099, power or 3.0
    arguments = random_logits(rows, vocab, teacher_vocab=vocab - 7, dtype=dtype)
    arguments["student_logits"][1, :3] = arguments["teacher_logits"][1, 2:5] = -torch.inf
    targets = random_targets(rows, vocab=vocab, ignored=0)
    weights, dloss = random_mask(rows, dtype=torch.float32), random_normal(rows)
    keywords = {"kl_weight": 0.0 if terms == "ce" else 0.7, "ce_weight": 0.0 if terms == "kl" else 0.3}
    arguments |= {"targets": targets, "mask": weights, "temperature": temperature, "divergence": divergence}
    arguments |= {"reduction": "none", "metrics": True, **keywords}
    truth, (true_gradient,) = differentiate(reference.softmax_kl, in_float64(arguments), STUDENT, dloss.double())
    _, (eager_gradient,) = differentiate(reference.softmax_kl, arguments, STUDENT, dloss)

    student, gradient = arguments["student_logits"], torch.full_like(arguments["student_logits"], torch.nan)
    scalars = [temperature, keywords["kl_weight"] * temperature**2, keywords["ce_weight"], 0.5]
    values, statistics = kernels.softmax_kl_one_launch(
        dloss,
        student,
        arguments["teacher_logits"],
        targets,
        weights,
        torch.tensor(scalars, device=DEVICE),
        gradient,
        divergence=divergence,
        shared_vocab=vocab - 7,
        metrics=True,
        power=power,
        kl_in_loss=terms != "ce",
        ce_in_loss=terms != "kl",
    )
    for name, value in zip(truth._fields, values, strict=False):
        assert_value_close(value, getattr(truth, name), name)
    assert statistics.shape == (ops.STATISTICS, rows)
    assert_gradient_close(gradient, true_gradient, eager_gradient)


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    """Triton launches on the current GPU, whichever holds the tensors."""
    current: list[Tensor] = []
    device_of = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: current.append(tensor) or device_of(tensor))
    arguments = random_logits(2, 11)
    differentiate(partial(softmax_kl, impl="triton"), arguments, STUDENT)
    assert len(current) == 2
    assert all(tensor.device == arguments["student_logits"].device for tensor in current)


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])  # with 0 the target's logit is read for its value alone
def test_one_launch_may_write_over_the_students_logits(ce_weight):
    rows, vocab = 5, 4099
    student, teacher = random_logits(rows, vocab).values()
    targets, weights = random_targets(rows, vocab=vocab, ignored=0), torch.ones(rows, device=DEVICE)
    scalars = torch.tensor([1.0, 1.0, ce_weight, 0.5], device=DEVICE)

    def launch(gradient: Tensor) -> Tensor:
        return kernels.softmax_kl_one_launch(
            weights,
            student,
            teacher,
            targets,
            weights,
            scalars,
            gradient,
            divergence="forward_kl",
            shared_vocab=vocab,
            metrics=False,
            power=1,
            kl_in_loss=True,
            ce_in_loss=ce_weight != 0,
        )[0]

    gradient = torch.empty_like(student)
    values = launch(gradient)
    assert torch.equal(launch(student), values)
    assert torch.equal(student, gradient)


def test_the_first_of_equal_logits_is_found_across_a_rows_ragged_ends(monkeypatch):
    """An early and a late place in one lane, in each order of whole vectors and ragged ends."""
    monkeypatch.setattr(kernels, "row_plan", lambda rows, row_bytes: LaunchPlan(1, 1))
    rows, vocab = 8, 131  # each row begins at another place in a vector
    for early, late in ((0, 2), (1, 4), (5, vocab - 1), (6, vocab - 2), (7, vocab - 1)):
        one, both = torch.zeros(2, rows, vocab, device=DEVICE)
        one[:, early] = both[:, early] = both[:, late] = 3.0
        for student, teacher in ((one, both), (both, one)):
            output = softmax_kl(student, teacher, metrics=True, reduction="sum", impl="triton")
            assert output.top1_agreement == rows


@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [0, 5])  # rows of another length beside each other, and aligned ones
def test_the_gradient_of_float32_logits_may_come_in_a_half_precision(padding, half, ce_weight):
    """It is what float32 would be, rounded once; the logits stay."""
    rows, vocab = 5, 4099
    student, teacher = random_logits(rows, vocab).values()
    logits = student.clone()
    weights, dloss = random_mask(rows, dtype=torch.float32), 256 * random_normal(rows)
    scalars = torch.tensor([2.0, 4.0, ce_weight, 0.5], device=DEVICE)

    def launch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        gradient = torch.full((rows, vocab + padding), torch.nan, dtype=dtype, device=DEVICE)[:, :vocab]
        values, _ = kernels.softmax_kl_one_launch(
            dloss,
            student,
            teacher,
            random_targets(rows, vocab=vocab, ignored=0),
            weights,
            scalars,
            gradient,
            divergence="forward_kl",
            shared_vocab=vocab,
            metrics=False,
            power=2,
            kl_in_loss=True,
            ce_in_loss=ce_weight != 0,
        )
        return values, gradient

    (values, gradient), (full_values, full_gradient) = launch(half), launch(torch.float32)
    assert torch.equal(values, full_values)
    assert torch.equal(gradient, full_gradient.to(half))
    assert torch.equal(student, logits)
