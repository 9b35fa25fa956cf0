"""What tests/ and bench/ share: implementations, sizes, seeded inputs, tolerances, peak memory.

The truth of every check is `reference.py` in float64, at the very values that the tested dtype holds.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastdistill import checks, hidden_states, losses, softmax_kl_torch
from fastdistill.backend import WITH_KERNEL, obstacle_to_triton
from fastdistill.rows import token_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def impls_of(operation: str) -> list[str]:
    """Implementations of an operation that run here, which every parity test of it is run on."""
    has_kernel = operation in WITH_KERNEL and obstacle_to_triton(DEVICE, None, WITH_KERNEL[operation]) is None
    return ["torch", "triton"] if has_kernel else ["torch"]


VOCAB_SIZES = (1, 127, 128, 129, 4097, 32000, 50257)
"""One id; around a block of 128; one past a block of 4096; Llama's even and GPT-2's odd vocabulary."""

WIDTHS = (1, 2, 127, 128, 768, 8192)
"""One channel, whose variance is 0; around a block of 128; GPT-2's width; a 70B model's."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

TEMPERATURES = (0.05, 0.5, 1.0, 2.0, 8.0)
"""Nearly argmax to nearly uniform, with the T = 1 that hides a missing T or T^2."""

INCOMING_GRADIENTS = (1.0, 2.0, 65536.0)
"""None, a loss weight, and GradScaler's first scale."""


def random_normal(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32, device: str = DEVICE
) -> Tensor:
    """Logits, hidden states or weights: `scale` times a standard normal, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(device, dtype)


def random_targets(
    *shape: int, vocab: int, seed: int = 0, ignore_index: int = -100, ignored: float = 0.25, device: str = DEVICE
) -> Tensor:
    """Ids below `vocab`, a share of them `ignore_index`."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(vocab, shape, generator=generator)
    return targets.masked_fill(torch.rand(shape, generator=generator) < ignored, ignore_index).to(device)


def random_mask(
    *shape: int, dtype: torch.dtype = torch.bool, seed: int = 0, masked: float = 0.25, device: str = DEVICE
) -> Tensor:
    """A share of zeros among True, 1 to 3 (integer) or weights within [0.5, 2) (float)."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        weights = torch.ones(shape)
    elif dtype.is_floating_point:
        weights = 0.5 + 1.5 * torch.rand(shape, generator=generator)
    else:
        weights = torch.randint(1, 4, shape, generator=generator)
    return weights.masked_fill(torch.rand(shape, generator=generator) < masked, 0).to(device, dtype)


def random_logits(
    *shape: int, teacher_vocab: int | None = None, dtype: torch.dtype = torch.float32, device: str = DEVICE
) -> dict[str, Any]:
    """Student logits of `shape` and teacher logits beside them, by argument name."""
    vocabs = {"student": shape[-1], "teacher": teacher_vocab or shape[-1]}
    return {
        f"{model}_logits": random_normal(*shape[:-1], v, seed=seed, scale=2, dtype=dtype, device=device)
        for seed, (model, v) in enumerate(vocabs.items())
    }


def random_states(
    *shape: int, layers: int = 1, dtype: torch.dtype = torch.float32, device: str = DEVICE
) -> dict[str, Any]:
    """A list of hidden states of each model, by argument name; neither centred nor of deviation 1."""
    return {
        f"{model}_states": [
            (random_normal(*shape, seed=seed + layer, scale=2) + 0.5).to(device, dtype) for layer in range(layers)
        ]
        for model, seed in (("student", 0), ("teacher", 100))
    }


def random_attention(
    batch: int,
    heads: int,
    positions: int,
    width: int,
    *,
    key_heads: int | None = None,
    teacher_key_heads: int | None = None,
    teacher_width: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
) -> dict[str, Any]:
    """Queries and keys of each model, by argument name; scores have a deviation of about 2."""
    arguments = {}
    kinds = {"student": (key_heads or heads, width), "teacher": (teacher_key_heads or heads, teacher_width or width)}
    for seed, (model, (own_key_heads, d)) in enumerate(kinds.items()):
        for name, count in (("q", heads), ("k", own_key_heads)):
            seed_of = 10 * seed + (name == "k")
            arguments[f"{model}_{name}"] = random_normal(
                batch, count, positions, d, seed=seed_of, scale=2**0.5, dtype=dtype, device=device
            )
    return arguments


def random_heads(
    *leading: int,
    vocab: int,
    width: int,
    teacher_vocab: int | None = None,
    teacher_width: int | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
) -> dict[str, Any]:
    """Hidden states and output heads of student and teacher, by argument name; logits have a deviation of about 2."""
    arguments = {}
    sizes = {"student": (vocab, width), "teacher": (teacher_vocab or vocab, teacher_width or width)}
    for seed, (model, (v, d)) in enumerate(sizes.items()):
        made = {"dtype": dtype, "device": device}
        arguments[f"{model}_hidden"] = random_normal(*leading, d, seed=10 * seed, **made)
        arguments[f"{model}_weight"] = random_normal(v, d, seed=10 * seed + 1, scale=2 / d**0.5, **made)
        if bias:
            arguments[f"{model}_bias"] = random_normal(v, seed=10 * seed + 2, **made)
    return arguments


def differentiate(
    function: Callable[..., Any], arguments: dict[str, Any], wrt: Sequence[str], dloss: float | Tensor = 1.0
) -> tuple[Any, list[Tensor]]:
    """The output of `function(**arguments)` and the gradients of its `loss`, times `dloss`, in the arguments `wrt`.

    An argument may be a list of tensors; each then has its gradient, in order. Layouts are kept.
    """
    leaves = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), {name: arguments[name] for name in wrt})
    output = function(**arguments | leaves)
    gradients = torch.autograd.grad(output.loss, tree_leaves(leaves), torch.ones_like(output.loss) * dloss)
    return output, list(gradients)


USES_OF_A_LOSS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "alone": lambda loss, x: loss,
    "in_a_product": lambda loss, x: loss.square(),
    "in_a_sum": lambda loss, x: loss + x.square().sum(),
}
"""What may be differentiated twice in an argument `x`; in a sum autograd would leave out what it cannot."""


def differentiate_twice(
    function: Callable[..., Any], arguments: dict[str, Any], wrt: str, use: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The second derivative of `use(loss, x)`, summed over the first's elements, in `x`, the argument `wrt`."""
    arguments = arguments | tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), {wrt: arguments[wrt]})
    x = tree_leaves(arguments[wrt])[0]
    (gradient,) = torch.autograd.grad(use(function(**arguments).loss.sum(), x), x, create_graph=True)
    return torch.autograd.grad(gradient.sum(), x)[0]


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with every floating-point tensor in float64."""
    return tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, arguments)


def assert_matches(
    function: Callable[..., Any],
    definition: Callable[..., Any],
    arguments: dict[str, Any],
    wrt: Sequence[str],
    dloss: float | Tensor = 1.0,
) -> None:
    """`function` gives the values and gradients of `definition` in float64, within the tolerances below."""
    output, gradients = differentiate(function, arguments, wrt, dloss)
    eager, eager_gradients = differentiate(definition, arguments, wrt, dloss)
    truth, true_gradients = differentiate(definition, in_float64(arguments), wrt, dloss)
    for field, value, true_value, eager_value in zip(output._fields, output, truth, eager, strict=True):
        assert (value is None) == (true_value is None), f"{field}: got {value}, truth is {true_value}"
        if value is not None:
            assert value.dtype == eager_value.dtype, f"{field}: {value.dtype}, {eager_value.dtype} is right"
            assert_value_close(value, true_value, field)
    for gradient, true_gradient, eager_gradient in zip(gradients, true_gradients, eager_gradients, strict=True):
        assert_gradient_close(gradient, true_gradient, eager_gradient)


def relative_error(x: Tensor, truth: Tensor) -> float:
    """rms(x - truth) / rms(truth); for a truth of nothing but zeros 0 if x is that too, else inf."""
    x, truth = x.double(), truth.double()
    if torch.equal(x, truth):
        return 0.0
    return ((x - truth).square().mean().sqrt() / truth.square().mean().sqrt()).item()


def assert_value_close(value: Tensor, truth: Tensor, name: str = "loss") -> None:
    """|value - truth| <= 1e-5 max(|truth|, 1), and 1e-10 for float64; infinities agree and nothing is NaN."""
    assert value.shape == truth.shape, f"{name}: shape {tuple(value.shape)}, truth has {tuple(truth.shape)}"
    tolerance = 1e-10 if value.dtype == torch.float64 else 1e-5
    close = (value == truth) | ((value - truth).abs() <= tolerance * truth.abs().clamp(min=1))
    assert close.all(), f"{name}: {value[~close]} where the truth is {truth[~close]}"


def assert_gradient_close(gradient: Tensor, truth: Tensor, eager: Tensor) -> None:
    """The relative error is small beside that of `eager`, the definition computed in the gradient's own dtype.

    float64: at most 1e-10. float32: at most 1e-5, or twice eager's, since near the teacher float32 itself is that bad.
    Half precisions: at most 1e-3 more than eager's. Elements whose truth is 0, to float64's rounding, are within 1e-6.
    """
    assert gradient.shape == truth.shape, f"shape {tuple(gradient.shape)}, truth has {tuple(truth.shape)}"
    assert gradient.dtype == eager.dtype, f"{gradient.dtype}, the input is {eager.dtype}"
    assert gradient.isfinite().all(), "the gradient is not finite"
    zero = truth.abs() <= 1e-15
    assert (gradient[zero].abs() <= 1e-6).all(), f"{gradient[zero].abs().max().item():.2e} where the truth is 0"
    if zero.all():
        return
    error, eager_error = relative_error(gradient, truth), relative_error(eager, truth)
    if gradient.dtype == torch.float64:
        limit = 1e-10
    elif gradient.dtype == torch.float32:
        limit = max(1e-5, 2 * eager_error)
    else:
        limit = eager_error + 1e-3
    assert error <= limit, f"relative error {error:.2e}, eager's {eager_error:.2e}"


def read_nothing(monkeypatch: Any) -> None:
    """Send the PyTorch paths the way that they take on a GPU, where a value that is read must be waited for."""
    monkeypatch.setattr(checks, "may_read", lambda tensor: False)
    for module in (losses, hidden_states):
        monkeypatch.setattr(module, "token_rows", lambda *x, drop_uncounted: token_rows(*x, drop_uncounted=False))
    monkeypatch.setattr(softmax_kl_torch, "_is_exceptional", lambda sums: True)


def peak_memory(make: Callable[[], Any], run: Callable[[Any], Any]) -> int:
    """Bytes that `run(make())` needs at most in a fresh process beyond what `make()` returned; its result counts.

    A new interpreter must be able to import both: functions of an importable module, or partials of such. On the CPU
    the resident set is measured, which Linux alone can; code that is loaded at first use is in it, about 40 MB.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_above_inputs, make, run).result()


def _peak_above_inputs(make: Callable[[], Any], run: Callable[[Any], Any]) -> int:
    if DEVICE == "cpu":
        m_mmap_threshold = -3
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)  # freed blocks go back at once: no share of chance
    inputs = make()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the high-water mark, to VmRSS, the present
    before = _resident_bytes("VmRSS")
    run(inputs)
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
