"""Wrong input is a ValueError that names the argument, what came and what was expected; and who chooses the kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import attention_kl, layer_loss, linear_softmax_kl, shift_targets, softmax_kl
from fastdistill.testing import random_attention, random_heads, random_normal, random_targets

B, S, V, D, H = 2, 4, 7, 3, 6


def tensor(*shape: int, **keywords: Any) -> Tensor:
    return torch.ones(shape, **keywords)


def on_logits() -> dict[str, Any]:
    """Good arguments, on the CPU, whose values are read."""
    return {
        "student_logits": random_normal(B, S, V, device="cpu"),
        "teacher_logits": random_normal(B, S, V, seed=1, device="cpu"),
        "targets": random_targets(B, S, vocab=V, device="cpu"),
    }


def on_hidden() -> dict[str, Any]:
    heads = random_heads(B, S, vocab=V, width=D, bias=True, device="cpu")
    return heads | {"targets": random_targets(B, S, vocab=V, device="cpu")}


def on_states() -> dict[str, Any]:
    return {f"{model}_states": [random_normal(B, S, D, device="cpu")] * 2 for model in ("student", "teacher")}


def on_attention() -> dict[str, Any]:
    return random_attention(B, H, S, D, key_heads=2, device="cpu")


CALLS = {
    "softmax_kl": (softmax_kl, on_logits),
    "linear_softmax_kl": (linear_softmax_kl, on_hidden),
    "layer_loss": (layer_loss, on_states),
    "attention_kl": (attention_kl, on_attention),
}
each_function = pytest.mark.parametrize(("function", "good"), CALLS.values(), ids=CALLS.keys())

# (what is changed in good arguments, the argument that is named, what came, what was expected)
Wrong = tuple[dict[str, Any], str, str, str]

TENSORS: list[Wrong] = [
    ({"student_logits": [[0.0]]}, "student_logits", "list", "tensor"),
    ({"student_logits": tensor(B, S, V, dtype=torch.int64)}, "student_logits", "torch.int64", "float32"),
    ({"student_logits": tensor(B, S, V, dtype=torch.complex64)}, "student_logits", "torch.complex64", "float32"),
    ({"student_logits": tensor(V)}, "student_logits", f"({V},)", "[N, V]"),
    ({"student_logits": tensor(1, B, S, V)}, "student_logits", f"(1, {B}, {S}, {V})", "[B, S, V]"),
    ({"student_logits": tensor(B, S, 0), "targets": None}, "student_logits", f"({B}, {S}, 0)", "V"),
    ({"teacher_logits": 3.0}, "teacher_logits", "float", "tensor"),
    ({"teacher_logits": tensor(B, S, V, dtype=torch.int32)}, "teacher_logits", "torch.int32", "float32"),
    ({"teacher_logits": tensor(B * S, V)}, "teacher_logits", f"({B * S}, {V})", f"student_logits ({B}, {S}, {V})"),
    ({"teacher_logits": tensor(B + 1, S, V)}, "teacher_logits", f"({B + 1}, {S}, {V})", f"B = {B}"),
    ({"teacher_logits": tensor(B, S, V, device="meta")}, "teacher_logits", "meta", "cpu"),
    ({"teacher_logits": tensor(B, S, 0)}, "teacher_logits", f"({B}, {S}, 0)", "V"),
    ({"teacher_logits": None}, "teacher", "None", "unless kl_weight is 0"),
]

# Checked alike by softmax_kl and linear_softmax_kl.
SHARED: list[Wrong] = [
    ({"targets": None, "ce_weight": 1.0}, "targets", "None", "unless ce_weight is 0"),
    ({"targets": [[0]]}, "targets", "list", "int64"),
    ({"targets": tensor(B, S)}, "targets", "torch.float32", "int64"),
    ({"targets": tensor(B, S, dtype=torch.bool)}, "targets", "torch.bool", "int64"),
    ({"targets": tensor(B, S - 1, dtype=torch.int64)}, "targets", f"({B}, {S - 1})", f"({B}, {S})"),
    ({"targets": tensor(B, S, dtype=torch.int64, device="meta")}, "targets", "meta", "cpu"),
    ({"targets": torch.full((B, S), V)}, "targets", f"got {V}", f"[0, {V})"),
    ({"targets": torch.full((B, S), -1)}, "targets", "got -1", f"[0, {V}) or ignore_index -100"),
    ({"targets": torch.full((B, S), -100), "ignore_index": -1}, "targets", "got -100", "ignore_index -1"),
    ({"ignore_index": None}, "ignore_index", "None", "whole number"),
    ({"mask": [[1]]}, "mask", "list", "tensor"),
    ({"mask": tensor(B, S, dtype=torch.complex64)}, "mask", "torch.complex64", "float"),
    ({"mask": tensor(B, S + 1)}, "mask", f"({B}, {S + 1})", f"({B}, {S})"),
    ({"mask": tensor(B, S, device="meta")}, "mask", "meta", "cpu"),
    ({"mask": -0.5 * tensor(B, S)}, "mask", "-0.5", ">= 0"),
    ({"mask": -tensor(B, S, dtype=torch.int64)}, "mask", "-1", ">= 0"),
    ({"mask": torch.nan * tensor(B, S)}, "mask", "nan", "finite"),
    ({"mask": torch.tensor([[1.0] * (S - 1) + [torch.inf]] * B)}, "mask", "inf", "finite"),
    ({"mask": tensor(B, S, requires_grad=True)}, "mask", "requires a gradient", "detach"),
    ({"temperature": 0.0}, "temperature", "0.0", "> 0"),
    ({"temperature": -1}, "temperature", "-1", "> 0"),
    ({"temperature": torch.tensor(-2.0)}, "temperature", "-2.0", "> 0"),
    ({"temperature": torch.nan}, "temperature", "nan", "finite"),
    ({"temperature": torch.inf}, "temperature", "inf", "finite"),
    ({"temperature": "hot"}, "temperature", "'hot'", "number"),
    ({"temperature": True}, "temperature", "True", "number"),
    ({"temperature": tensor(1)}, "temperature", "(1,)", "0-d"),
    ({"temperature": torch.tensor(1.0, requires_grad=True)}, "temperature", "requires a gradient", "detach"),
    ({"divergence": "kl"}, "divergence", "'kl'", "'forward_kl', 'reverse_kl', 'jsd'"),
    ({"reduction": "batchmean"}, "reduction", "'batchmean'", "'mean', 'sum', 'none'"),
    ({"jsd_beta": 0}, "jsd_beta", "0", "forward_kl"),
    ({"jsd_beta": 1}, "jsd_beta", "1", "reverse_kl"),
    ({"jsd_beta": torch.nan}, "jsd_beta", "nan", "finite"),
    ({"kl_weight": torch.nan}, "kl_weight", "nan", "finite"),
    ({"kl_weight": None}, "kl_weight", "None", "number"),
    ({"ce_weight": torch.inf}, "ce_weight", "inf", "finite"),
    ({"vocab_size": 0}, "vocab_size", "0", f"[1, {V}]"),
    ({"vocab_size": V + 1}, "vocab_size", f"{V + 1}", f"[1, {V}]"),
    ({"vocab_size": 2.0}, "vocab_size", "2.0", "whole number"),
    ({"num_tokens": -1}, "num_tokens", "-1", ">= 0"),
    ({"num_tokens": torch.nan}, "num_tokens", "nan", "finite"),
    ({"num_tokens": tensor(2)}, "num_tokens", "(2,)", "0-d"),
    ({"impl": "cuda"}, "impl", "'cuda'", "'torch', 'triton'"),
]

HEADS: list[Wrong] = [
    ({"student_hidden": None}, "student_hidden", "NoneType", "tensor"),
    ({"student_hidden": tensor(D)}, "student_hidden", f"({D},)", "[N, D]"),
    ({"student_weight": tensor(D, V)}, "student_weight", f"({D}, {V})", f"D = {D}"),
    ({"student_weight": tensor(1, V, D)}, "student_weight", f"(1, {V}, {D})", "[V, D]"),
    ({"student_weight": tensor(0, D), "student_bias": None, "targets": None}, "student_weight", f"(0, {D})", "V"),
    ({"student_weight": tensor(V, D, dtype=torch.int8)}, "student_weight", "torch.int8", "float32"),
    ({"student_weight": tensor(V, D, device="meta")}, "student_weight", "meta", "cpu"),
    ({"student_bias": tensor(V + 1)}, "student_bias", f"({V + 1},)", f"V = {V}"),
    ({"student_bias": tensor(1, V)}, "student_bias", f"(1, {V})", "[V]"),
    ({"teacher_hidden": None}, "teacher_hidden", "None", "teacher_weight"),
    ({"teacher_weight": None}, "teacher_weight", "None", "teacher_hidden"),
    ({"teacher_hidden": None, "teacher_weight": None, "kl_weight": 0}, "teacher_bias", "a tensor", "None"),
    ({"teacher_hidden": tensor(B, S, D + 1)}, "teacher_weight", f"({V}, {D})", f"D = {D + 1}"),
    ({"teacher_hidden": tensor(B + 1, S, D)}, "teacher_hidden", f"({B + 1}, {S}, {D})", f"B = {B}"),
    ({"teacher_bias": tensor(V - 1)}, "teacher_bias", f"({V - 1},)", f"V = {V}"),
    ({"max_chunk_bytes": 0}, "max_chunk_bytes", "0", ">= 1"),
    ({"max_chunk_bytes": 1e6}, "max_chunk_bytes", "1000000.0", "whole number"),
]

STATES: list[Wrong] = [
    ({"student_states": [], "teacher_states": []}, "student_states", "none", "at least one"),
    ({"teacher_states": [tensor(B, S, D)]}, "teacher_states", "1", "2"),
    ({"student_states": [tensor(B, S, D), tensor(B, 1, D)]}, "student_states[1]", f"({B}, 1, {D})", f"({B}, {S})"),
    ({"student_states": [tensor(B, S, D), tensor(D)]}, "student_states[1]", f"({D},)", "[N, D]"),
    ({"student_states": [tensor(B, S, 0)] * 2, "teacher_states": [tensor(B, S, 0)] * 2}, "student_states[0]", "0", "D"),
    ({"teacher_states": [tensor(B, S, D), 1.0]}, "teacher_states[1]", "float", "tensor"),
    ({"teacher_states": [tensor(B, S, D), tensor(B, S, D + 1)]}, "teacher_states[1]", f"{D + 1}", f"width {D}"),
    ({"teacher_states": [tensor(B + 1, S, D)] * 2}, "teacher_states[0]", f"({B + 1}, {S}, {D})", f"B = {B}"),
    ({"teacher_states": [tensor(B, S, D, dtype=torch.int64)] * 2}, "teacher_states[0]", "torch.int64", "float32"),
    ({"teacher_states": [tensor(B, S, D, device="meta")] * 2}, "teacher_states[0]", "meta", "cpu"),
    ({"mask": tensor(B)}, "mask", f"({B},)", f"({B}, {S})"),
    ({"mask": -tensor(B, S)}, "mask", "-1", ">= 0"),
    ({"metric": "l2"}, "metric", "'l2'", "'mse', 'cosine'"),
    ({"normalize": "rms"}, "normalize", "'rms'", "'layer_norm'"),
    ({"metric": "cosine", "normalize": "layer_norm"}, "normalize", "'layer_norm'", "'none'"),
    ({"layer_weights": [1.0]}, "layer_weights", "[1.0]", "2 layers"),
    ({"layer_weights": [1.0, -1.0]}, "layer_weights", "[1.0, -1.0]", ">= 0"),
    ({"layer_weights": [0, 0]}, "layer_weights", "[0, 0]", "not all 0"),
    ({"layer_weights": [1.0, torch.nan]}, "layer_weights", "nan", ">= 0"),
    ({"layer_weights": [1.0, torch.inf]}, "layer_weights", "inf", "finite"),
    ({"skip_first": -1}, "skip_first", "-1", ">= 0"),
    ({"skip_first": 1.0}, "skip_first", "1.0", "whole number"),
    ({"student_states": [tensor(S, D)], "teacher_states": [tensor(S, D)], "skip_first": 1}, "skip_first", "1", "0"),
    ({"num_tokens": -1}, "num_tokens", "-1", ">= 0"),
    ({"impl": "cuda"}, "impl", "'cuda'", "'torch', 'triton'"),
]

ATTENTION: list[Wrong] = [
    ({"student_q": [[0.0]]}, "student_q", "list", "[B, H, S, d]"),
    ({"student_q": tensor(H, S, D)}, "student_q", f"({H}, {S}, {D})", "[B, H, S, d]"),
    ({"student_k": tensor(B, 2, S, D, dtype=torch.int64)}, "student_k", "torch.int64", "float32"),
    ({"student_k": tensor(B, 4, S, D)}, "student_k", f"({B}, 4, {S}, {D})", f"a divisor of {H}"),
    ({"student_k": tensor(B, 0, S, D)}, "student_k", f"({B}, 0, {S}, {D})", f"a divisor of {H}"),
    ({"student_k": tensor(B, 2, S, D + 1)}, "student_k", f"({B}, 2, {S}, {D + 1})", f"{S}, {D})"),
    ({"student_k": tensor(B, 2, S + 1, D)}, "student_k", f"({B}, 2, {S + 1}, {D})", f"{S}, {D})"),
    (
        {"student_k": tensor(B, 2, S, D, dtype=torch.float16)},
        "student_k",
        "torch.float16",
        "torch.float32 of student_q",
    ),
    ({"student_k": tensor(B, 2, S, D, device="meta")}, "student_k", "meta", "cpu"),
    ({"teacher_q": tensor(B, H + 1, S, D)}, "teacher_q", f"({B}, {H + 1}, {S}, {D})", f"({B}, {H}, {S})"),
    ({"teacher_q": tensor(B + 1, H, S, D)}, "teacher_q", f"({B + 1}, {H}, {S}, {D})", f"({B}, {H}, {S})"),
    ({"teacher_q": tensor(B, H, S, D, device="meta")}, "teacher_q", "meta", "cpu"),
    ({"teacher_k": tensor(B, H, S, 0)}, "teacher_k", f"({B}, {H}, {S}, 0)", "[B, Hkv, S, d]"),
    ({"mask": tensor(B, H)}, "mask", f"({B}, {H})", f"({B}, {S})"),
    ({"mask": -tensor(B, S)}, "mask", "-1", ">= 0"),
    ({"documents": [[0] * S] * B}, "documents", "list", "int64"),
    ({"documents": tensor(B, S)}, "documents", "torch.float32", "int64"),
    ({"documents": tensor(B, 1, dtype=torch.int64)}, "documents", f"({B}, 1)", f"({B}, {S})"),
    ({"documents": tensor(B, S, dtype=torch.int64, device="meta")}, "documents", "meta", "cpu"),
    ({"scale": 0}, "scale", "0", "> 0"),
    ({"scale": (1.0, -1.0)}, "scale", "-1.0", "> 0"),
    ({"scale": (1.0, 1.0, 1.0)}, "scale", "3", "the student's and the teacher's"),
    ({"scale": torch.tensor(1.0)}, "scale", "tensor(1.)", "a number > 0"),
    ({"num_tokens": -1}, "num_tokens", "-1", ">= 0"),
    ({"impl": "cuda"}, "impl", "'cuda'", "'torch', 'triton'"),
]

WRONG = [
    *(("softmax_kl", *wrong) for wrong in TENSORS + SHARED),
    *(("linear_softmax_kl", *wrong) for wrong in HEADS + SHARED),
    *(("layer_loss", *wrong) for wrong in STATES),
    *(("attention_kl", *wrong) for wrong in ATTENTION),
]


@pytest.mark.parametrize(
    ("name", "change", "argument", "came", "expected"), WRONG, ids=[f"{w[0]}-{w[2]}-{w[3]}" for w in WRONG]
)
def test_wrong_input_is_named_with_what_came_and_what_was_expected(name, change, argument, came, expected):
    function, good = CALLS[name]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        function(**good() | change)
    message = str(caught.value)
    assert argument in message
    assert came in message
    assert expected in message


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (tensor(S, dtype=torch.int64), None, rf"input_ids must be \[B, S\], got shape \({S},\)"),
        (tensor(B, S, dtype=torch.int64), tensor(B, 1), rf"attention_mask .* \({B}, {S}\), got \({B}, 1\)"),
    ],
)
def test_shift_targets_names_a_wrong_shape(ids, mask, message):
    with pytest.raises(ValueError, match=message):
        shift_targets(ids, mask)


TEACHERS = [
    ("softmax_kl", "teacher_logits"),
    ("linear_softmax_kl", "teacher_hidden"),
    ("linear_softmax_kl", "teacher_weight"),
    ("linear_softmax_kl", "teacher_bias"),
    ("layer_loss", "teacher_states"),
    ("attention_kl", "teacher_q"),
    ("attention_kl", "teacher_k"),
]


@pytest.mark.parametrize(("name", "argument"), TEACHERS)
def test_a_teacher_that_requires_grad_is_refused_unless_grad_mode_is_off(name, argument):
    function, good = CALLS[name]
    arguments = good()
    expected = function(**arguments).loss
    teacher = arguments[argument]
    (teacher[1] if isinstance(teacher, list) else teacher).requires_grad_()
    with pytest.raises(ValueError, match=rf"{argument}.* requires a gradient.*no_grad.*detach"):
        function(**arguments)
    with torch.no_grad():
        assert torch.equal(function(**arguments).loss, expected)


@each_function
def test_triton_where_there_is_none_is_an_error_and_never_a_fallback(function, good, monkeypatch):
    with pytest.raises(RuntimeError, match="impl='triton'"):
        function(**good(), impl="triton")
    monkeypatch.setenv("FASTDISTILL_IMPL", "triton")
    with pytest.raises(RuntimeError, match="FASTDISTILL_IMPL='triton'"):
        function(**good())


@each_function
def test_the_argument_beats_the_environment(function, good, monkeypatch):
    expected = function(**good()).loss
    for environment in ("torch", "triton", "cuda"):
        monkeypatch.setenv("FASTDISTILL_IMPL", environment)
        assert torch.equal(function(**good(), impl="torch").loss, expected)


@each_function
def test_an_unknown_choice_in_the_environment_is_named(function, good, monkeypatch):
    monkeypatch.setenv("FASTDISTILL_IMPL", "cuda")
    with pytest.raises(ValueError, match="FASTDISTILL_IMPL must be one of 'torch', 'triton', got 'cuda'"):
        function(**good())


def test_invalid_targets_are_counted_as_none_on_the_cpu():
    assert softmax_kl(**on_logits()).invalid_targets == 0
