"""linear_softmax_kl against its definition, which holds all logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.profiler import profile

from fastdistill import linear_softmax_kl, reference
from fastdistill.checks import DIVERGENCES, REDUCTIONS
from fastdistill.testing import (
    DEVICE,
    DTYPES,
    INCOMING_GRADIENTS,
    USES_OF_A_LOSS,
    assert_matches,
    differentiate,
    differentiate_twice,
    impls_of,
    in_float64,
    random_heads,
    random_mask,
    random_normal,
    random_targets,
)

IMPLS = impls_of("linear_softmax_kl")
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_drop_masked = pytest.mark.parametrize("drop_masked", [True, False], ids=["drop", "keep"])

HEAD = ("student_hidden", "student_weight", "student_bias")
B, S, V, D = 2, 6, 13, 8


def heads(*leading: int, vocab: int = V, **keywords: Any) -> dict[str, Any]:
    """Heads with biases and a wider teacher."""
    return random_heads(*leading, vocab=vocab, width=D, teacher_width=D + 3, bias=True, **keywords)


def assert_matches_definition(
    arguments: dict[str, Any], impl: str, dloss: float | Tensor = 1.0, **own_keywords: Any
) -> None:
    wrt = [name for name in HEAD if name in arguments]
    function = partial(linear_softmax_kl, impl=impl, **own_keywords)
    assert_matches(function, reference.linear_softmax_kl, arguments, wrt, dloss)


def dloss_for(arguments: dict[str, Any]) -> float | Tensor:
    """A gradient a token where the loss has one value a token."""
    hidden = arguments["student_hidden"]
    return random_normal(*hidden.shape[:-1], dtype=hidden.dtype) if arguments.get("reduction") == "none" else 1.0


TARGETS = random_targets(B, S, vocab=V, seed=3)
WEIGHTS = random_mask(B, S, dtype=torch.float32)
# What softmax_kl does with each keyword has its own tests; here, what the heads and the chunks could lose of it.
CASES: dict[str, dict[str, Any]] = {
    "kl_alone": {},
    "both": {"targets": TARGETS, "ce_weight": 0.7, "metrics": True},
    "ce_alone": {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None, "kl_weight": 0.0}
    | {"targets": TARGETS, "ce_weight": 0.7},
    "no_bias": {"student_bias": None, "teacher_bias": None, "targets": TARGETS, "ce_weight": 0.7},
    "flat": {**heads(S), "mask": WEIGHTS[0], "targets": TARGETS[0]},
    "mask": {"mask": WEIGHTS, "targets": TARGETS, "ce_weight": 0.7, "metrics": True},
    "shorter_teacher": {"teacher_hidden": random_normal(B, S - 2, D + 3), "targets": TARGETS, "ce_weight": 0.7},
    "longer_teacher": {"teacher_hidden": random_normal(B, S + 2, D + 3), "mask": WEIGHTS},
    "smaller_teacher_vocab": {**heads(B, S, teacher_vocab=V - 3), "targets": TARGETS, "ce_weight": 0.7},
    "larger_teacher_vocab": {**heads(B, S, teacher_vocab=V + 3), "targets": TARGETS, "ce_weight": 0.7},
    "vocab_size": {"vocab_size": V - 4, "targets": TARGETS, "ce_weight": 0.7},
    "num_tokens": {"num_tokens": 37, "mask": WEIGHTS},
    "sum": {"reduction": "sum", "mask": WEIGHTS, "num_tokens": 37},
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def case_arguments(case: dict[str, Any], **keywords: Any) -> dict[str, Any]:
    arguments = {**heads(B, S), "temperature": 2.0, **case, **keywords}
    return {name: value for name, value in arguments.items() if value is not None or name.startswith("teacher_")}


@each_impl
@each_drop_masked
@each_divergence
@each_case
def test_every_keyword_matches_the_definition(case, divergence, drop_masked, impl):
    arguments = case_arguments(case, divergence=divergence)
    assert_matches_definition(arguments, impl, drop_masked=drop_masked)


@each_impl
@each_drop_masked
@each_case
def test_reduction_none_matches_the_definition(case, drop_masked, impl):
    arguments = case_arguments(case, reduction="none")
    assert_matches_definition(arguments, impl, dloss_for(arguments), drop_masked=drop_masked)


@each_impl
@each_dtype
@each_divergence
@pytest.mark.parametrize("vocab", [1, 127, 128, 129, 4097])  # chunk_terms, which both share, has the larger ones
def test_every_vocabulary_size_and_dtype_matches_the_definition(vocab, divergence, dtype, impl):
    arguments = heads(24, vocab=vocab, dtype=dtype)
    arguments |= {"targets": random_targets(24, vocab=vocab), "divergence": divergence, "ce_weight": 0.5}
    assert_matches_definition(arguments, impl, max_chunk_bytes=60 * 4 * vocab)  # a few tokens, and a rest


@each_impl
@pytest.mark.parametrize("hidden", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)  # masters, and a head cast for inference
@pytest.mark.parametrize("teacher", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_heads_and_models_may_differ_in_dtype(hidden, weight, teacher, impl):
    arguments = heads(24)
    dtypes = {"student_hidden": hidden, "student_weight": weight, "student_bias": weight}
    arguments = {name: x.to(dtypes.get(name, teacher)) for name, x in arguments.items()}
    same = {name: x.to(torch.float64 if hidden == torch.float64 else torch.float32) for name, x in arguments.items()}
    function = partial(linear_softmax_kl, impl=impl)
    output, gradients = differentiate(function, arguments, HEAD)
    expected, expected_gradients = differentiate(function, same, HEAD)
    assert torch.equal(output.loss, expected.loss)
    for name, gradient, expected_gradient in zip(HEAD, gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient.to(dtypes[name])), name


@each_impl
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dloss", INCOMING_GRADIENTS)
def test_incoming_gradient_scales_the_gradient(dloss, reduction, dtype, impl):
    arguments = heads(256, vocab=129, dtype=dtype) | {"targets": random_targets(256, vocab=129), "ce_weight": 1.0}
    per_token = 256 if reduction == "none" else 1  # dW of float16 stays below 65504
    assert_matches_definition(arguments | {"reduction": reduction}, impl, dloss / per_token)


@each_impl
@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_drop_masked
def test_max_chunk_bytes_does_not_change_the_result(drop_masked, reduction, impl):
    arguments = case_arguments(CASES["mask"], reduction=reduction)
    buffer = 4 * V  # of one token; some are held at a time
    for max_chunk_bytes in (1, buffer, 10 * buffer, 30 * buffer, 31 * buffer + 1, 1000 * buffer):
        assert_matches_definition(
            arguments, impl, dloss_for(arguments), max_chunk_bytes=max_chunk_bytes, drop_masked=drop_masked
        )


@each_impl
@each_drop_masked
def test_fp16_gradient_is_not_flushed_to_zero(drop_masked, impl):
    """2048 tokens of 32000 ids: dlogits / num_tokens is below float16's least number, the gradients are not."""
    arguments = random_heads(8, vocab=32000, width=D, dtype=torch.float16) | {"num_tokens": 2048}
    arguments["student_weight"] *= 4
    wrt = HEAD[:2]
    function = partial(linear_softmax_kl, impl=impl, drop_masked=drop_masked)
    _, gradients = differentiate(function, arguments, wrt, INCOMING_GRADIENTS[-1])
    _, truths = differentiate(reference.linear_softmax_kl, in_float64(arguments), wrt, INCOMING_GRADIENTS[-1])
    for gradient, truth in zip(gradients, truths, strict=True):
        zeros = (gradient == 0).double().mean().item()
        assert zeros == pytest.approx((truth.half() == 0).double().mean().item(), abs=1e-3)
        assert zeros < 0.02


@each_impl
@each_drop_masked
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("nothing", ["masked", "ignored", "empty"])
def test_no_token_gives_loss_0_and_gradient_0(nothing, reduction, drop_masked, impl):
    arguments = heads(B, 0 if nothing == "empty" else S) | {"reduction": reduction, "metrics": True}
    if nothing == "masked":
        arguments["mask"] = torch.zeros(B, S, device=DEVICE)
    if nothing == "ignored":
        arguments |= {"targets": torch.full_like(TARGETS, -100), "ce_weight": 1.0}
    function = partial(linear_softmax_kl, impl=impl, drop_masked=drop_masked)
    output, gradients = differentiate(function, arguments, HEAD)
    assert all((x == 0).all() for x in output if x is not None)
    assert all((gradient == 0).all() for gradient in gradients)


@each_impl
@each_drop_masked
@each_divergence
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("left_out_by", ["mask", "targets"])
def test_what_does_not_count_may_hold_anything(left_out_by, bad, reduction, divergence, drop_masked, impl):
    arguments = heads(B, S) | {"targets": TARGETS, "ce_weight": 0.5, "divergence": divergence, "reduction": reduction}
    left_out = TARGETS == -100
    if left_out_by == "mask":
        arguments |= {"mask": ~left_out, "targets": TARGETS.clamp(min=0)}
    hidden = "student_hidden", "teacher_hidden"
    spoilt = {name: arguments[name].masked_fill(left_out[..., None], bad) for name in hidden}
    function = partial(linear_softmax_kl, impl=impl, drop_masked=drop_masked)
    clean, clean_gradients = differentiate(function, arguments, HEAD)
    output, gradients = differentiate(function, arguments | spoilt, HEAD)
    assert left_out.any()
    assert (gradients[0][left_out] == 0).all()
    assert torch.equal(output.loss, clean.loss)
    assert all(map(torch.equal, gradients, clean_gradients))


@each_impl
@each_drop_masked
@each_divergence
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_ids_banned_by_a_bias_are_handled_beside_rows_of_nan(model, divergence, drop_masked, impl):
    arguments = heads(B, S) | {"mask": TARGETS != -100, "divergence": divergence}
    arguments[f"{model}_bias"][2] = -torch.inf
    assert_matches_definition(arguments, impl, drop_masked=drop_masked)
    function = partial(linear_softmax_kl, impl=impl, drop_masked=drop_masked)
    clean, clean_gradients = differentiate(function, arguments, HEAD)
    arguments["teacher_hidden"][TARGETS == -100] = torch.nan
    output, gradients = differentiate(function, arguments, HEAD)
    assert torch.equal(output.loss, clean.loss)
    assert all(map(torch.equal, gradients, clean_gradients))


LAYOUTS = {
    "without_the_last": lambda x: x[:, :-1],
    "positions_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every_other_channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@each_impl
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("transposed_weight", [False, True], ids=["row_major", "column_major"])
def test_layout_is_followed(transposed_weight, layout, impl):
    arguments = heads(B, S)
    for model in ("student", "teacher"):
        arguments[f"{model}_hidden"] = layout(arguments[f"{model}_hidden"])
        if transposed_weight:
            arguments[f"{model}_weight"] = arguments[f"{model}_weight"].t().contiguous().t()
    assert_matches_definition(arguments, impl)


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [*HEAD, "all"])
def test_what_is_frozen_gets_no_gradient(frozen, reduction, impl):
    arguments = heads(B, S)
    _, expected = differentiate(partial(linear_softmax_kl, impl=impl), arguments | {"reduction": reduction}, HEAD)
    for name in HEAD:
        arguments[name].requires_grad_(frozen not in (name, "all"))
    loss = linear_softmax_kl(**arguments, reduction=reduction, impl=impl).loss
    assert loss.requires_grad == (frozen != "all")
    if loss.requires_grad:
        loss.sum().backward()
    for name, gradient in zip(HEAD, expected, strict=True):
        if arguments[name].requires_grad:
            assert torch.equal(arguments[name].grad, gradient), name
        else:
            assert arguments[name].grad is None, name
    assert all(arguments[name].grad is None for name in arguments if name.startswith("teacher"))


PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """The number of matrix products made while it lasts, at its end."""
    count: list[int] = []
    profiler = profile()
    with profiler:
        yield count
    count.append(sum(each.count for each in profiler.key_averages() if each.key in PRODUCTS))


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("trained", "products"), [((), 0), (("student_hidden",), 1), (("student_weight",), 1), (HEAD, 2)], ids=str
)
def test_no_product_is_made_for_a_gradient_that_is_not_needed(trained, products, reduction, impl):
    arguments = heads(B, S) | {"reduction": reduction, "impl": impl}
    for name in trained:
        arguments[name].requires_grad_()
    logits = 2  # one of each model
    with torch.no_grad(), counted_products() as evaluation:
        linear_softmax_kl(**arguments)
    assert evaluation == [logits]
    with counted_products() as training:
        loss = linear_softmax_kl(**arguments).loss.sum()
        if trained:
            loss.backward()
    made_twice = logits if reduction == "none" and trained else 0
    assert training == [logits + products + made_twice]


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
@each_dtype
def test_autocast_does_not_change_the_result(dtype, reduction, impl):
    arguments = heads(B, S, vocab=129, dtype=dtype) | {"reduction": reduction, "targets": TARGETS, "ce_weight": 0.5}
    function = partial(linear_softmax_kl, impl=impl)
    plain, gradients = differentiate(function, arguments, HEAD)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast, cast_gradients = differentiate(function, arguments, HEAD)
    assert torch.equal(plain.loss, cast.loss)
    assert torch.equal(plain.kl, cast.kl)
    assert all(map(torch.equal, gradients, cast_gradients))


@each_impl
def test_only_the_loss_carries_a_gradient(impl):
    arguments = heads(B, S) | {"targets": TARGETS, "metrics": True}
    arguments["student_weight"].requires_grad_()
    for reduction in REDUCTIONS:
        output = linear_softmax_kl(**arguments, reduction=reduction, impl=impl)
        assert [name for name, x in output._asdict().items() if x is not None and x.requires_grad] == ["loss"]


@each_impl
def test_micro_batches_with_the_windows_num_tokens_add_up_to_the_batch(impl):
    arguments = in_float64(case_arguments(CASES["mask"]))
    function = partial(linear_softmax_kl, impl=impl)
    whole, whole_gradients = differentiate(function, arguments, HEAD)
    halves = []
    for half in (slice(0, 1), slice(1, 2)):
        part = {
            name: x[half] if isinstance(x, Tensor) and x.ndim > 1 and len(x) == B else x
            for name, x in arguments.items()
        }
        halves.append(differentiate(function, part | {"num_tokens": whole.num_tokens}, HEAD))
    (first, (hidden_1, *heads_1)), (second, (hidden_2, *heads_2)) = halves
    torch.testing.assert_close(first.loss + second.loss, whole.loss)
    torch.testing.assert_close([torch.cat([hidden_1, hidden_2]), *map(torch.add, heads_1, heads_2)], whole_gradients)


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_runs_repeat_bit_for_bit(reduction, impl):
    arguments = heads(64, vocab=4097, dtype=torch.bfloat16) | {"reduction": reduction}
    function = partial(linear_softmax_kl, impl=impl, max_chunk_bytes=1 << 20)
    (first, gradients), (second, same_gradients) = (differentiate(function, arguments, HEAD) for _ in range(2))
    assert torch.equal(first.loss, second.loss)
    assert all(map(torch.equal, gradients, same_gradients))


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_backward_says_why_it_cannot_be(reduction, impl):
    arguments = heads(B, S)
    arguments["student_hidden"].requires_grad_()
    loss = linear_softmax_kl(**arguments, reduction=reduction, impl=impl).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_softmax_kl can be differentiated once"):
        loss.backward()


@each_impl
def test_reduction_none_can_be_differentiated_again(impl):
    arguments = heads(B, S)
    weight = arguments["student_weight"].requires_grad_()
    loss = linear_softmax_kl(**arguments, reduction="none", impl=impl).loss.sum()
    (once,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (again,) = torch.autograd.grad(loss, weight)
    assert torch.equal(once, again)


@each_impl
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("use", USES_OF_A_LOSS.values(), ids=USES_OF_A_LOSS.keys())
def test_a_second_derivative_is_refused_rather_than_wrong(use, reduction, impl):
    function = partial(linear_softmax_kl, reduction=reduction, impl=impl)
    with pytest.raises(RuntimeError):
        differentiate_twice(function, heads(B, S), "student_weight", use)


class Anew(torch.autograd.Function):
    """A function that is called again for every backward: gradcheck takes several, and linear_softmax_kl allows one."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    def backward(ctx, dloss):  # type: ignore[override]
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return None, *torch.autograd.grad(ctx.function(*inputs), inputs, dloss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_drop_masked
@each_divergence
def test_gradcheck_of_hidden_states_weight_and_bias(divergence, drop_masked, reduction):
    arguments = in_float64(random_heads(2, 3, vocab=5, width=2, teacher_vocab=4, bias=True))
    arguments |= {"targets": random_targets(2, 3, vocab=5), "mask": random_mask(2, 3, dtype=torch.float64)}
    arguments |= {"divergence": divergence, "reduction": reduction, "ce_weight": 0.5, "temperature": 2.0}

    def loss(*head: Tensor) -> Tensor:
        changed: dict[str, Any] = arguments | dict(zip(HEAD, head, strict=True))
        return linear_softmax_kl(**changed, drop_masked=drop_masked, max_chunk_bytes=1).loss

    head = [arguments[name].requires_grad_() for name in HEAD]
    assert gradcheck(partial(Anew.apply, loss), head)
