"""softmax_kl against its definition, and the definition against F.kl_div and F.cross_entropy."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from fastdistill import LossOutput, checks, reference, softmax_kl, softmax_kl_torch
from fastdistill.checks import DIVERGENCES, REDUCTIONS
from fastdistill.testing import (
    DEVICE,
    DTYPES,
    INCOMING_GRADIENTS,
    TEMPERATURES,
    USES_OF_A_LOSS,
    VOCAB_SIZES,
    assert_matches,
    differentiate,
    differentiate_twice,
    impls_of,
    in_float64,
    random_logits,
    random_mask,
    random_normal,
    random_targets,
    read_nothing,
    relative_error,
)

IMPLS = impls_of("softmax_kl")
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_function = pytest.mark.parametrize(
    "function", [reference.softmax_kl, *(partial(softmax_kl, impl=impl) for impl in IMPLS)], ids=["definition", *IMPLS]
)

STUDENT = ("student_logits",)
INF, NAN = torch.inf, torch.nan


def teacher_logits(*shape: int) -> Tensor:
    return random_logits(*shape)["teacher_logits"]


def targets_of(*shape: int, vocab: int, **keywords: Any) -> Tensor:
    return random_targets(*shape, vocab=vocab, seed=3, **keywords)


def assert_matches_definition(arguments: dict[str, Any], impl: str, dloss: float | Tensor = 1.0) -> None:
    assert_matches(partial(softmax_kl, impl=impl), reference.softmax_kl, arguments, STUDENT, dloss)


@pytest.fixture(params=["read", "unread"])
def reading(request, monkeypatch):
    """Whether values may be read, as on the CPU, or not, as on a GPU."""
    if request.param == "unread":
        read_nothing(monkeypatch)


B, S, V = 2, 6, 11
TARGETS = targets_of(B, S, vocab=V)
# Every keyword that changes the result, alone and with what it interacts with.
CASES: dict[str, dict[str, Any]] = {
    "kl_alone": {},
    "ce_alone": {"teacher_logits": None, "kl_weight": 0.0, "targets": TARGETS, "ce_weight": 0.7},
    "both": {"targets": TARGETS, "kl_weight": 0.3, "ce_weight": 0.7},
    "flat": {**random_logits(S, V), "targets": TARGETS[0], "ce_weight": 0.7},
    "int32_targets": {"targets": TARGETS.int(), "ce_weight": 0.7},
    "ignore_index": {"targets": TARGETS.masked_fill(TARGETS < 0, 3), "ignore_index": 3, "ce_weight": 0.7},
    "bool_mask": {"mask": random_mask(B, S)},
    "int_mask": {"mask": random_mask(B, S, dtype=torch.int64)},
    "float_mask": {"mask": random_mask(B, S, dtype=torch.float32)},
    "half_mask": {"mask": random_mask(B, S, dtype=torch.float16)},
    "mask_and_targets": {"mask": random_mask(B, S, dtype=torch.float32), "targets": TARGETS, "ce_weight": 0.7},
    "shorter_teacher": {"teacher_logits": teacher_logits(B, S - 2, V), "targets": TARGETS, "ce_weight": 0.7},
    "longer_teacher": {"teacher_logits": teacher_logits(B, S + 2, V), "mask": random_mask(B, S)},
    "smaller_teacher_vocab": {"teacher_logits": teacher_logits(B, S, V - 3), "targets": TARGETS, "ce_weight": 0.7},
    "larger_teacher_vocab": {"teacher_logits": teacher_logits(B, S, V + 3), "targets": TARGETS, "ce_weight": 0.7},
    "vocab_size": {"vocab_size": V - 4, "targets": TARGETS, "ce_weight": 0.7},
    "vocab_size_of_unequal": {"teacher_logits": teacher_logits(B, S, V + 3), "vocab_size": V - 4},
    "no_temperature_squared": {"temperature_squared": False, "targets": TARGETS, "ce_weight": 0.7},
    "num_tokens": {"num_tokens": 37, "mask": random_mask(B, S), "targets": TARGETS, "ce_weight": 0.7},
    "sum": {"reduction": "sum", "mask": random_mask(B, S, dtype=torch.float32), "num_tokens": 37},
    "none": {"reduction": "none", "mask": random_mask(B, S, dtype=torch.float32), "targets": TARGETS, "ce_weight": 0.7},
    "none_and_shorter_teacher": {"teacher_logits": teacher_logits(B, S - 2, V), "reduction": "none"},
    "small_beta": {"jsd_beta": 0.1},
    "large_beta": {"jsd_beta": 0.9},
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def kl_div(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def composed_divergence(student: Tensor, teacher: Tensor, divergence: str, beta: float) -> Tensor:
    """Of one token's logits, the temperature applied."""
    log_s, log_t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if divergence == "forward_kl":
        return kl_div(log_t, log_s)
    if divergence == "reverse_kl":
        return kl_div(log_s, log_t)
    log_m = (beta * log_t.exp() + (1 - beta) * log_s.exp()).log()
    return beta * kl_div(log_t, log_m) + (1 - beta) * kl_div(log_s, log_m)


def composed(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kl_weight: float = 1.0,
    ce_weight: float = 0.0,
    temperature_squared: bool = True,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_tokens: float | None = None,
    reduction: str = "mean",
) -> LossOutput:
    """The loss token by token, by F.kl_div and F.cross_entropy and nothing of the package."""
    shape = student_logits.shape[:-1]
    zeros = student_logits.new_zeros(shape)
    loss, kl, ce, weights = zeros.clone(), zeros.clone(), zeros.clone(), zeros.clone()
    for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        i = tuple(index)
        if teacher_logits is not None and i[-1] >= teacher_logits.shape[-2]:
            continue
        weight = 1.0 if mask is None else mask[i].item()
        if weight == 0 or (targets is not None and targets[i] == ignore_index):
            continue
        weights[i] = weight
        if teacher_logits is not None:
            vocab = vocab_size or min(student_logits.shape[-1], teacher_logits.shape[-1])
            scaled = student_logits[i][:vocab] / temperature, teacher_logits[i][:vocab] / temperature
            kl[i] = weight * composed_divergence(*scaled, divergence, jsd_beta)
        if targets is not None:
            ce[i] = weight * F.cross_entropy(student_logits[i], targets[i].long())
    loss = kl_weight * (temperature**2 if temperature_squared else 1) * kl + ce_weight * ce
    n = weights.sum() if num_tokens is None else weights.new_tensor(num_tokens)

    def reduce(x: Tensor) -> Tensor:
        return {"none": x, "sum": x.sum(), "mean": x.sum() / n}[reduction]

    return LossOutput(
        reduce(loss),
        None if teacher_logits is None else reduce(kl).detach(),
        None if targets is None else reduce(ce).detach(),
        *(None, None, None),
        num_tokens=n,
        invalid_targets=None if targets is None else torch.tensor(0),
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@each_divergence
@each_case
def test_definition_is_composed_of_kl_div_and_cross_entropy(case, divergence, temperature):
    case = {**random_logits(B, S, V), "divergence": divergence, "temperature": temperature, **case}
    dloss = random_normal(B, S, dtype=torch.float64) if case.get("reduction") == "none" else 1.0
    assert_matches(reference.softmax_kl, composed, in_float64(case), STUDENT, dloss)


@pytest.mark.usefixtures("reading")
@each_impl
@each_divergence
@each_case
def test_every_keyword_matches_the_definition(case, divergence, impl):
    case = {**random_logits(B, S, V), "divergence": divergence, "temperature": 2.0, "metrics": True, **case}
    dloss = random_normal(B, S) if case.get("reduction") == "none" else 1.0
    assert_matches_definition(case, impl, dloss)


@each_impl
@each_divergence
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(v, d) for v in VOCAB_SIZES for d in (DTYPES if v < 10000 else DTYPES[:2])],  # the large ones in two, for time
    ids=str,
)
def test_every_vocabulary_size_and_dtype_matches_the_definition(vocab, dtype, divergence, impl):
    tokens = 22  # two chunks of the largest vocabulary
    arguments = random_logits(tokens, vocab, dtype=dtype)
    arguments |= {"targets": targets_of(tokens, vocab=vocab), "mask": random_mask(tokens, dtype=torch.float32)}
    arguments |= {"divergence": divergence, "temperature": 2.0, "ce_weight": 0.5, "metrics": True}
    assert_matches_definition(arguments, impl)


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # the compute dtype, and one cast to it
@each_divergence
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_every_temperature_matches_the_definition(temperature, divergence, dtype, impl):
    arguments = {**random_logits(40, 129, dtype=dtype), "divergence": divergence, "temperature": temperature}
    assert_matches_definition(arguments, impl)


@each_impl
@each_divergence
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("student_dtype", DTYPES, ids=str)
def test_student_and_teacher_may_differ_in_dtype(student_dtype, teacher_dtype, divergence, impl):
    arguments = random_logits(8, 129) | {"divergence": divergence, "metrics": True}
    arguments["student_logits"] = arguments["student_logits"].to(student_dtype)
    arguments["teacher_logits"] = arguments["teacher_logits"].to(teacher_dtype)
    assert_matches_definition(arguments, impl)
    fields = softmax_kl(**arguments, impl=impl)
    wide = torch.float64 if student_dtype == torch.float64 else torch.float32
    assert {x.dtype for x in fields if x is not None} == {wide}


@each_impl
@each_divergence
@pytest.mark.parametrize("weights", [{}, {"ce_weight": 0.5}, {"kl_weight": 0.0, "ce_weight": 0.5}], ids=str)
@pytest.mark.parametrize("copied", [None, "dtype", "mask"])
def test_a_part_of_the_vocabulary_may_lie_anywhere(copied, weights, divergence, impl):
    """Logits are computed with where they lie, unless they must be cast or gathered; none is changed."""
    dtype = torch.float16 if copied == "dtype" else torch.float32
    arguments = random_logits(9, 129, teacher_vocab=133, dtype=dtype) | {"vocab_size": 120, "temperature": 2.0}
    arguments |= {
        "targets": targets_of(9, vocab=129).clamp(min=0),
        "divergence": divergence,
        "metrics": True,
    } | weights
    if copied == "mask":
        arguments["mask"] = random_mask(9, dtype=torch.float32)
    before = {name: arguments[name].clone() for name in ("student_logits", "teacher_logits")}
    assert_matches_definition(arguments, impl)
    assert all(torch.equal(arguments[name], logits) for name, logits in before.items())


@each_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)  # the gradient is cast to it
@pytest.mark.parametrize("dloss", INCOMING_GRADIENTS)
def test_incoming_gradient_scales_the_gradient(dloss, dtype, impl):
    arguments = random_logits(64, 129, dtype=dtype) | {"targets": targets_of(64, vocab=129), "ce_weight": 1.0}
    assert_matches_definition(arguments, impl, dloss)


@each_impl
@pytest.mark.parametrize("tokens", [1, 5, 12])  # one, some that do not divide 12, all
def test_chunk_size_does_not_change_the_result(tokens, impl, monkeypatch):
    monkeypatch.setattr(softmax_kl_torch, "block_rows", lambda vocab, dtype, device: tokens)
    arguments = {**random_logits(B, S, V), **CASES["mask_and_targets"], "metrics": True}
    assert_matches_definition(arguments, impl)
    assert_matches_definition({**arguments, "reduction": "none"}, impl, random_normal(B, S))


@pytest.mark.parametrize(
    ("threads", "vocab", "rows"), [(2, 50257, 10), (2, 151936, 2), (16, 151936, 16), (4, 1, 1 << 19)]
)
def test_every_thread_has_a_token_of_a_block_and_as_many_as_the_others(threads, vocab, rows, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert softmax_kl_torch.block_rows(vocab, torch.float32, torch.device("cpu")) == rows
    assert softmax_kl_torch.block_rows(vocab, torch.float32, torch.device("cuda")) == max(1, (1 << 25) // vocab)


@each_impl
def test_fp16_gradient_is_not_flushed_to_zero(impl):
    """2048 tokens of 32000 ids: 1 / num_tokens in float16 turns 98 % of the gradient into zeros, loss scale or not."""
    arguments = random_logits(16, 32000, dtype=torch.float16) | {"num_tokens": 2048}
    dloss = INCOMING_GRADIENTS[-1]
    _, (gradient,) = differentiate(partial(softmax_kl, impl=impl), arguments, STUDENT, dloss)
    _, (truth,) = differentiate(reference.softmax_kl, in_float64(arguments), STUDENT, dloss)
    zeros = (gradient == 0).double().mean().item()
    assert zeros == pytest.approx((truth.half() == 0).double().mean().item(), abs=1e-3)
    assert zeros < 0.01


LAYOUTS = {
    "without_the_last": lambda x: x[:, :-1],
    "every_other_position": lambda x: x[:, ::2],
    "positions_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary_first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every_other_id": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@each_impl
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("model", ["student", "teacher", "both"])
def test_layout_is_followed(model, layout, impl):
    arguments = random_logits(4, 7, 129)
    shape = layout(arguments["student_logits"]).shape
    for name, logits in arguments.items():
        followed = layout(logits)
        arguments[name] = followed if model in (name.split("_")[0], "both") else followed.contiguous()
    arguments["targets"] = targets_of(4, 2 * shape[1], vocab=129)[:, ::2]
    arguments["mask"] = random_mask(shape[1], 4, dtype=torch.float32).t()
    assert_matches_definition(arguments | {"ce_weight": 0.5}, impl)


NOTHING_COUNTS = {
    "masked": {"mask": torch.zeros(B, S, device=DEVICE)},
    "ignored": {"targets": torch.full((B, S), -100, device=DEVICE), "ce_weight": 1.0},
}


@pytest.mark.usefixtures("reading")
@each_impl
@each_divergence
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("nothing", NOTHING_COUNTS.values(), ids=NOTHING_COUNTS.keys())
def test_no_token_gives_loss_0_and_gradient_0(nothing, reduction, divergence, impl):
    arguments = {**random_logits(B, S, V), **nothing, "divergence": divergence, "reduction": reduction, "metrics": True}
    output, (gradient,) = differentiate(partial(softmax_kl, impl=impl), arguments, STUDENT)
    assert all((x == 0).all() for x in output if x is not None)
    assert (gradient == 0).all()


@each_impl
def test_no_term_gives_loss_0_and_gradient_0(impl):
    arguments = random_logits(B, S, V) | {"kl_weight": 0, "targets": TARGETS}
    output, (gradient,) = differentiate(partial(softmax_kl, impl=impl), arguments, STUDENT)
    assert output.loss == 0
    assert (gradient == 0).all()


@each_impl
@each_divergence
@pytest.mark.parametrize("infinite", [False, True])
def test_divisor_of_0_gives_0_even_for_an_infinite_loss(infinite, divergence, impl):
    arguments = random_logits(2, V) | {"num_tokens": 0, "divergence": divergence}
    if infinite:
        arguments["student_logits"][0, 0] = arguments["teacher_logits"][0, 1] = -INF
    output, (gradient,) = differentiate(partial(softmax_kl, impl=impl), arguments, STUDENT)
    assert output.loss == output.kl == 0
    assert (gradient == 0).all()


@pytest.mark.usefixtures("reading")
@each_impl
@each_divergence
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("left_out_by", ["mask", "targets"])
def test_what_does_not_count_may_hold_anything(left_out_by, bad, reduction, divergence, impl):
    arguments = random_logits(B, S, V)
    arguments |= {"targets": TARGETS, "ce_weight": 0.5, "divergence": divergence, "reduction": reduction}
    left_out = TARGETS == -100
    if left_out_by == "mask":
        arguments |= {"mask": ~left_out, "targets": TARGETS.clamp(min=0)}
    spoilt = {name: arguments[name].masked_fill(left_out[..., None], bad) for name in random_logits(1, 1)}
    function = partial(softmax_kl, impl=impl)
    clean, (clean_gradient,) = differentiate(function, arguments, STUDENT)
    output, (gradient,) = differentiate(function, arguments | spoilt, STUDENT)
    assert left_out.any()
    assert (gradient[left_out] == 0).all()
    assert torch.equal(gradient, clean_gradient)
    assert torch.equal(output.loss, clean.loss)


@pytest.mark.usefixtures("reading")
@each_impl
@each_dtype
@each_divergence
@pytest.mark.parametrize("banned", ["student", "teacher", "both"])
def test_minus_infinity_logits_match_the_definition(banned, divergence, dtype, impl):
    arguments = random_logits(4, V, dtype=dtype)
    if banned != "teacher":
        arguments["student_logits"][1:, :3] = -INF
    if banned != "student":
        arguments["teacher_logits"][1:, 2:5] = -INF
    assert_matches_definition(arguments | {"divergence": divergence, "reduction": "none"}, impl, 1.0)


@each_function
class TestMinusInfinity:
    """What -inf logits mean, without the definition's help."""

    @staticmethod
    def banned(model: str) -> dict[str, Tensor]:
        logits = in_float64(random_logits(3, V))
        logits[f"{model}_logits"][:, 0] = -INF
        return logits

    def test_teacher_mass_where_the_student_has_none_is_infinite_with_a_finite_gradient(self, function):
        logits = self.banned("student")
        output, (gradient,) = differentiate(function, logits | {"reduction": "none"}, STUDENT)
        assert (output.loss == INF).all()
        expected = logits["student_logits"].softmax(-1) - logits["teacher_logits"].softmax(-1)
        torch.testing.assert_close(gradient, expected)

    def test_student_mass_where_the_teacher_has_none_is_infinite_and_pushed_away(self, function):
        output, (gradient,) = differentiate(function, self.banned("teacher") | {"divergence": "reverse_kl"}, STUDENT)
        assert output.loss == INF
        assert gradient.isfinite().all()
        assert (gradient[:, 0] > 0).all()

    @pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
    def test_a_ban_is_free_where_the_other_divergence_pays(self, function, divergence):
        logits = self.banned("teacher" if divergence == "forward_kl" else "student")
        output, (gradient,) = differentiate(function, logits | {"divergence": divergence}, STUDENT)
        assert 0 < output.loss < INF
        assert gradient.isfinite().all()

    @each_divergence
    def test_an_id_that_both_ban_is_as_if_it_were_not_there(self, function, divergence):
        logits = {
            name: x.index_fill(-1, torch.tensor([0], device=DEVICE), -INF) for name, x in random_logits(3, V).items()
        }
        there, (gradient,) = differentiate(function, logits | {"divergence": divergence}, STUDENT)
        left = {name: x[:, 1:] for name, x in logits.items()}
        gone, (expected,) = differentiate(function, left | {"divergence": divergence}, STUDENT)
        torch.testing.assert_close(there.loss, gone.loss)
        torch.testing.assert_close(gradient, F.pad(expected, (1, 0)))

    @pytest.mark.parametrize("model", ["student", "teacher"])
    @pytest.mark.parametrize("beta", [0.1, 0.5])
    def test_jsd_is_finite(self, function, model, beta):
        logits = self.banned(model)
        output, (gradient,) = differentiate(function, logits | {"divergence": "jsd", "jsd_beta": beta}, STUDENT)
        p_s, p_t = (x.softmax(-1) for x in logits.values())
        m = beta * p_t + (1 - beta) * p_s
        expected = beta * torch.xlogy(p_t, p_t / m) + (1 - beta) * torch.xlogy(p_s, p_s / m)
        torch.testing.assert_close(output.loss, expected.sum(-1).mean())
        assert gradient.isfinite().all()


@each_impl
@each_divergence
def test_a_row_of_nan_spoils_no_other(divergence, impl):
    """-inf in one row is handled whatever another holds."""
    arguments = random_logits(3, V) | {"divergence": divergence, "reduction": "none"}
    for logits in (arguments["student_logits"], arguments["teacher_logits"]):
        logits[0] = NAN
        logits[1, 2] = -INF
    output, (gradient,) = differentiate(partial(softmax_kl, impl=impl), arguments, STUDENT)
    assert output.loss[0].isnan()
    assert output.loss[1:].isfinite().all()
    assert gradient[1:].isfinite().all()


@each_impl
@each_divergence
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])  # a wide row, and one whose maximum must be taken off exactly
def test_logits_of_1e4_match_the_definition(offset, divergence, impl):
    arguments = random_logits(40, 129)
    scale = 1e4 if offset == 0 else 1.0
    arguments = {name: (logits * scale).clamp(-1e4, 1e4) + offset for name, logits in arguments.items()}
    assert_matches_definition(arguments | {"divergence": divergence}, impl)


@each_impl
@each_dtype
@each_divergence
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_student_like_the_teacher_has_no_loss_and_no_gradient(temperature, divergence, dtype, impl):
    student = random_logits(40, 129, dtype=dtype)["student_logits"]
    arguments = {"student_logits": student, "teacher_logits": student.clone(), "targets": targets_of(40, vocab=129)}
    arguments |= {"divergence": divergence, "temperature": temperature}
    output, (gradient,) = differentiate(partial(softmax_kl, impl=impl), arguments, STUDENT)
    assert output.loss.abs() <= 1e-6
    assert gradient.abs().max() <= 1e-6


@each_impl
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_near_the_teacher_is_not_noise(beta, impl):
    """The divergence is about 1e-7, beside logarithms of size 10 that float32 rounds by 5e-7."""
    arguments = random_logits(40, 4097) | {"divergence": "jsd", "jsd_beta": beta, "reduction": "none"}
    arguments["student_logits"] = arguments["teacher_logits"] + 1e-3 * arguments["student_logits"]
    output, (gradient,) = differentiate(partial(softmax_kl, impl=impl), arguments, STUDENT)
    truth, (true_gradient,) = differentiate(reference.softmax_kl, in_float64(arguments), STUDENT)
    assert relative_error(output.loss, truth.loss) <= 1e-3
    assert relative_error(gradient, true_gradient) <= 1e-3


@each_impl
@each_divergence
@pytest.mark.parametrize("shape", [(0, V), (0, S, V), (B, 0, V)], ids=str)
def test_empty_batch_gives_loss_0(shape, divergence, impl):
    arguments = random_logits(*shape) | {"targets": targets_of(*shape[:-1], vocab=V), "ce_weight": 1.0, "metrics": True}
    output, (gradient,) = differentiate(partial(softmax_kl, impl=impl), arguments | {"divergence": divergence}, STUDENT)
    assert all(x == 0 for x in output if x is not None)
    assert gradient.shape == shape


@each_function
def test_metrics_are_entropy_and_agreement_over_the_shared_ids(function):
    student, teacher = random_logits(40, V, teacher_vocab=V + 3, dtype=torch.float64).values()
    weights = random_mask(40, dtype=torch.float64)
    output = function(student, teacher, mask=weights, temperature=2.0, vocab_size=V - 4, metrics=True)
    student, teacher = student[:, : V - 4], teacher[:, : V - 4]
    expected = {
        "student_entropy": torch.distributions.Categorical(logits=student).entropy(),
        "teacher_entropy": torch.distributions.Categorical(logits=teacher).entropy(),
        "top1_agreement": (student.topk(1).indices == teacher.topk(1).indices).squeeze(1).double(),
    }
    for name, per_token in expected.items():
        torch.testing.assert_close(getattr(output, name), (weights * per_token).sum() / weights.sum())


@each_impl
def test_a_field_is_none_where_there_is_nothing_to_say(impl):
    logits = random_logits(B, S, V)
    alone = softmax_kl(**logits, impl=impl)
    assert (alone.ce, alone.student_entropy, alone.teacher_entropy, alone.top1_agreement) == (None,) * 4
    assert alone.invalid_targets is None
    no_teacher = softmax_kl(logits["student_logits"], None, TARGETS, kl_weight=0, ce_weight=1, metrics=True, impl=impl)
    assert (no_teacher.kl, no_teacher.student_entropy, no_teacher.top1_agreement) == (None,) * 3


@each_impl
def test_cross_entropy_alone_is_that_of_pytorch(impl):
    student = random_logits(B, S, V)["student_logits"]
    loss = softmax_kl(student, None, TARGETS, kl_weight=0, ce_weight=1, temperature=3.0, impl=impl).loss
    torch.testing.assert_close(loss, F.cross_entropy(student.transpose(1, 2), TARGETS))


@each_impl
def test_only_the_loss_carries_a_gradient_and_only_to_the_student(impl):
    logits = random_logits(B, S, V)
    output = softmax_kl(
        logits["student_logits"].requires_grad_(), logits["teacher_logits"], TARGETS, metrics=True, impl=impl
    )
    assert [name for name, x in output._asdict().items() if x is not None and x.requires_grad] == ["loss"]
    with torch.no_grad():
        assert not softmax_kl(**logits, impl=impl).loss.requires_grad


@pytest.mark.usefixtures("reading")
@each_impl
def test_scalars_may_be_0d_tensors(impl):
    numbers = {"temperature": 2.5, "kl_weight": 0.25, "ce_weight": 0.75, "num_tokens": 7.0}
    arguments = random_logits(B, S, V) | {"targets": TARGETS}
    function = partial(softmax_kl, impl=impl)
    by_number, (gradient,) = differentiate(function, arguments | numbers, STUDENT)
    tensors = {name: torch.tensor(value, device=DEVICE) for name, value in numbers.items()}
    by_tensor, (same_gradient,) = differentiate(function, arguments | tensors, STUDENT)
    assert torch.equal(by_number.loss, by_tensor.loss)
    assert torch.equal(gradient, same_gradient)


@pytest.mark.parametrize("zero", [0, torch.tensor(0.0, device=DEVICE)], ids=["number", "tensor"])
@pytest.mark.usefixtures("reading")
@each_impl
@each_divergence
def test_a_term_of_weight_0_is_reported_and_left_out(zero, divergence, impl):
    """Even one that is infinite: 0 * inf would be NaN."""
    arguments = random_logits(B, S, V)
    arguments |= {"targets": TARGETS.clamp(min=0), "divergence": divergence}
    arguments["student_logits"][0, 0, 1], arguments["teacher_logits"][0, 0, 2] = -INF, -INF
    arguments["targets"][0, 0] = 1
    function = partial(softmax_kl, impl=impl)
    both, _ = differentiate(function, arguments | {"ce_weight": 1.0}, STUDENT)
    kl_alone, (kl_gradient,) = differentiate(function, arguments | {"ce_weight": zero}, STUDENT)
    assert torch.equal(both.kl, kl_alone.kl)
    assert kl_alone.ce == INF
    assert torch.equal(kl_alone.loss, kl_alone.kl)
    assert kl_gradient.isfinite().all()

    arguments["targets"][0, 0] = 0
    ce_alone, (ce_gradient,) = differentiate(function, arguments | {"kl_weight": zero, "ce_weight": 1.0}, STUDENT)
    no_teacher = {"teacher_logits": None, "kl_weight": 0, "ce_weight": 1.0}
    expected, (expected_gradient,) = differentiate(function, arguments | no_teacher, STUDENT)
    assert torch.equal(ce_alone.kl, kl_alone.kl)
    assert ce_alone.loss.isfinite()
    assert torch.equal(ce_alone.loss, expected.loss)
    assert torch.equal(ce_gradient, expected_gradient)


@each_impl
def test_reduction_none_is_shaped_like_the_targets_with_zeros_where_nothing_counts(impl):
    arguments = random_logits(B, S, V) | {"targets": TARGETS, "ce_weight": 0.5, "metrics": True}
    arguments["teacher_logits"] = arguments["teacher_logits"][:, : S - 2]
    per_token = softmax_kl(**arguments, reduction="none", impl=impl)
    mean = softmax_kl(**arguments, impl=impl)
    counts = TARGETS != -100
    counts[:, S - 2 :] = False
    for name in ("loss", "kl", "ce", "student_entropy", "teacher_entropy", "top1_agreement"):
        value = getattr(per_token, name)
        assert value.shape == TARGETS.shape
        assert (value[~counts] == 0).all()
        torch.testing.assert_close(value.sum() / counts.sum(), getattr(mean, name))
    assert (per_token.loss[counts] > 0).all()


@each_impl
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 5), (6,)], ids=str)
def test_micro_batches_with_the_windows_num_tokens_add_up_to_the_batch(sizes, impl):
    arguments = random_logits(6, S, V, dtype=torch.float64) | {"targets": targets_of(6, S, vocab=V), "ce_weight": 0.5}
    arguments["mask"] = random_mask(6, S, dtype=torch.float64)
    function = partial(softmax_kl, impl=impl)
    whole, (whole_gradient,) = differentiate(function, arguments, STUDENT)
    losses, gradients = [], []
    for start, size in zip([sum(sizes[:i]) for i in range(len(sizes))], sizes, strict=True):
        part = {name: x[start : start + size] if isinstance(x, Tensor) else x for name, x in arguments.items()}
        output, (gradient,) = differentiate(function, part | {"num_tokens": whole.num_tokens}, STUDENT)
        losses.append(output.loss)
        gradients.append(gradient)
    torch.testing.assert_close(sum(losses), whole.loss)
    torch.testing.assert_close(torch.cat(gradients), whole_gradient)


@each_impl
@each_divergence
def test_runs_repeat_bit_for_bit(divergence, impl):
    arguments = random_logits(40, 4097, dtype=torch.float16) | {"targets": targets_of(40, vocab=4097), "ce_weight": 1.0}
    runs = [
        differentiate(partial(softmax_kl, impl=impl), arguments | {"divergence": divergence}, STUDENT) for _ in range(2)
    ]
    (first, (gradient,)), (second, (same_gradient,)) = runs
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(gradient, same_gradient)


@each_impl
@each_divergence
def test_autocast_does_not_change_the_result(divergence, impl):
    arguments = random_logits(40, 129) | {"targets": targets_of(40, vocab=129), "ce_weight": 1.0}
    function = partial(softmax_kl, impl=impl, divergence=divergence, metrics=True)
    plain, (gradient,) = differentiate(function, arguments, STUDENT)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast, (cast_gradient,) = differentiate(function, arguments, STUDENT)
    for name, value in plain._asdict().items():
        assert torch.equal(value, getattr(cast, name)), name
    assert torch.equal(gradient, cast_gradient)


@pytest.fixture
def nan_in_empty():
    """torch.empty is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@each_impl
@pytest.mark.usefixtures("nan_in_empty")
@pytest.mark.parametrize("teacher_positions", [S - 2, S, S + 2])
def test_gradient_is_written_everywhere(teacher_positions, impl):
    arguments = {**random_logits(B, S, V), "teacher_logits": teacher_logits(B, teacher_positions, V)}
    assert_matches_definition(arguments | {"mask": random_mask(B, S)}, impl)


@each_impl
@each_divergence
@pytest.mark.parametrize("reduction", ["mean", "none"])  # one incoming gradient, and one a token
def test_gradcheck(divergence, reduction, impl):
    logits = in_float64(random_logits(2, 2, 4, teacher_vocab=3))
    keywords: dict[str, Any] = {"targets": targets_of(2, 2, vocab=4), "mask": random_mask(2, 2, dtype=torch.float64)}
    keywords |= {"divergence": divergence, "reduction": reduction, "temperature": 2.0, "ce_weight": 0.5}

    def loss(student: Tensor) -> Tensor:
        return softmax_kl(student, logits["teacher_logits"], impl=impl, **keywords).loss

    assert gradcheck(loss, logits["student_logits"].requires_grad_())


def leaf_and_loss(impl: str, **keywords: Any) -> tuple[Tensor, Tensor, LossOutput]:
    """A leaf, the logits that a model made of it, and their loss."""
    arguments = random_logits(B, S, V)
    leaf = arguments["student_logits"].requires_grad_()
    logits = leaf.clone()
    return leaf, logits, softmax_kl(logits, arguments["teacher_logits"], impl=impl, **keywords)


@each_impl
def test_retained_graph_can_be_differentiated_again(impl):
    leaf, _, output = leaf_and_loss(impl)
    output.loss.backward(retain_graph=True)
    once = leaf.grad.clone()  # type: ignore[union-attr]
    output.loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * once)


@each_impl
@pytest.mark.parametrize("use", USES_OF_A_LOSS.values(), ids=USES_OF_A_LOSS.keys())
def test_a_second_derivative_is_refused_rather_than_wrong(use, impl):
    with pytest.raises(RuntimeError):
        differentiate_twice(partial(softmax_kl, impl=impl), random_logits(B, S, V), "student_logits", use)


@each_impl
def test_invalid_targets_that_are_not_read_do_not_count_and_are_counted(impl, monkeypatch):
    monkeypatch.setattr(checks, "may_read", lambda tensor: False)
    invalid, ignored = TARGETS.clone(), TARGETS.clone()
    invalid[0, :3], ignored[0, :3] = torch.tensor([-1, V, 10**9]), -100
    arguments = random_logits(B, S, V) | {"ce_weight": 1.0}
    function = partial(softmax_kl, impl=impl)
    output, (gradient,) = differentiate(function, arguments | {"targets": invalid}, STUDENT)
    expected, (expected_gradient,) = differentiate(function, arguments | {"targets": ignored}, STUDENT)
    assert (output.invalid_targets, expected.invalid_targets) == (3, 0)
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(gradient, expected_gradient)


@each_impl
class TestInplaceBackward:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # the compute dtype, and a narrower one
    @pytest.mark.parametrize("case", ["both", "mask_and_targets", "shorter_teacher", "larger_teacher_vocab", "none"])
    def test_same_gradient_in_the_memory_of_the_logits(self, case, dtype, impl):
        arguments = {**random_logits(B, S, V), **CASES[case]}
        arguments["student_logits"] = arguments["student_logits"].to(dtype)
        _, (expected,) = differentiate(partial(softmax_kl, impl=impl), arguments, STUDENT)
        leaf = arguments["student_logits"].requires_grad_()
        logits = leaf.clone()
        places = []
        logits.register_hook(lambda gradient: places.append(gradient.data_ptr()))
        output = softmax_kl(**arguments | {"student_logits": logits}, inplace_backward=True, impl=impl)
        output.loss.sum().backward()
        assert places == [logits.data_ptr()]
        assert torch.equal(logits, expected)
        assert torch.equal(leaf.grad, expected)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "alias",
        [
            lambda x: x,
            lambda x: x.clone()[:1].expand(B, S, V),
            lambda x: x.clone().as_strided((B, S, V), (S, 1, 1)),
        ],
        ids=["leaf", "expanded", "overlapping"],
    )
    def test_memory_that_is_not_its_own_is_refused(self, alias, impl):
        arguments = random_logits(B, S, V)
        logits = alias(arguments["student_logits"].requires_grad_())
        with pytest.raises(ValueError, match=r"inplace_backward=True.* student_logits"):
            softmax_kl(logits, arguments["teacher_logits"], inplace_backward=True, impl=impl)

    def test_padded_rows_are_memory_of_their_own(self, impl):
        leaf = random_normal(B, S + 1, V).requires_grad_()
        arguments = {**random_logits(B, S, V), "student_logits": leaf[:, :-1]}
        function = partial(softmax_kl, impl=impl)
        _, (expected,) = differentiate(function, arguments, STUDENT)
        arguments["student_logits"] = leaf.clone()[:, :-1]
        function(**arguments, inplace_backward=True).loss.backward()
        assert torch.equal(leaf.grad, F.pad(expected, (0, 0, 0, 1)))  # type: ignore[arg-type]

    def test_second_backward_raises(self, impl):
        _, _, output = leaf_and_loss(impl, inplace_backward=True)
        output.loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.loss.backward()

    def test_an_alias_that_another_operation_saved_is_noticed(self, impl):
        _, logits, output = leaf_and_loss(impl, inplace_backward=True)
        other = logits.square().sum()
        output.loss.backward()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            other.backward()
