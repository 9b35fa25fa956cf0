"""layer_loss against its definition, and the definition against formulas by hand."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from fastdistill import LayerLossOutput, layer_loss, layer_loss_torch, reference
from fastdistill.rows import token_rows
from fastdistill.testing import (
    DEVICE,
    DTYPES,
    INCOMING_GRADIENTS,
    USES_OF_A_LOSS,
    WIDTHS,
    assert_matches,
    differentiate,
    differentiate_twice,
    impls_of,
    in_float64,
    random_mask,
    random_normal,
    random_states,
    read_nothing,
)

FORMS = [("mse", "none"), ("mse", "layer_norm"), ("mse", "teacher_rms"), ("cosine", "none")]

IMPLS = impls_of("layer_loss")
each_impl = pytest.mark.parametrize("impl", IMPLS)
each_form = pytest.mark.parametrize(("metric", "normalize"), FORMS)
each_function = pytest.mark.parametrize(
    "function", [reference.layer_loss, *(partial(layer_loss, impl=impl) for impl in IMPLS)], ids=["definition", *IMPLS]
)

STATES = ("student_states",)


@pytest.fixture(params=["read", "unread"])
def reading(request, monkeypatch):
    """Whether values may be read, as on the CPU, or not, as on a GPU."""
    if request.param == "unread":
        read_nothing(monkeypatch)


B, S, D, L = 2, 6, 5, 3
states = partial(random_states, layers=L)


def assert_matches_definition(arguments: dict[str, Any], impl: str, dloss: float = 1.0) -> None:
    assert_matches(partial(layer_loss, impl=impl), reference.layer_loss, arguments, STATES, dloss)


MASK = random_mask(B, S)
WEIGHTS = random_mask(B, S, dtype=torch.float32)
# Every keyword that changes the result, alone and with what it interacts with.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_layer": random_states(B, S, D),
    "flat": {**states(S, D), "mask": WEIGHTS[0]},
    "bool_mask": {"mask": MASK},
    "int_mask": {"mask": random_mask(B, S, dtype=torch.int64)},
    "float_mask": {"mask": WEIGHTS},
    "skip_first": {"skip_first": 2},
    "mask_and_skip_first": {"mask": WEIGHTS, "skip_first": 1},
    "layer_weights": {"layer_weights": [0.5, 0.0, 2.0]},
    "layer_weights_tensor": {"layer_weights": torch.tensor([1.0, 2.0, 3.0]), "mask": WEIGHTS},
    "num_tokens": {"num_tokens": 37, "mask": WEIGHTS},
    "shorter_teacher": {"teacher_states": states(B, S - 2, D)["teacher_states"], "mask": WEIGHTS},
    "longer_teacher": {"teacher_states": states(B, S + 2, D)["teacher_states"], "mask": WEIGHTS},
    "widths_by_layer": {
        name: [random_normal(B, S, D + i, seed=seed + i) for i in range(L)]
        for name, seed in (("student_states", 0), ("teacher_states", 9))
    },
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def error_by_hand(s: Tensor, t: Tensor, metric: str, normalize: str) -> Tensor:
    """Of one token, by sums over channels."""
    width = len(s)
    if metric == "cosine":
        return 1 - (s * t).sum() / ((s.square().sum().sqrt() + 1e-5) * (t.square().sum().sqrt() + 1e-5))
    scale = 1.0
    if normalize == "layer_norm":
        s, t = ((x - x.mean()) / (((x - x.mean()) ** 2).sum() / width + 1e-5).sqrt() for x in (s, t))
    elif normalize == "teacher_rms":
        scale = (t**2).sum() / width + 1e-5
    return ((s - t) ** 2).sum() / width / scale


def loss_by_hand(
    student_states: list[Tensor],
    teacher_states: list[Tensor],
    mask: Tensor | None = None,
    *,
    metric: str,
    normalize: str,
    layer_weights: Any = None,
    skip_first: int = 0,
    num_tokens: float | None = None,
) -> LayerLossOutput:
    per_layer = []
    for student, teacher in zip(student_states, teacher_states, strict=True):
        total, count = torch.zeros((), dtype=torch.float64, device=DEVICE), 0.0
        if student.ndim == 2:
            student, teacher = student[None], teacher[None]
        for b in range(len(student)):
            for i in range(skip_first, min(student.shape[1], teacher.shape[1])):
                weight = 1.0 if mask is None else mask.view(student.shape[:2])[b, i].item()
                total = total + weight * error_by_hand(student[b, i], teacher[b, i], metric, normalize)
                count += weight
        per_layer.append(total / (count if num_tokens is None else num_tokens))
    per_layer = torch.stack(per_layer)
    weights = torch.as_tensor([1.0] * len(per_layer) if layer_weights is None else layer_weights).to(per_layer)
    return LayerLossOutput((weights * per_layer).sum() / weights.sum(), per_layer.detach())


@each_form
@each_case
def test_definition_is_the_formula_by_hand(case, metric, normalize):
    arguments = {**states(B, S, D), "metric": metric, "normalize": normalize, **case}
    assert_matches(reference.layer_loss, loss_by_hand, in_float64(arguments), STATES)


@pytest.mark.usefixtures("reading")
@each_impl
@each_form
@each_case
def test_every_keyword_matches_the_definition(case, metric, normalize, impl):
    assert_matches_definition({**states(B, S, D), "metric": metric, "normalize": normalize, **case}, impl)


@each_impl
@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_and_dtype_matches_the_definition(width, dtype, metric, normalize, impl):
    tokens = 40  # two chunks of the largest width
    arguments = states(tokens, width, layers=2, dtype=dtype) | {"mask": random_mask(tokens, dtype=torch.float32)}
    assert_matches_definition(arguments | {"metric": metric, "normalize": normalize}, impl)


@each_impl
@each_form
@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
def test_student_and_teacher_may_differ_in_dtype(teacher_dtype, metric, normalize, impl):
    arguments = states(B, S, D) | {"metric": metric, "normalize": normalize}
    arguments["teacher_states"] = [x.to(teacher_dtype) for x in arguments["teacher_states"]]
    assert_matches_definition(arguments, impl)
    assert layer_loss(**arguments, impl=impl).loss.dtype == torch.float32


@each_impl
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)  # the gradient is cast to it
@pytest.mark.parametrize("dloss", INCOMING_GRADIENTS)
def test_incoming_gradient_scales_the_gradient(dloss, dtype, metric, normalize, impl):
    arguments = states(256, 64, dtype=dtype) | {"metric": metric, "normalize": normalize}
    assert_matches_definition(arguments, impl, dloss)


@each_form
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_half_gradient_is_that_of_float32_rounded_once(dtype, metric, normalize):
    halves = states(64, 96, dtype=dtype) | {"metric": metric, "normalize": normalize}
    floats = {name: [x.float() for x in y] if isinstance(y, list) else y for name, y in halves.items()}
    (_, gradients), (_, exact) = (
        differentiate(partial(layer_loss, impl="torch"), arguments, STATES, 65536) for arguments in (halves, floats)
    )
    assert all(torch.equal(gradient, float32.to(dtype)) for gradient, float32 in zip(gradients, exact, strict=True))


@each_impl
@each_form
@pytest.mark.parametrize("chunk_bytes", [1, 4 * D * 5, 4 * D * 12])  # one token, some that do not divide 12, all
def test_chunk_size_does_not_change_the_result(chunk_bytes, metric, normalize, impl, monkeypatch):
    monkeypatch.setattr(layer_loss_torch, "CHUNK_BYTES", chunk_bytes)
    assert_matches_definition(states(B, S, D) | {"mask": WEIGHTS, "metric": metric, "normalize": normalize}, impl)


PLACES = {
    "all": lambda rows, places: rows >= 0,
    "padded_right": lambda rows, places: places < 9 - 2 * rows,
    "padded_left": lambda rows, places: places >= 3 * rows,
    "parted": lambda rows, places: (places != 4) & (rows != 1),
}


@each_form
@pytest.mark.parametrize("counted", PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("teacher_positions", [7, 9, 11])
@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_tokens_that_lie_together_match_the_definition(
    rows, teacher_positions, counted, metric, normalize, monkeypatch
):
    """They are used where they are, in chunks of so many rows, however few they are."""
    monkeypatch.setattr(layer_loss_torch, "SCATTERED", 0)
    monkeypatch.setattr(layer_loss_torch, "CHUNK_BYTES", rows * 4 * D)
    arguments = states(3, 9, D) | {"teacher_states": states(3, teacher_positions, D)["teacher_states"]}
    mask = counted(torch.arange(3)[:, None], torch.arange(9)).expand(3, 9).to(DEVICE)
    assert_matches_definition(arguments | {"mask": mask, "metric": metric, "normalize": normalize}, "torch")


def test_tokens_that_lie_together_are_chunks_of_about_one_length_and_scattered_ones_are_joined():
    def sizes(*runs: int) -> list[int]:
        """Of runs of tokens, each followed by one that does not count."""
        weights = torch.cat([F.pad(torch.ones(run), (0, 1)) for run in runs])
        rows = token_rows(weights, None, drop_uncounted=True)
        return layer_loss_torch._sizes(rows, layer_loss_torch.CHUNK_BYTES // 100)

    assert sizes(250) == [84, 83, 83]
    assert sizes(100, 130, 70) == [100, 65, 65, 70]
    assert sizes(*[10] * 25) == [84, 83, 83]


LAYOUTS = {
    "without_the_last": lambda x: x[:, :-1],
    "every_other_position": lambda x: x[:, ::2],
    "positions_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every_other_channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@each_impl
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_is_followed(layout, impl):
    arguments = {name: [layout(x) for x in layers] for name, layers in states(B, S, D).items()}
    positions = arguments["student_states"][0].shape[1]
    mask = random_mask(positions, B, dtype=torch.float32).t()
    assert_matches_definition(arguments | {"mask": mask, "normalize": "layer_norm"}, impl)


@each_impl
@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # 5000^2 is beyond float16
def test_outlier_channels_match_the_definition(dtype, metric, normalize, impl):
    arguments = states(B, S, 128, dtype=dtype)
    for student, teacher in zip(*arguments.values(), strict=True):
        student[..., 7], teacher[..., 7] = 5000, 4900
        student[0, 0], teacher[0, 0] = 5000, -5000
    assert_matches_definition(arguments | {"metric": metric, "normalize": normalize}, impl)


@pytest.mark.usefixtures("reading")
@each_function
@each_form
@pytest.mark.parametrize("nothing", ["masked", "skipped", "no_tokens", "empty"])
def test_no_token_gives_loss_0_and_gradient_0(nothing, metric, normalize, function):
    keywords = {
        "masked": {"mask": torch.zeros_like(MASK)},
        "skipped": {"skip_first": S},
        "no_tokens": {"num_tokens": 0},
    }
    arguments = states(B, 0 if nothing == "empty" else S, D) | keywords.get(nothing, {})
    output, gradients = differentiate(function, arguments | {"metric": metric, "normalize": normalize}, STATES)
    assert output.loss == 0
    assert (output.per_layer == 0).all()
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.usefixtures("reading")
@each_function
@each_form
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("left_out_by", ["mask", "skip_first"])
def test_what_does_not_count_may_hold_anything(left_out_by, bad, metric, normalize, function):
    arguments = states(B, S, D) | {"metric": metric, "normalize": normalize}
    left_out = ~MASK
    if left_out_by == "skip_first":
        left_out = torch.zeros_like(MASK)
        left_out[:, :2] = True
    arguments |= {"mask": MASK} if left_out_by == "mask" else {"skip_first": 2}
    clean, clean_gradients = differentiate(function, arguments, STATES)
    for name in ("student_states", "teacher_states"):
        arguments[name] = [x.masked_fill(left_out[..., None], bad) for x in arguments[name]]
    output, gradients = differentiate(function, arguments, STATES)
    assert left_out.any()
    assert torch.equal(output.loss, clean.loss)
    assert all(map(torch.equal, gradients, clean_gradients))
    assert all((gradient[left_out] == 0).all() for gradient in gradients)


@each_function
@each_form
def test_student_like_the_teacher_has_no_loss_and_no_gradient(metric, normalize, function):
    arguments = states(B, S, 768) | {"metric": metric, "normalize": normalize}
    arguments["student_states"] = [x.clone() for x in arguments["teacher_states"]]
    output, gradients = differentiate(function, arguments, STATES)
    assert output.loss.abs() <= 1e-6
    assert all(gradient.abs().max() <= 1e-6 for gradient in gradients)


@each_function
@each_form
def test_vectors_of_zeros_give_a_finite_gradient(metric, normalize, function):
    arguments = states(B, S, D) | {"metric": metric, "normalize": normalize}
    for x in (*arguments["student_states"], *arguments["teacher_states"]):
        x[0, :3] = 0
    output, gradients = differentiate(function, arguments, STATES)
    assert output.loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@each_function
def test_mse_is_the_mean_of_all_elements(function):
    """Whichever way the mean is written, and not the sum over channels that is D times as large."""
    (s,), (t,) = random_states(B, S, D).values()
    loss = function([s], [t]).loss
    torch.testing.assert_close(loss, F.mse_loss(s, t))
    torch.testing.assert_close(loss, F.mse_loss(s, t, reduction="sum") / (B * S * D))


@each_function
def test_layer_norm_is_0_to_4_and_2_for_unrelated_vectors(function):
    s, t = random_normal(64, 768, seed=1) + 3, 7 * random_normal(64, 768, seed=2)
    distance = partial(function, normalize="layer_norm")
    assert distance([s], [t]).loss.item() == pytest.approx(2, abs=0.02)
    assert distance([s], [3 * s + 2]).loss.item() == pytest.approx(0, abs=1e-5)
    assert distance([s], [-s]).loss.item() == pytest.approx(4, abs=1e-3)


@each_function
def test_half_of_layer_norm_is_one_less_the_correlation(function):
    (s,), (t,) = random_states(40, 128).values()
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(s, t, strict=True)])
    torch.testing.assert_close(function([s], [t], normalize="layer_norm").loss / 2, (1 - correlation).mean())


@each_function
@each_form
def test_loss_is_the_same_at_any_length(metric, normalize, function):
    """Repeated states, at a training length of 50 and of 512."""
    per_length = []
    for length in (50, 512):
        repeated = {
            name: [x.repeat(1, 1 + length // 2, 1)[:, :length] for x in y] for name, y in states(B, 2, 64).items()
        }
        per_length.append(function(**repeated, metric=metric, normalize=normalize).loss)
    torch.testing.assert_close(*per_length)


@each_function
@each_form
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, metric, normalize, function):
    arguments = states(B, S, D)
    bare = function(**arguments, metric=metric, normalize=normalize)
    amount = (0, 0, 7, 0) if side == "left" else (0, 0, 0, 7)
    padded = {name: [F.pad(x, amount, value=30.0) for x in layers] for name, layers in arguments.items()}
    mask = F.pad(torch.ones(B, S, device=DEVICE), amount[2:])
    torch.testing.assert_close(function(**padded, mask=mask, metric=metric, normalize=normalize).loss, bare.loss)


@each_function
def test_loss_is_the_weighted_mean_over_layers(function):
    arguments = states(B, S, D)
    alone = [function([s], [t]).loss for s, t in zip(*arguments.values(), strict=True)]
    output = function(**arguments, layer_weights=[1, 0, 3])
    torch.testing.assert_close(output.per_layer, torch.stack(alone))
    torch.testing.assert_close(output.loss, (alone[0] + 3 * alone[2]) / 4)
    torch.testing.assert_close(function(**arguments).loss, sum(alone) / L)


@each_impl
@each_form
def test_a_layer_of_weight_0_may_hold_anything(metric, normalize, impl):
    arguments = states(B, S, D) | {"metric": metric, "normalize": normalize, "layer_weights": [1, 0, 3]}
    function = partial(layer_loss, impl=impl)
    clean, clean_gradients = differentiate(function, arguments, STATES)
    arguments["student_states"][1] = torch.full_like(arguments["student_states"][1], torch.nan)
    output, gradients = differentiate(function, arguments, STATES)
    assert torch.equal(output.loss, clean.loss)
    assert torch.equal(output.per_layer.isnan(), torch.tensor([False, True, False], device=DEVICE))
    assert all(map(torch.equal, gradients, clean_gradients))
    assert (gradients[1] == 0).all()


@each_impl
@pytest.mark.parametrize("layers", [1, 2, 31, 32, 33, 65])
def test_any_number_of_layers_matches_the_definition(layers, impl):
    arguments = random_states(B, S, D, layers=layers) | {"mask": WEIGHTS, "normalize": "layer_norm"}
    assert_matches_definition(arguments, impl)


@each_impl
@each_form
@pytest.mark.parametrize("width", [8193, 16384, 20001])
def test_a_width_beyond_one_tile_matches_the_definition(width, metric, normalize, impl):
    """The first tile has a mean far from the rest's."""
    arguments = random_states(3, width) | {"metric": metric, "normalize": normalize}
    for (state,) in (arguments["student_states"], arguments["teacher_states"]):
        state[:, :8192] += 100
        state[1, 5] = 23_000
    assert_matches_definition(arguments, impl)


@each_impl
@each_form
def test_layers_of_several_kinds_match_the_definition(metric, normalize, impl):
    """Of other widths, dtypes, lengths and layouts, in no order."""
    kinds = [random_states(B, S, D), random_states(B, S, D + 3), random_states(B, S, D, dtype=torch.float16)]
    kinds.append(random_states(B, S, D, dtype=torch.bfloat16) if DEVICE == "cuda" else random_states(B, S, 2))
    kinds.append({name: [x[:, ::2] for x in y] for name, y in random_states(B, 2 * S, D).items()})
    kinds.append(random_states(B, S, D) | {"teacher_states": random_states(B, S - 2, D)["teacher_states"]})
    arguments: dict[str, Any] = {name: [x for kind in kinds * 2 for x in kind[name]] for name in kinds[0]}
    arguments |= {"mask": WEIGHTS, "layer_weights": range(1, 13), "metric": metric, "normalize": normalize}
    assert_matches_definition(arguments, impl)


@each_impl
def test_only_the_loss_carries_a_gradient_and_only_to_the_student(impl):
    arguments = states(B, S, D)
    assert not layer_loss(**arguments, impl=impl).loss.requires_grad
    arguments["student_states"][1].requires_grad_()
    output = layer_loss(**arguments, impl=impl)
    output.loss.backward()
    assert not output.per_layer.requires_grad
    assert [x.grad is not None for x in arguments["student_states"]] == [False, True, False]


@each_impl
def test_num_tokens_may_be_a_0d_tensor(impl):
    arguments = states(B, S, D)
    by_number = layer_loss(**arguments, num_tokens=7, impl=impl).loss
    assert torch.equal(layer_loss(**arguments, num_tokens=torch.tensor(7, device=DEVICE), impl=impl).loss, by_number)


@each_impl
@each_form
def test_autocast_does_not_change_the_result(metric, normalize, impl):
    arguments = states(B, S, 128) | {"metric": metric, "normalize": normalize}
    plain, gradients = differentiate(partial(layer_loss, impl=impl), arguments, STATES)
    with torch.autocast(DEVICE, torch.bfloat16):
        cast, cast_gradients = differentiate(partial(layer_loss, impl=impl), arguments, STATES)
    assert torch.equal(plain.loss, cast.loss)
    assert all(map(torch.equal, gradients, cast_gradients))


@each_impl
@each_form
def test_runs_repeat_bit_for_bit(metric, normalize, impl):
    arguments = states(64, 768, dtype=torch.bfloat16) | {"metric": metric, "normalize": normalize}
    (first, gradients), (second, same_gradients) = (
        differentiate(partial(layer_loss, impl=impl), arguments, STATES) for _ in range(2)
    )
    assert torch.equal(first.loss, second.loss)
    assert all(map(torch.equal, gradients, same_gradients))


@each_impl
def test_retained_graph_can_be_differentiated_again(impl):
    arguments = random_states(B, S, D)
    leaf = arguments["student_states"][0].requires_grad_()
    loss = layer_loss(**arguments, impl=impl).loss
    (once,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(once, again)


@each_impl
@pytest.mark.parametrize("use", USES_OF_A_LOSS.values(), ids=USES_OF_A_LOSS.keys())
def test_a_second_derivative_is_refused_rather_than_wrong(use, impl):
    with pytest.raises(RuntimeError):
        differentiate_twice(partial(layer_loss, impl=impl), random_states(B, S, D), "student_states", use)


@each_form
def test_gradcheck(metric, normalize):
    arguments = in_float64(states(2, 4, 3, layers=2))
    keywords = {"mask": random_mask(2, 4, dtype=torch.float64), "skip_first": 1, "layer_weights": [1, 2]}

    def loss(*student: Tensor) -> Tensor:
        return layer_loss(student, arguments["teacher_states"], metric=metric, normalize=normalize, **keywords).loss

    assert gradcheck(loss, [x.requires_grad_() for x in arguments["student_states"]])
