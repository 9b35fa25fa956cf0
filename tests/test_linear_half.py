"""linear_softmax_kl in half precisions, multiplied as GPUs multiply them; on a CPU their products are stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import linear_chunks, linear_softmax_kl, products, reference
from fastdistill.checks import DIVERGENCES, REDUCTIONS
from fastdistill.heads import Gradients, Head
from fastdistill.products import Precision, adds_up, widens
from fastdistill.rows import TokenRows, token_rows
from fastdistill.testing import (
    DEVICE,
    INCOMING_GRADIENTS,
    assert_matches,
    assert_value_close,
    differentiate,
    impls_of,
    in_float64,
    random_heads,
    random_mask,
    random_normal,
    random_targets,
    relative_error,
)
from tests.half_products import half_products

HEAD = ("student_hidden", "student_weight", "student_bias")
N, V, D = 24, 129, 16

each_impl = pytest.mark.parametrize("impl", impls_of("linear_softmax_kl"))
each_half = pytest.mark.parametrize("dtype", products.HALVES, ids=str)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture
def widening() -> Iterator[None]:
    """Products come in float32: a GPU's own, which are tested as they are, or stood in for."""
    with half_products(widening=True) if DEVICE == "cpu" else nullcontext():
        yield


@pytest.fixture
def narrow(monkeypatch) -> Iterator[None]:
    """Products come in the half precision itself, as where `widens` says no."""
    if DEVICE != "cpu":
        for trial in ("widens", "adds_up"):
            monkeypatch.setattr(products, trial, lambda dtype, device: False)
    with half_products(widening=False) if DEVICE == "cpu" else nullcontext():
        yield


def heads(dtype: torch.dtype, **sizes: Any) -> dict[str, Any]:
    sizes = {"vocab": V, "width": D, "teacher_width": D + 3, "bias": True, **sizes}
    arguments = random_heads(N, **sizes, dtype=dtype)
    return arguments | {"targets": random_targets(N, vocab=sizes["vocab"]), "ce_weight": 0.5}


def dloss_for(reduction: str, dloss: float = 1.0) -> float | Tensor:
    return dloss * random_normal(N) if reduction == "none" else dloss


CASES: dict[str, dict[str, Any]] = {
    "both": {"metrics": True},
    "kl_alone": {"ce_weight": 0.0},
    "ce_alone": {"kl_weight": 0.0},
    "mask": {"mask": random_mask(N, dtype=torch.float32), "temperature": 3.0},
    "large_weights": {"mask": 1e5 * random_mask(N, dtype=torch.float32), "num_tokens": 1e8, "kl_weight": 100.0},
    "small_weights": {"mask": 1e-6 * random_mask(N, dtype=torch.float32), "temperature": 0.5},
    "wide_apart": {"mask": torch.logspace(-3, 3, N, device=DEVICE)},
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_impl
@each_half
@each_reduction
@each_case
def test_every_keyword_matches_the_definition(case, reduction, dtype, impl, widening):
    arguments = heads(dtype) | case | {"reduction": reduction}
    function = partial(linear_softmax_kl, impl=impl, max_chunk_bytes=60 * 4 * V)  # a few tokens, and a rest
    least = 1e-8 if case is CASES["large_weights"] and reduction != "mean" else 1.0  # or the truth is past 65504
    assert_matches(function, reference.linear_softmax_kl, arguments, HEAD, dloss_for(reduction, least))


@each_impl
@each_half
@each_divergence
@pytest.mark.parametrize("dloss", INCOMING_GRADIENTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_incoming_gradient_scales_the_gradient(reduction, dloss, divergence, dtype, impl, widening):
    arguments = heads(dtype) | {"divergence": divergence, "reduction": reduction}
    per_token = N if reduction == "none" else 1  # float16 gradients stay below 65504
    function = partial(linear_softmax_kl, impl=impl)
    assert_matches(function, reference.linear_softmax_kl, arguments, HEAD, dloss_for(reduction, dloss / per_token))


@each_impl
@each_half
@each_divergence
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_wider_products_it_is_no_worse_than_eager(reduction, divergence, dtype, impl, narrow):
    arguments = heads(dtype) | {"divergence": divergence, "reduction": reduction}
    dloss = dloss_for(reduction)
    output, gradients = differentiate(partial(linear_softmax_kl, impl=impl), arguments, HEAD, dloss)
    eager, eager_gradients = differentiate(reference.linear_softmax_kl, arguments, HEAD, dloss)
    _, truths = differentiate(reference.linear_softmax_kl, in_float64(arguments), HEAD, dloss)
    assert_value_close(output.loss, eager.loss)
    for gradient, eager_gradient, truth in zip(gradients, eager_gradients, truths, strict=True):
        assert relative_error(gradient, truth) <= relative_error(eager_gradient, truth) + 1e-3


@each_impl
@each_half
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("slice_rows", [1, 50, 1000])
def test_products_that_cannot_be_added_in_place_are_added_afterwards(slice_rows, reduction, dtype, impl, monkeypatch):
    """A slice of the vocabulary at a time."""
    monkeypatch.setattr(products, "SLICE_BYTES", slice_rows * 4 * D)
    with half_products(widening=True, addmm=None) if DEVICE == "cpu" else nullcontext():
        if DEVICE != "cpu":
            monkeypatch.setattr(products, "adds_up", lambda dtype, device: False)
        arguments = heads(dtype) | {"reduction": reduction}
        function = partial(linear_softmax_kl, impl=impl, max_chunk_bytes=60 * 4 * V)
        assert_matches(function, reference.linear_softmax_kl, arguments, HEAD, dloss_for(reduction))


@pytest.mark.parametrize("addmm", ["adds", None])
@each_half
def test_sums_of_products_keep_float32s_digits_and_slices_their_size(dtype, addmm, monkeypatch):
    sizes: list[int] = []
    product = products.product
    monkeypatch.setattr(products, "product", lambda a, b, to: sizes.append(len(a)) or product(a, b, to))
    monkeypatch.setattr(products, "SLICE_BYTES", 50 * 4 * D)
    a, b = random_normal(V, N, dtype=dtype), random_normal(N, D, seed=1, dtype=dtype)
    total = random_normal(V, D, seed=2)
    expected = total.double() + a.double() @ b.double()
    with half_products(widening=True, addmm=addmm) if DEVICE == "cpu" else nullcontext():
        if DEVICE != "cpu" and not addmm:
            monkeypatch.setattr(products, "adds_up", lambda dtype, device: False)
        products.add_product_(total, a, b)
    assert relative_error(total, expected) < 1e-6
    assert sizes == ([] if addmm else [50, 50, V - 100])


def near_the_teacher(dtype: torch.dtype) -> dict[str, Any]:
    """A student that is 5e-3 nats from its teacher."""
    arguments = random_heads(64, vocab=8192, width=128)
    arguments["student_hidden"] = arguments["teacher_hidden"] + 0.05 * random_normal(64, 128, seed=5)
    arguments["student_weight"] = arguments["teacher_weight"]
    return {name: x.to(dtype) for name, x in arguments.items()}


@each_impl
def test_near_the_teacher_the_gradient_is_that_of_unrounded_logits(impl, widening):
    arguments = near_the_teacher(torch.bfloat16)
    truth, truths = differentiate(reference.linear_softmax_kl, in_float64(arguments), HEAD[:2])
    _, gradients = differentiate(partial(linear_softmax_kl, impl=impl), arguments, HEAD[:2])
    _, eager_gradients = differentiate(reference.linear_softmax_kl, arguments, HEAD[:2])
    assert truth.kl.item() == pytest.approx(5e-3, rel=0.1)
    errors, eager_errors = (
        [relative_error(x, true) for x, true in zip(made, truths, strict=True)] for made in (gradients, eager_gradients)
    )
    print(f"relative errors of dH and dW: {errors}, of eager PyTorch in bfloat16: {eager_errors}")
    assert max(errors) < 0.005
    assert min(eager_errors) > 0.1


@each_impl
@pytest.mark.parametrize("dtype", [*products.HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_casts_once_and_gradients_have_the_dtype_of_their_tensors(reduction, dtype, impl, widening):
    """Masters in float32 beside hidden states of any precision."""
    arguments = heads(torch.float32) | {"reduction": reduction}
    arguments["student_hidden"] = arguments["student_hidden"].to(dtype)
    cast = {
        name: x.bfloat16() if name.endswith(("hidden", "weight")) and isinstance(x, Tensor) else x
        for name, x in arguments.items()
    }
    function = partial(linear_softmax_kl, impl=impl)
    expected, expected_gradients = differentiate(function, cast, HEAD)
    with torch.autocast(DEVICE, torch.bfloat16):
        output, gradients = differentiate(function, arguments, HEAD)
    assert torch.equal(output.loss, expected.loss)
    for name, gradient, expected_gradient in zip(HEAD, gradients, expected_gradients, strict=True):
        assert gradient.dtype == arguments[name].dtype, name
        assert relative_error(gradient, expected_gradient) < 2**-8, name
    assert gradients[1].bfloat16().equal(expected_gradients[1])
    assert not gradients[1].equal(expected_gradients[1].float())  # of float32 it keeps float32's digits


@each_impl
def test_autocast_leaves_float64_alone(impl, widening):
    arguments = in_float64(heads(torch.float32))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_matches(partial(linear_softmax_kl, impl=impl), reference.linear_softmax_kl, arguments, HEAD)


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_sums_beyond_its_range_are_no_gradients_beyond_it(reduction, impl, widening):
    """2048 tokens with one target and hidden states of 50: the head's gradient is past 65504 before the mean."""
    tokens = 2048
    arguments: dict[str, Any] = random_heads(tokens, vocab=V, width=D, bias=True, dtype=torch.float16)
    arguments["student_hidden"] = arguments["student_hidden"].abs() + 50
    arguments["student_weight"] *= 0.01
    arguments |= {"targets": torch.full((tokens,), 7, device=DEVICE), "ce_weight": 1.0, "reduction": reduction}
    dloss = torch.full((tokens,), 1 / tokens, device=DEVICE) if reduction == "none" else 1.0
    _, gradients = differentiate(partial(linear_softmax_kl, impl=impl), arguments, HEAD[1:], dloss)
    _, truths = differentiate(reference.linear_softmax_kl, in_float64(arguments), HEAD[1:], dloss)
    assert truths[0].abs().max() * tokens > 65504
    for gradient, truth in zip(gradients, truths, strict=True):
        assert relative_error(gradient, truth) < 1e-3


WRONG_AND_SURE: dict[str, dict[str, Any]] = {
    "kl": {},
    "hot": {"temperature": 8.0},
    "cold": {"temperature": 0.25, "temperature_squared": False},
    "ce": {"kl_weight": 0.0, "ce_weight": 3.0},
    "both": {"kl_weight": 0.01, "ce_weight": 20.0, "mask": torch.full((4,), 300.0, device=DEVICE)},
    "uneven": {"mask": torch.tensor([1e-3, 0.0, 7.0, 1.0], device=DEVICE)},
}


@each_impl
@pytest.mark.parametrize("case", WRONG_AND_SURE.values(), ids=WRONG_AND_SURE.keys())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_gradients_of_logits_fill_the_range_that_is_theirs(reduction, case, impl, widening, monkeypatch):
    """A student that is sure of what its teacher and the target exclude has the largest gradients there are."""
    largest: list[float] = []
    add = Gradients.add

    def recording(self: Gradients, chunk: TokenRows, hidden: Tensor, dlogits: Tensor) -> None:
        assert dlogits.dtype == torch.float16
        largest.append(dlogits.abs().max().item())
        add(self, chunk, hidden, dlogits)

    monkeypatch.setattr(Gradients, "add", recording)
    hidden, weight = torch.eye(4, device=DEVICE).half(), 100 * torch.eye(4, device=DEVICE).half()
    arguments: dict[str, Any] = {"student_hidden": hidden, "student_weight": weight, "targets": torch.arange(4).roll(1)}
    arguments |= {"teacher_hidden": hidden.roll(1, 0), "teacher_weight": weight, "reduction": reduction, "impl": impl}
    arguments["targets"] = arguments["targets"].to(DEVICE)
    dloss = torch.tensor([-1.0, 2.0, -3.0, 0.5], device=DEVICE) if reduction == "none" else 5.0
    differentiate(linear_softmax_kl, arguments | case, HEAD[:2], dloss)
    assert 128 <= max(largest) <= 256


@each_impl
def test_without_wider_products_a_chunks_sums_stay_in_float16(impl, narrow):
    """As many tokens as a chunk has on the GPUs that this is for, all with one target, and hidden states of 50."""
    tokens = 256
    arguments: dict[str, Any] = random_heads(tokens, vocab=V, width=D, dtype=torch.float16)
    arguments["student_hidden"] = arguments["student_hidden"].abs() + 50
    arguments["student_weight"] *= 0.01
    arguments |= {"targets": torch.full((tokens,), 7, device=DEVICE), "ce_weight": 1.0}
    _, (gradient,) = differentiate(partial(linear_softmax_kl, impl=impl), arguments, HEAD[1:2])
    _, (truth,) = differentiate(reference.linear_softmax_kl, in_float64(arguments), HEAD[1:2])
    assert 256 * truth.abs().max() * tokens > 65504
    assert relative_error(gradient, truth) < 2e-3


@each_impl
@pytest.mark.parametrize(
    "nothing", [{"kl_weight": 0.0, "ce_weight": 0.0}, {"mask": torch.zeros(N, device=DEVICE)}], ids=str
)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_loss_of_nothing_has_gradient_0(reduction, nothing, impl, widening):
    arguments = heads(torch.float16) | {"reduction": reduction, "impl": impl, "drop_masked": False} | nothing
    output, gradients = differentiate(linear_softmax_kl, arguments, HEAD)
    assert (output.loss == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


@each_half
@pytest.mark.parametrize("logits", ["wide", "own"])
@pytest.mark.parametrize("has_teacher", [True, False])
@pytest.mark.parametrize("gradient", [True, False])
def test_the_kernels_buffers_stay_within_the_bytes_they_are_given(gradient, has_teacher, logits, dtype):
    """Rows are aligned; the gradient is over the logits where it has their dtype, and nowhere else."""
    precision = Precision(dtype, torch.float32 if logits == "wide" else dtype)
    arguments = heads(dtype, vocab=1000, teacher_vocab=900)
    student, teacher = (
        Head(*(arguments[f"{model}_{part}"] for part in ("hidden", "weight", "bias")), vocab=vocab, precision=precision)
        for model, vocab in (("student", 1000), ("teacher", 900))
    )
    rows = token_rows(torch.ones(N, device=DEVICE), None, drop_uncounted=False)
    budget = 40_000
    form = linear_chunks.LossForm("forward_kl", 900, False, 1, True, True, None, False, budget, "triton")
    buffers = linear_chunks._Buffers.of(student, teacher if has_teacher else None, rows, form, gradient=gradient)
    own_gradient = gradient and logits == "wide"
    assert buffers.gradient.dtype == (dtype if own_gradient else precision.logits)
    assert (buffers.gradient.data_ptr() == buffers.student.data_ptr()) is not own_gradient
    tensors = [x for x in (buffers.student, buffers.teacher, buffers.gradient) if x is not None]
    held = {x.untyped_storage().data_ptr(): x for x in tensors}
    row_bytes = sum(x.stride(0) * x.itemsize for x in held.values())
    assert sum(x.untyped_storage().nbytes() for x in held.values()) == buffers.rows * row_bytes
    assert buffers.rows * row_bytes <= budget < (buffers.rows + 1) * row_bytes
    assert [tuple(x.shape) for x in (buffers.student, buffers.gradient)] == [(buffers.rows, 1000)] * 2
    assert (buffers.teacher is not None) is has_teacher
    assert all(x.stride(0) * x.itemsize % 128 == 0 for x in held.values())


@each_half
@pytest.mark.parametrize(("budget", "rows", "block"), [(1, 1, 1), (100_000, 5, 4), (400_000, 19, 18)])
def test_pytorchs_buffers_and_its_block_stay_within_the_bytes_they_are_given(budget, rows, block, dtype):
    """A token has 9600 bytes, one of a block 12 000 more."""
    arguments, precision = heads(dtype, vocab=1000, teacher_vocab=900), Precision(dtype, torch.float32)
    student, teacher = (
        Head(*(arguments[f"{model}_{part}"] for part in ("hidden", "weight", "bias")), vocab=vocab, precision=precision)
        for model, vocab in (("student", 1000), ("teacher", 900))
    )
    tokens = token_rows(torch.ones(64, device=DEVICE), None, drop_uncounted=False)
    form = linear_chunks.LossForm("forward_kl", 900, False, 1, True, True, None, False, budget, "torch")
    buffers = linear_chunks._Buffers.of(student, teacher, tokens, form, gradient=True)
    assert buffers.scratch is not None
    assert (buffers.rows, buffers.scratch.memory.shape) == (rows, (3, block * 1000))
    held = buffers.student, buffers.teacher, buffers.gradient
    assert [(x.shape, x.dtype) for x in held if x is not None] == [
        ((rows, 1000), torch.float32),
        ((rows, 900), torch.float32),
        ((rows, 1000), dtype),
    ]


@each_impl
@each_half
def test_tokens_that_do_not_count_may_hold_anything(dtype, impl, widening):
    arguments = heads(dtype)
    left_out = arguments["targets"] == -100
    function = partial(linear_softmax_kl, impl=impl, drop_masked=False)
    clean, clean_gradients = differentiate(function, arguments, HEAD)
    spoilt = {name: arguments[name].masked_fill(left_out[:, None], torch.nan) for name in arguments if "hidden" in name}
    output, gradients = differentiate(function, arguments | spoilt, HEAD)
    assert left_out.any()
    assert torch.equal(output.loss, clean.loss)
    assert all(map(torch.equal, gradients, clean_gradients))


@each_impl
@each_half
def test_a_head_in_use_is_not_copied(dtype, impl, widening):
    arguments = heads(dtype)
    precision = Precision.of(arguments["student_hidden"], arguments["student_weight"], torch.float32, None)
    assert precision == (dtype, torch.float32)
    head = Head(*(arguments[name] for name in HEAD), vocab=V, precision=precision)
    assert head.weight.data_ptr() == arguments["student_weight"].data_ptr()


needs_stand_in = pytest.mark.skipif(DEVICE != "cpu", reason="products are stood in for on the CPU alone")


@needs_stand_in
@each_half
def test_products_that_only_seem_wider_are_found_out(dtype):
    def found() -> tuple[bool, bool]:
        return widens(dtype, torch.device("cpu")), adds_up(dtype, torch.device("cpu"))

    assert found() == (False, False)
    with half_products(widening=True):
        assert found() == (True, True)
    with half_products(widening=True, rounded=lambda x: x.to(dtype).float()):
        assert found() == (False, False)
    for addmm in ("forgets", None):
        with half_products(widening=True, addmm=addmm):
            assert found() == (True, False)
    assert found() == (False, False)


@needs_stand_in
def test_what_each_device_multiplies_in():
    half, full, double = (torch.ones(1, 1, dtype=dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    assert Precision.of(half, half, torch.float32, None) == (torch.float32, torch.float32)
    with half_products(widening=False):
        assert Precision.of(half, half, torch.float32, None) == (torch.float16, torch.float16)
    with half_products(widening=True):
        assert Precision.of(half, half, torch.float32, None) == (torch.float16, torch.float32)
        assert Precision.of(half, full, torch.float32, None) == (torch.float32, torch.float32)
        assert Precision.of(half, half.bfloat16(), torch.float32, None) == (torch.float32, torch.float32)
        assert Precision.of(full, full, torch.float32, torch.bfloat16) == (torch.bfloat16, torch.float32)
        assert Precision.of(full, double, torch.float32, None) == (torch.float32, torch.float32)
        assert Precision.of(double, half, torch.float64, torch.float16) == (torch.float64, torch.float64)


@pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.get_device_capability()[0] < 8, reason="of GPUs that multiply bfloat16 natively"
)
@each_half
def test_gpus_with_tensor_cores_for_it_return_products_in_float32(dtype):
    assert widens(dtype, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize(
    ("capability", "rows"),
    [((6, 0), 256), ((7, 5), 256), ((8, 0), 1024), ((8, 9), 1024), ((9, 0), 2048), ((12, 0), 2048), ((5, 2), 256)],
)
def test_tokens_of_a_chunk_follow_the_gpu_unless_memory_is_named(capability, rows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert linear_chunks.chunk_and_block(None, 1 << 20, 0, 0, gpu) == (rows, 0)
    assert linear_chunks.chunk_and_block(7 << 20, 1 << 20, 0, 0, gpu) == (7, 0)
    assert linear_chunks.chunk_and_block(None, 1 << 20, 0, 0, cpu) == (256, 0)
    assert linear_chunks.chunk_and_block(1, 1 << 20, 0, 0, cpu) == (1, 0)


@pytest.mark.parametrize(("most", "chunk", "block"), [(1, 1, 1), (8, 4, 1), (29, 9, 5), (30, 10, 5), (100, 80, 5)])
def test_a_chunk_and_what_is_made_of_a_block_of_it_fit_together(most, chunk, block):
    """A token takes 1, one of a block of at most 5 takes 4 more."""
    assert linear_chunks.chunk_and_block(most, 1, 4, 5, torch.device("cpu")) == (chunk, block)
