"""linear_cross_vocab_kl against its definition, and what must hold of a distance between two vocabularies."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill import linear_cross_vocab_kl, linear_softmax_kl, reference
from fastdistill.checks import DIVERGENCES
from fastdistill.cross_vocab import METHODS
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
    peak_memory,
    random_heads,
    random_mask,
    random_normal,
    read_nothing,
)

HEAD = ("student_hidden", "student_weight", "student_bias")
N, V, VT, K, D = 12, 13, 17, 7, 8
MB = 10**6

FORMS: dict[str, dict[str, Any]] = {
    **{f"shared-{name}": {"method": "shared", "divergence": name} for name in DIVERGENCES},
    "sorted": {"method": "sorted"},
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
each_method = pytest.mark.parametrize("method", METHODS)
each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def definition(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    shared_ids: tuple[Tensor, Tensor] | None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    **keywords: Any,
) -> Any:
    """reference.cross_vocab_kl of whole logits."""
    student_logits = F.linear(student_hidden, student_weight, student_bias)
    teacher_logits = F.linear(teacher_hidden, teacher_weight, teacher_bias)
    return reference.cross_vocab_kl(student_logits, teacher_logits, shared_ids, **keywords)


def random_ids(vocab: int, teacher_vocab: int, shared: int) -> tuple[Tensor, Tensor]:
    """A random id of each vocabulary for each of `shared` strings."""
    generator = torch.Generator().manual_seed(vocab + teacher_vocab + shared)
    student, teacher = (torch.randperm(size, generator=generator)[:shared] for size in (vocab, teacher_vocab))
    return student.to(DEVICE), teacher.to(DEVICE)


def heads(
    tokens: int = N, vocab: int = V, teacher_vocab: int = VT, shared: int = K, width: int = D, **keywords: Any
) -> dict[str, Any]:
    """Heads with biases, a wider teacher, and the strings that they share."""
    sizes = {"vocab": vocab, "width": width, "teacher_vocab": teacher_vocab, "teacher_width": width + 3}
    arguments = random_heads(tokens, **sizes, **{"bias": True, **keywords})
    return arguments | {"shared_ids": random_ids(vocab, teacher_vocab, shared)}


def assert_matches_definition(
    arguments: dict[str, Any], dloss: float = 1.0, max_chunk_bytes: int | None = None, impl: str | None = None
) -> None:
    wrt = [name for name in HEAD if name in arguments]
    function = partial(linear_cross_vocab_kl, max_chunk_bytes=max_chunk_bytes, impl=impl)
    assert_matches(function, definition, arguments, wrt, dloss)


VOCABULARIES = {
    "some_shared": (V, VT, K),
    "larger_student": (VT, V, K),
    "same_size": (V, V, K),
    "one_shared": (V, VT, 1),
    "whole_student": (V, VT, V),
    "whole_teacher": (VT, V, V),
    "all_shared": (V, V, V),
    "one_id": (1, 1, 1),
    "a_block": (4097, 1000, 900),
}


@pytest.mark.parametrize("impl", impls_of("softmax_kl"))
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("sizes", VOCABULARIES.values(), ids=VOCABULARIES.keys())
@each_divergence
def test_shared_matches_the_definition(divergence, sizes, temperature, impl):
    arguments = heads(N, *sizes) | {"divergence": divergence, "temperature": temperature, "metrics": True}
    assert_matches_definition(arguments, impl=impl)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("sizes", VOCABULARIES.values(), ids=VOCABULARIES.keys())
def test_sorted_matches_the_definition(sizes, temperature):
    assert_matches_definition(heads(N, *sizes) | {"method": "sorted", "temperature": temperature, "metrics": True})


WEIGHTS = random_mask(N, dtype=torch.float32)
CASES: dict[str, dict[str, Any]] = {
    "no_bias": {"bias": False},
    "bool_mask": {"mask": WEIGHTS > 0},
    "float_mask": {"mask": WEIGHTS},
    "num_tokens": {"mask": WEIGHTS, "num_tokens": 37},
    "sum": {"mask": WEIGHTS, "num_tokens": 37, "reduction": "sum"},
    "metrics": {"mask": WEIGHTS, "metrics": True},
    "no_square": {"temperature_squared": False},
    "beta": {"jsd_beta": 0.2},
    "tensors": {"temperature": torch.tensor(3.0), "num_tokens": torch.tensor(5)},
}


@each_form
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_keyword_matches_the_definition(case, form):
    case = {"temperature": 2.0, **case}
    assert_matches_definition(heads(bias=case.pop("bias", True)) | case | form)


@each_form
@each_dtype
def test_every_dtype_matches_the_definition(dtype, form):
    assert_matches_definition(heads(64, 129, 257, 100, dtype=dtype) | form)


@each_form
def test_max_chunk_bytes_does_not_change_the_result(form):
    arguments = heads() | form | {"mask": WEIGHTS, "metrics": True}
    token = 4 * (V + VT)  # of one pair of logits; some are held at a time
    for max_chunk_bytes in (1, 7 * token, 12 * token, 31 * token + 1, 1000 * token):
        assert_matches_definition(arguments, max_chunk_bytes=max_chunk_bytes)


@each_form
@each_dtype
@pytest.mark.parametrize("dloss", INCOMING_GRADIENTS)
def test_incoming_gradient_scales_the_gradient(dloss, dtype, form):
    assert_matches_definition(heads(256, 129, 140, 90, dtype=dtype) | form, dloss)


@each_method
def test_half_precision_gradient_is_scaled_before_it_is_rounded(method):
    """The sum over 256 tokens is beyond float16, their mean is not: half the mass on one id against an equal share."""
    arguments = heads(256, 129, 140, 90, dtype=torch.float16) | {"method": method}
    for name in ("student_weight", "student_bias", "teacher_weight", "teacher_bias"):
        arguments[name].zero_()
    arguments["student_hidden"].fill_(4000)
    arguments["student_bias"][0] = 5
    _, gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    _, truths = differentiate(definition, in_float64(arguments), HEAD)
    assert 256 * truths[1].abs().max() > torch.finfo(torch.float16).max
    for gradient, truth in zip(gradients, truths, strict=True):
        torch.testing.assert_close(gradient, truth.half())


@each_method
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher", [torch.float32, torch.float16, torch.float64], ids=str)
def test_hidden_states_heads_and_models_may_differ_in_dtype(teacher, weight, method):
    arguments = heads()
    dtypes = {"student_hidden": torch.bfloat16, "student_weight": weight, "student_bias": weight}
    cast = {name: x if name == "shared_ids" else x.to(dtypes.get(name, teacher)) for name, x in arguments.items()}
    same = {name: x if name == "shared_ids" else x.float() for name, x in cast.items()}
    function = partial(linear_cross_vocab_kl, method=method)
    output, gradients = differentiate(function, cast, HEAD)
    expected, expected_gradients = differentiate(function, same, HEAD)
    assert torch.equal(output.loss, expected.loss)
    for name, gradient, expected_gradient in zip(HEAD, gradients, expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient.to(dtypes[name])), name


# What must hold of the two distances, whatever computes them.


@each_divergence
@pytest.mark.parametrize("sizes", [(V, VT, K), (V, VT, V)], ids=["others", "no_others"])
def test_definition_is_the_divergence_of_summed_probabilities(sizes, divergence):
    """In probabilities, event by event: the strings that both hold, then the rest of the mass."""
    vocab, teacher_vocab, shared = sizes
    z_s, z_t = (random_normal(1, size, seed=size, dtype=torch.float64) for size in (vocab, teacher_vocab))
    ids = random_ids(vocab, teacher_vocab, shared)
    value = reference.cross_vocab_kl(z_s, z_t, ids, temperature=2.0, divergence=divergence).kl.item()

    p_s, p_t = (z[0].div(2).exp().div(z[0].div(2).exp().sum()).tolist() for z in (z_s, z_t))
    events = [(p_s[i], p_t[j]) for i, j in zip(ids[0].tolist(), ids[1].tolist(), strict=True)]
    if shared < vocab:
        events.append((1 - sum(p for p, _ in events), 1 - sum(p for _, p in events)))
    s, t = torch.tensor(events, dtype=torch.float64).T
    s, t = s / s.sum(), t / t.sum()
    m = (s + t) / 2
    by_name = {
        "forward_kl": (t * (t / s).log()).sum(),
        "reverse_kl": (s * (s / t).log()).sum(),
        "jsd": ((t * (t / m).log()).sum() + (s * (s / m).log()).sum()) / 2,
    }
    assert value == pytest.approx(by_name[divergence].item(), rel=1e-9)


@each_divergence
def test_shared_over_one_vocabulary_is_linear_softmax_kl(divergence):
    arguments = heads(N, V, V)
    ids = torch.arange(V, device=DEVICE)
    same = {"divergence": divergence, "temperature": 2.0, "mask": WEIGHTS}
    del arguments["shared_ids"]
    expected, expected_gradients = differentiate(linear_softmax_kl, arguments | same, HEAD)
    output, gradients = differentiate(linear_cross_vocab_kl, arguments | same | {"shared_ids": (ids, ids)}, HEAD)
    torch.testing.assert_close((output.loss, output.kl), (expected.loss, expected.kl))
    torch.testing.assert_close(gradients, expected_gradients)


@each_form
def test_the_numbers_of_the_ids_do_not_matter(form):
    """Both vocabularies renumbered, and the shared strings in another order."""
    arguments = in_float64(heads()) | form | {"metrics": True, "temperature": 2.0}
    renumbered = dict(arguments)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    ids = []
    for model, old_ids, size in zip(("student", "teacher"), arguments["shared_ids"], (V, VT), strict=True):
        old_of_new = torch.randperm(size, generator=torch.Generator().manual_seed(size)).to(DEVICE)
        for name in (f"{model}_weight", f"{model}_bias"):
            renumbered[name] = arguments[name][old_of_new]
        ids.append(old_of_new.argsort()[old_ids][order])
    renumbered["shared_ids"] = tuple(ids)
    expected, (expected_hidden,) = differentiate(linear_cross_vocab_kl, arguments, HEAD[:1])
    output, (hidden,) = differentiate(linear_cross_vocab_kl, renumbered, HEAD[:1])
    torch.testing.assert_close(tuple(output), tuple(expected))
    torch.testing.assert_close(hidden, expected_hidden)


@each_divergence
def test_telling_fewer_strings_apart_never_raises_the_divergence(divergence):
    """With every string paired it is the divergence itself; each that is left out joins the others."""
    arguments = in_float64(heads(1, V, V, V)) | {"divergence": divergence}
    student_ids, teacher_ids = arguments.pop("shared_ids")
    kls = [
        linear_cross_vocab_kl(**arguments, shared_ids=(student_ids[:k], teacher_ids[:k])).kl.item()
        for k in (V, *range(V - 2, 0, -1))
    ]
    assert kls == sorted(kls, reverse=True)
    assert kls[-1] < 0.5 * kls[0]


def test_sorted_is_0_for_equal_probabilities_under_other_ids():
    arguments = heads(N, V, V)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    arguments["student_hidden"] = arguments["teacher_hidden"]
    arguments["student_weight"] = arguments["teacher_weight"][order]
    arguments["student_bias"] = arguments["teacher_bias"][order]
    output = linear_cross_vocab_kl(**arguments, method="sorted")
    assert output.loss.item() == pytest.approx(0, abs=1e-6)
    assert linear_cross_vocab_kl(**arguments, divergence="forward_kl").loss > 0.1


@pytest.mark.parametrize("vocab", [1, V])
def test_sorted_is_at_most_2_and_counts_mass_that_the_other_has_no_id_for(vocab):
    """A teacher of one id against a student that is uniform over its own: 1 - 1/V at the first rank, the rest below."""
    arguments = heads(N, vocab, 1, 1, bias=False)
    arguments["student_weight"].zero_()
    uniform = linear_cross_vocab_kl(**arguments, method="sorted").loss.item()
    assert uniform == pytest.approx(2 * (1 - 1 / vocab), abs=1e-6)
    other_way = {name.replace("student", "x").replace("teacher", "student").replace("x", "teacher"): value
                 for name, value in arguments.items() if name != "shared_ids"}  # fmt: skip
    assert linear_cross_vocab_kl(**other_way, shared_ids=None, method="sorted").loss.item() == pytest.approx(uniform)


@each_method
def test_top1_agreement_is_of_strings_and_not_of_ids(method):
    """Tokens: the same string; another shared one; the same id, not shared; the student's shared, the teacher's not."""
    best_student, best_teacher = [0, 1, 3, 0], [2, 2, 3, 1]
    shared_ids = torch.tensor([0, 1]), torch.tensor([2, 0])
    eye = torch.eye(4)
    output = linear_cross_vocab_kl(
        5 * eye[best_student], eye, 5 * eye[best_teacher], eye, shared_ids,
        method=method, metrics=True, mask=torch.tensor([0.5, 1.0, 1.0, 1.0]), reduction="sum",
    )  # fmt: skip
    assert output.top1_agreement is not None
    assert output.top1_agreement.item() == 0.5


# Hard numbers.


@each_form
@pytest.mark.parametrize("scale", [1e3, 1e4])
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_logits_of_any_size_give_finite_gradients(model, scale, form):
    arguments = heads() | form
    arguments[f"{model}_bias"] = scale * torch.linspace(-1, 1, len(arguments[f"{model}_bias"]), device=DEVICE)
    output, gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("sizes", [(V, VT, K), (V, VT, V)], ids=["others", "no_others"])
def test_a_constant_added_to_all_logits_costs_no_digits(sizes, offset):
    """Hidden states of ones on an eighth-exact head: its logits are exact in float32, 1e4 more or less."""
    arguments = heads(1, *sizes)
    for model in ("student", "teacher"):
        arguments[f"{model}_hidden"].fill_(1)
        arguments[f"{model}_weight"] = (8 * arguments[f"{model}_weight"]).round() / 8
        arguments[f"{model}_bias"].fill_(offset)
    _, gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    _, truths = differentiate(definition, in_float64(arguments), HEAD)
    for gradient, truth in zip(gradients, truths, strict=True):
        assert (gradient - truth).abs().max() < 1e-6


BANNED = {"a_shared_id": [0], "another": [K], "all_others": list(range(K, V)), "some_of_both": [1, 2, K + 1]}


@each_form
@pytest.mark.parametrize("banned", BANNED.values(), ids=BANNED.keys())
@pytest.mark.parametrize("models", [("student",), ("teacher",), ("student", "teacher")], ids="+".join)
def test_ids_banned_by_a_bias_match_the_definition(models, banned, form, monkeypatch):
    """The first K ids of each model are the shared ones; the definition has them at 1e-300, which float64 still tells
    from 0, where its own gradient would be NaN."""
    if DEVICE == "cpu":
        read_nothing(monkeypatch)
    arguments = in_float64(heads(N, V, V)) | {"mask": WEIGHTS} | form
    arguments["shared_ids"] = (torch.arange(K, device=DEVICE),) * 2
    nearly = dict(arguments)
    for model in models:
        bias = arguments[f"{model}_bias"].clone()
        bias[banned] = -torch.inf
        arguments[f"{model}_bias"] = bias
        nearly[f"{model}_bias"] = bias.masked_fill(torch.isneginf(bias), -690)
    output, gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    expected, expected_gradients = differentiate(definition, nearly, HEAD)
    if output.loss.isinf():  # mass of one where the other has none
        assert expected.loss > 10
        assert models != ("student", "teacher")
        assert all(gradient.isfinite().all() for gradient in gradients)
    else:
        torch.testing.assert_close(output.loss, expected.loss)
        torch.testing.assert_close(gradients, expected_gradients)


@each_form
@pytest.mark.parametrize("reads", [True, False], ids=["reads", "unread"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_does_not_count_may_hold_anything(bad, reads, form, monkeypatch):
    if not reads:
        read_nothing(monkeypatch)
    arguments = heads() | form | {"mask": WEIGHTS, "metrics": True}
    arguments["student_bias"][arguments["shared_ids"][0][0]] = -1e4
    left_out = WEIGHTS == 0
    hidden = "student_hidden", "teacher_hidden"
    spoilt = {name: arguments[name].masked_fill(left_out[:, None], bad) for name in hidden}
    clean, clean_gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    output, gradients = differentiate(linear_cross_vocab_kl, arguments | spoilt, HEAD)
    assert left_out.any()
    assert (gradients[0][left_out] == 0).all()
    assert all(map(torch.equal, output, clean))
    assert all(map(torch.equal, gradients, clean_gradients))


@each_method
def test_weights_leave_out_what_their_rows_hold(method):
    arguments = heads() | {"method": method, "metrics": True}
    kept = WEIGHTS != 0
    output, gradients = differentiate(linear_cross_vocab_kl, arguments | {"mask": kept}, HEAD)
    fewer = {name: arguments[name][kept] for name in ("student_hidden", "teacher_hidden")}
    expected, expected_gradients = differentiate(linear_cross_vocab_kl, arguments | fewer, HEAD)
    torch.testing.assert_close(tuple(output), tuple(expected))
    torch.testing.assert_close([gradients[0][kept], *gradients[1:]], expected_gradients)


@each_method
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("nothing", ["masked", "empty", "divisor"])
def test_no_token_gives_loss_0_and_gradient_0(nothing, reduction, method):
    arguments = heads(0 if nothing == "empty" else N) | {"reduction": reduction, "metrics": True, "method": method}
    if nothing == "masked":
        arguments["mask"] = torch.zeros(N, device=DEVICE)
    if nothing == "divisor":
        arguments |= {"num_tokens": 0, "reduction": "mean"}
    output, gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    assert all((x == 0).all() for x in output)
    assert all((gradient == 0).all() for gradient in gradients)


@each_method
def test_micro_batches_with_the_windows_num_tokens_add_up_to_the_batch(method):
    arguments = in_float64(heads()) | {"mask": WEIGHTS, "method": method}
    whole, whole_gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    halves = []
    for half in (slice(0, 5), slice(5, N)):
        part = {name: arguments[name][half] for name in ("student_hidden", "teacher_hidden", "mask")}
        part["num_tokens"] = whole.num_tokens
        halves.append(differentiate(linear_cross_vocab_kl, arguments | part, HEAD))
    (first, (hidden_1, *heads_1)), (second, (hidden_2, *heads_2)) = halves
    torch.testing.assert_close(first.loss + second.loss, whole.loss)
    torch.testing.assert_close([torch.cat([hidden_1, hidden_2]), *map(torch.add, heads_1, heads_2)], whole_gradients)


# Differentiation.


class Anew(torch.autograd.Function):
    """A function called again for every backward: gradcheck takes several, and linear_cross_vocab_kl allows one."""

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


@each_form
@pytest.mark.parametrize("sizes", [(5, 4, 2), (4, 6, 4)], ids=["others", "no_others"])
def test_gradcheck_of_hidden_states_weight_and_bias(sizes, form):
    arguments = in_float64(heads(5, *sizes, width=2)) | form
    arguments |= {"mask": random_mask(5, dtype=torch.float64), "temperature": 2.0, "max_chunk_bytes": 1}

    def loss(*head: Tensor) -> Tensor:
        return linear_cross_vocab_kl(**arguments | dict(zip(HEAD, head, strict=True))).loss

    head = [arguments[name].requires_grad_() for name in HEAD]
    assert gradcheck(partial(Anew.apply, loss), head)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in func.name()
        return func(*args, **(kwargs or {}))


@each_method
@pytest.mark.parametrize(
    ("trained", "products"), [((), 0), (("student_hidden",), 1), (("student_weight",), 1), (HEAD, 2)], ids=str
)
def test_no_product_is_made_twice_or_for_a_gradient_that_is_not_needed(trained, products, method):
    arguments = heads() | {"method": method}
    for name in trained:
        arguments[name].requires_grad_()
    logits = 2  # one of each model
    with torch.no_grad(), Products() as evaluation:
        assert not linear_cross_vocab_kl(**arguments).loss.requires_grad
    assert evaluation.count == logits
    with Products() as training:
        loss = linear_cross_vocab_kl(**arguments).loss
        if trained:
            loss.backward()
    assert training.count == logits + products
    assert [name for name in arguments if name in HEAD and arguments[name].grad is not None] == list(trained)


@each_method
def test_second_backward_says_why_it_cannot_be(method):
    arguments = heads() | {"method": method}
    arguments["student_hidden"].requires_grad_()
    loss = linear_cross_vocab_kl(**arguments).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_vocab_kl can be differentiated once"):
        loss.backward()


@each_method
@pytest.mark.parametrize("use", USES_OF_A_LOSS.values(), ids=USES_OF_A_LOSS.keys())
def test_a_second_derivative_is_refused_rather_than_wrong(use, method):
    with pytest.raises(RuntimeError):
        differentiate_twice(partial(linear_cross_vocab_kl, method=method), heads(), "student_weight", use)


@each_method
@each_dtype
def test_autocast_does_not_change_the_result(dtype, method):
    arguments = heads(dtype=dtype) | {"method": method}
    plain, gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast, cast_gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    assert torch.equal(plain.loss, cast.loss)
    assert all(map(torch.equal, gradients, cast_gradients))


@each_method
def test_only_the_loss_carries_a_gradient(method):
    arguments = heads() | {"method": method, "metrics": True}
    arguments["student_weight"].requires_grad_()
    output = linear_cross_vocab_kl(**arguments)
    assert [name for name, x in output._asdict().items() if x.requires_grad] == ["loss"]


@each_method
def test_inputs_are_left_as_they_were_and_runs_repeat_bit_for_bit(method):
    arguments = heads(64, 129, 257, 100) | {"method": method}
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, Tensor)}
    first, gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    second, same_gradients = differentiate(linear_cross_vocab_kl, arguments, HEAD)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())
    assert torch.equal(first.loss, second.loss)
    assert all(map(torch.equal, gradients, same_gradients))


# Memory.


def steps(arguments: dict[str, Any]) -> None:
    for method in METHODS:
        function = partial(linear_cross_vocab_kl, method=method, max_chunk_bytes=12 * MB)
        differentiate(function, arguments, HEAD[:2])


@pytest.mark.skipif(
    DEVICE == "cpu" and not Path("/proc/self/clear_refs").exists(), reason="the resident set is measured on Linux alone"
)
def test_memory_holds_the_logits_of_a_chunk_alone():
    """Those of 1024 tokens are 17 and 34 MB, and all that is made of them 80 ("shared") and 200 ("sorted")."""
    make = partial(heads, 1024, vocab=4096, teacher_vocab=8192, shared=4000, width=8)
    assert peak_memory(make, steps) < 80 * MB  # 40 of code, 12 of chunks


# Arguments.


def tensor(*shape: int, **keywords: Any) -> Tensor:
    return torch.ones(shape, **keywords)


def ids(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


WRONG: list[tuple[dict[str, Any], str, str, str]] = [
    ({"student_hidden": [[0.0]]}, "student_hidden", "list", "tensor [N, D]"),
    ({"student_hidden": tensor(2, N, D)}, "student_hidden", f"(2, {N}, {D})", "[N, D]"),
    ({"student_hidden": tensor(N, D, dtype=torch.int64)}, "student_hidden", "torch.int64", "float32"),
    ({"teacher_hidden": tensor(N - 1, D + 3)}, "teacher_hidden", f"({N - 1}, {D + 3})", f"N = {N}"),
    ({"teacher_hidden": tensor(N, D + 3, requires_grad=True)}, "teacher_hidden", "requires a gradient", "detach"),
    ({"teacher_weight": tensor(VT, D)}, "teacher_weight", f"({VT}, {D})", f"D = {D + 3}"),
    ({"teacher_weight": tensor(VT, D + 3, requires_grad=True)}, "teacher_weight", "requires a gradient", "detach"),
    ({"teacher_weight": tensor(VT, D + 3, device="meta")}, "teacher_weight", "meta", "cpu"),
    ({"teacher_bias": tensor(VT, requires_grad=True)}, "teacher_bias", "requires a gradient", "detach"),
    ({"student_weight": tensor(D, V)}, "student_weight", f"({D}, {V})", f"D = {D}"),
    ({"student_bias": tensor(V + 1)}, "student_bias", f"({V + 1},)", f"V = {V}"),
    ({"shared_ids": None}, "shared_ids", "None", "method='sorted' without metrics"),
    ({"shared_ids": None, "method": "sorted", "metrics": True}, "shared_ids", "None", "without metrics"),
    ({"shared_ids": ids(0, 1)}, "shared_ids", "torch.int64", "pair"),
    ({"shared_ids": (ids(0),)}, "shared_ids", "tuple of 1", "pair"),
    ({"shared_ids": ([0], ids(0))}, "shared_ids[0]", "list", "int64"),
    ({"shared_ids": (ids(0), ids(0).int())}, "shared_ids[1]", "torch.int32", "int64"),
    ({"shared_ids": (ids(), ids())}, "shared_ids[0]", "(0,)", "K of at least 1"),
    ({"shared_ids": (ids(0)[None], ids(0))}, "shared_ids[0]", "(1, 1)", "[K]"),
    ({"shared_ids": (ids(0, 1), ids(0, 1, 2))}, "shared_ids[1]", "got 3", "2 in shared_ids[0]"),
    ({"shared_ids": (ids(0, V, V + 1), ids(0, 1, 2))}, "shared_ids[0]", f"got {V}", f"[0, {V})"),
    ({"shared_ids": (ids(0, 1), ids(0, -1))}, "shared_ids[1]", "got -1", f"[0, {VT})"),
    ({"shared_ids": (ids(4, 3, 9, 3, 4), ids(0, 1, 2, 3, 4))}, "shared_ids[0]", "got 4", "each id once"),
    ({"shared_ids": (ids(0, 1), ids(5, 5)), "method": "sorted"}, "shared_ids[1]", "got 5", "each id once"),
    ({"shared_ids": (ids(0), ids(0).to("meta"))}, "shared_ids[1]", "meta", "cpu"),
    ({"method": "uld"}, "method", "'uld'", "'shared', 'sorted'"),
    ({"method": "sorted", "divergence": "jsd"}, "divergence", "'jsd'", "method='sorted'"),
    ({"divergence": "kl"}, "divergence", "'kl'", "'forward_kl', 'reverse_kl', 'jsd'"),
    ({"jsd_beta": 0}, "jsd_beta", "0", "forward_kl"),
    ({"reduction": "none"}, "reduction", "'none'", "'mean', 'sum'"),
    ({"temperature": 0.0}, "temperature", "0.0", "> 0"),
    ({"temperature": 0.0, "method": "sorted"}, "temperature", "0.0", "> 0"),
    ({"num_tokens": -1}, "num_tokens", "-1", ">= 0"),
    ({"mask": tensor(N + 1)}, "mask", f"({N + 1},)", f"({N},)"),
    ({"mask": -tensor(N)}, "mask", "-1", ">= 0"),
    ({"max_chunk_bytes": 0}, "max_chunk_bytes", "0", ">= 1"),
    ({"impl": "cuda"}, "impl", "'cuda'", "'torch', 'triton'"),
    ({"impl": "cuda", "method": "sorted"}, "impl", "'cuda'", "'torch', 'triton'"),
]


@pytest.mark.parametrize(("wrong", "argument", "came", "expected"), WRONG)
def test_wrong_arguments_are_named_with_what_came_and_what_was_expected(wrong, argument, came, expected):
    with pytest.raises(ValueError, match=rf"^{re.escape(argument)} ") as error:
        linear_cross_vocab_kl(**heads(device="cpu") | wrong)
    assert came in str(error.value)
    assert expected in str(error.value)


def test_an_implementation_that_cannot_be_had_is_refused_rather_than_replaced():
    with pytest.raises(RuntimeError, match="impl='triton' was asked for, but sorted-probability matching has no"):
        linear_cross_vocab_kl(**heads(), method="sorted", impl="triton")


def test_without_metrics_sorted_needs_no_shared_string():
    arguments = heads()
    del arguments["shared_ids"]
    output = linear_cross_vocab_kl(**arguments, shared_ids=None, method="sorted")
    assert output.top1_agreement is None
    assert torch.equal(output.loss, linear_cross_vocab_kl(**heads(), method="sorted").loss)
