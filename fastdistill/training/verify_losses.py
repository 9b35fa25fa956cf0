"""Checks of the losses: against their definitions, at any length and padding, and on the kernels of a GPU."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import layer_loss, linear_cross_vocab_kl, linear_softmax_kl, shift_targets, softmax_kl
from fastdistill.align import aligned_positions, shared_vocabulary
from fastdistill.backend import WITH_KERNEL, choose_impl, obstacle_to_triton
from fastdistill.training import verify_definitions as plain
from fastdistill.training.verify_attention import attention_parities
from fastdistill.training.verify_numbers import equal, parity, refused, true

CPU = torch.device("cpu")
FORMS: dict[str, tuple[str, str]] = {
    "raw": ("mse", "none"),
    "layer-normalised": ("mse", "layer_norm"),
    "over the teacher's mean square": ("mse", "teacher_rms"),
    "cosine": ("cosine", "none"),
}
"""Metric and normalisation of each form of `layer_loss`."""


def layerwise_normalization() -> list[str]:
    """The layerwise loss is the document's formula and its normalised forms, and changes with neither length nor
    padding.
    """
    s, t = _random(2, 50, 64, seed=0), _random(2, 50, 64, seed=1)
    document = ((s - t) ** 2).sum().item() / (2 * 50 * 64)
    seen = [equal("raw, against sum / (B S D):", layer_loss([s], [t]).loss.item(), document)]
    padded = [F.pad(x, (0, 0, 0, 14), value=1e4) for x in (s, t)]
    mask = torch.arange(64).expand(2, 64) < 50
    for name, (metric, normalize) in FORMS.items():
        how: dict[str, Any] = {"metric": metric, "normalize": normalize}
        short = layer_loss([s], [t], **how).loss.item()
        long = layer_loss([s.repeat(1, 10, 1)], [t.repeat(1, 10, 1)], **how).loss.item()
        seen.append(equal(f"{name}, the same vectors at S = 500 and at S = 50:", long, short))
        masked = layer_loss(padded[:1], padded[1:], mask, **how).loss.item()
        seen.append(equal(f"{name}, with 14 padded positions:", masked, short))
    for name, other, expected in (("equal", s, 0.0), ("opposite", -s, 2.0)):
        half = layer_loss([s], [other], normalize="layer_norm").loss.item() / 2
        seen.append(equal(f"half of the layer-normalised, {name} states:", half, expected, 1e-4))
    half = layer_loss([s[0, :1]], [t[0, :1]], normalize="layer_norm").loss.item() / 2
    correlation = torch.corrcoef(torch.stack([s[0, 0], t[0, 0]]))[0, 1].item()
    seen.append(equal("half of the layer-normalised, against 1 - correlation:", half, 1 - correlation, 1e-4))
    return seen + layer_parities(CPU, "torch")


def layer_parities(device: torch.device, impl: str) -> list[str]:
    """Each form of `layer_loss` and its gradients, of two layers of unequal weight and width, with first positions
    left out and NaN where no token counts.
    """
    learned = [_random(2, 12, width, seed=width) for width in (24, 40)]
    taught = [_random(2, 12, width, seed=width + 1) for width in (24, 40)]
    weights = _weights(2, 12)
    counts = (weights > 0) & (torch.arange(12) >= 3)
    for states in (*learned, *taught):
        states[weights == 0] = torch.nan

    def check(name: str, metric: str, normalize: str) -> str:
        def loss(s0: Tensor, s1: Tensor, t0: Tensor, t1: Tensor, w: Tensor) -> Tensor:
            how: dict[str, Any] = {"metric": metric, "normalize": normalize, "skip_first": 3, "impl": impl}
            return layer_loss([s0, s1], [t0, t1], w, layer_weights=[1.0, 3.0], **how).loss

        def definition(s0: Tensor, s1: Tensor, t0: Tensor, t1: Tensor, w: Tensor) -> Tensor:
            form = "cosine" if metric == "cosine" else normalize
            first, second = (
                plain.mean(plain.layer_error(form, s[counts], t[counts]), w[counts]) for s, t in ((s0, t0), (s1, t1))
            )
            return (first + 3 * second) / 4

        return parity(f"{name}, masked, from position 3 on:", loss, definition, learned, [*taught, weights], device)

    return [check(name, *form) for name, form in FORMS.items()]


def sequence_alignment() -> list[str]:
    """Unequal lengths and vocabularies are compared over what both have; two tokenizers where they have read the
    same bytes, over the strings that both have.
    """
    s, t = _random(2, 168, 300, seed=0), _random(2, 160, 320, seed=1)
    counted = plain.distilled("forward_kl", s[:, :160].flatten(0, 1), t.flatten(0, 1), 2.0).mean().item()
    out = softmax_kl(s, t, temperature=2.0)
    assert out.kl is not None
    seen = [
        equal("KL of 168 against 160 positions, 300 against 320 ids:", out.kl.item(), counted / 4),
        equal("loss, with its T^2:", out.loss.item(), counted),
        equal("tokens counted:", out.num_tokens.item(), 320),
        parity(
            "with its gradient:",
            lambda s, t: softmax_kl(s, t, temperature=2.0).loss,
            lambda s, t: plain.distilled("forward_kl", s[:, :160].flatten(0, 1), t.flatten(0, 1), 2.0).mean(),
            [s], [t], CPU,
        ),
        parity(
            "layer-normalised, 168 against 160 positions:",
            lambda s, t: layer_loss([s], [t], normalize="layer_norm").loss,
            lambda s, t: plain.layer_error("layer_norm", s[:, :160], t).mean(),
            [_random(2, 168, 24, seed=2)], [_random(2, 160, 24, seed=3)], CPU,
        ),
        refused(
            "2 sequences against 3", ValueError, ["teacher_logits", "2", "3"], lambda: softmax_kl(s, _random(3, 160, 9))
        ),
    ]  # fmt: skip
    return seen + _two_tokenizers()


def _two_tokenizers() -> list[str]:
    ends, other_ends = ([2, 4, 6, 9, 12, 13], [3, 6, 7, 9, 13])
    same = [(i, j) for i, end in enumerate(ends) for j, other in enumerate(other_ends) if end == other]
    _, *found = aligned_positions(torch.tensor([ends]), torch.tensor([other_ends]))
    pairs = list(zip(*(side.tolist() for side in found), strict=True))
    strings, other_strings = ([b"a", b"b", None, b"ab", b"c"], [b"c", b"d", b"ab", b"b"])
    ids = [side.tolist() for side in shared_vocabulary(strings, other_strings)]
    return [
        true(f"6 against 5 tokens, positions that have read the same bytes: {pairs} = {same}", pairs == same),
        true(f"5 against 4 strings, ids of those that both have: {ids} = [[1, 3, 4], [3, 2, 0]]",
             ids == [[1, 3, 4], [3, 2, 0]]),
        *cross_vocab_parities(CPU, "torch"),
    ]  # fmt: skip


def cross_vocab_parities(device: torch.device, impl: str) -> list[str]:
    """`linear_cross_vocab_kl` and its gradients of 53 against 61 ids of which 40 are the same string."""
    learned = [_random(22, 16, seed=0), _random(53, 16, seed=1) / 4]
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randperm(size, generator=generator)[:40] for size in (53, 61)]
    weights = _weights(22)
    fixed = [_random(22, 8, seed=3), _random(61, 8, seed=4) / 3, *ids, weights]
    learned[0][weights == 0] = torch.nan
    counts = weights > 0

    def check(method: str, divergence: str, impl: str) -> str:
        def loss(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, i_s: Tensor, i_t: Tensor, w: Tensor) -> Tensor:
            how: dict[str, Any] = {"method": method, "divergence": divergence, "jsd_beta": plain.BETA, "impl": impl}
            return linear_cross_vocab_kl(h_s, w_s, h_t, w_t, (i_s, i_t), mask=w, temperature=2.0, **how).loss

        def definition(
            h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, i_s: Tensor, i_t: Tensor, w: Tensor
        ) -> Tensor:
            z_s, z_t = h_s[counts] @ w_s.T, h_t[counts] @ w_t.T
            if method == "sorted":
                return plain.mean(plain.sorted_distance(z_s, z_t, 2.0), w[counts])
            p_s, p_t = plain.events(z_s, i_s, 2.0), plain.events(z_t, i_t, 2.0)
            return plain.mean(4 * plain.divergence(divergence, p_s, p_t), w[counts])

        name = f"two vocabularies, {method}, {divergence}:"
        return parity(name, loss, definition, learned, fixed, device)

    compared = [check("shared", divergence, impl) for divergence in ("forward_kl", "reverse_kl", "jsd")]
    return [*compared, check("sorted", "forward_kl", "torch")]


def losses() -> list[str]:
    """Loss and gradient of each operation are its definition's; a target is the id that comes next."""
    ids = torch.arange(14).view(2, 7)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    targets = shift_targets(ids, mask).tolist()
    by_hand = [[1, 2, 3, 4, 5, 6, -100], [8, 9, 10, -100, -100, -100, -100]]
    seen = [true(f"targets of 0 1 2 3 4 5 6 and 7 8 9 10 + padding: {targets}", targets == by_hand)]
    return [
        *seen,
        *softmax_parities(CPU, "torch"),
        *linear_parities(CPU, "torch"),
        *attention_parities(CPU, "torch"),
    ]


_TERMS = {
    "forward_kl, T = 2": ("forward_kl", 2.0, 1.0, 0.0),
    "reverse_kl, T = 2": ("reverse_kl", 2.0, 1.0, 0.0),
    "jsd, T = 2": ("jsd", 2.0, 1.0, 0.0),
    "0.7 forward_kl, T = 3, + 0.3 cross-entropy": ("forward_kl", 3.0, 0.7, 0.3),
    "cross-entropy": ("forward_kl", 1.0, 0.0, 1.0),
}
"""Divergence, temperature, and the weights of divergence and cross-entropy."""


def _how(name: str) -> dict[str, Any]:
    keywords = ("divergence", "temperature", "kl_weight", "ce_weight")
    return {**dict(zip(keywords, _TERMS[name], strict=True)), "jsd_beta": plain.BETA}


def _of_logits(name: str, z_s: Tensor, z_t: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The definition, of the tokens that count."""
    divergence, temperature, kl_weight, ce_weight = _TERMS[name]
    distilled = plain.distilled(divergence, z_s, z_t, temperature)
    return plain.mean(kl_weight * distilled + ce_weight * plain.cross_entropy(z_s, targets), weights)


def softmax_parities(device: torch.device, impl: str) -> list[str]:
    """`softmax_kl`: each divergence and the cross-entropy, masked, with NaN where no token counts."""
    targets, weights = _targets(2, 11), _weights(2, 11)
    counts = (weights > 0) & (targets != -100)
    logits, teacher_logits = _random(2, 11, 53, seed=0), _random(2, 11, 61, seed=1)
    logits[~counts] = torch.nan

    def check(name: str) -> str:
        def loss(z_s: Tensor, z_t: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return softmax_kl(z_s, z_t, y, mask=w, **_how(name), impl=impl).loss

        def definition(z_s: Tensor, z_t: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return _of_logits(name, *(x[counts] for x in (z_s, z_t, y, w)))

        return parity(f"softmax_kl, {name}:", loss, definition, [logits], [teacher_logits, targets, weights], device)

    return [check(name) for name in _TERMS]


def linear_parities(device: torch.device, impl: str) -> list[str]:
    """`linear_softmax_kl`: the same with gradients of hidden states, head and bias, in chunks of some tokens."""
    targets, weights = _targets(2, 11), _weights(2, 11)
    counts = (weights > 0) & (targets != -100)
    learned = [_random(2, 11, 16, seed=0), _random(53, 16, seed=1) / 4, _random(53, seed=2)]
    fixed = [_random(2, 11, 8, seed=3), _random(61, 8, seed=4) / 3, targets, weights]
    learned[0][~counts] = torch.nan

    def check(name: str) -> str:
        def loss(hidden: Tensor, head: Tensor, bias: Tensor, h_t: Tensor, w_t: Tensor, y: Tensor, w: Tensor) -> Tensor:
            how = {"student_bias": bias, "mask": w, "max_chunk_bytes": 8192, "impl": impl, **_how(name)}
            return linear_softmax_kl(hidden, head, h_t, w_t, y, **how).loss

        def definition(
            hidden: Tensor, head: Tensor, bias: Tensor, h_t: Tensor, w_t: Tensor, y: Tensor, w: Tensor
        ) -> Tensor:
            z_s, z_t = hidden[counts] @ head.T + bias, h_t[counts] @ w_t.T
            return _of_logits(name, z_s, z_t, y[counts], w[counts])

        return parity(f"linear_softmax_kl, {name}:", loss, definition, learned, fixed, device)

    return [check(name) for name in _TERMS]


def kernels() -> list[str]:
    """On a GPU, the implementation that is chosen there for each operation is its definition too."""
    if not torch.cuda.is_available():
        return ["no GPU is here: what was checked is the PyTorch path, which serves a CPU"]
    device = torch.device("cuda", torch.cuda.current_device())
    return [torch.cuda.get_device_name(device), *on_device(device)]


def on_device(device: torch.device) -> list[str]:
    """What runs there, why where that is not a kernel, and its parities."""
    seen, chosen = [], {}
    half = torch.empty(0, dtype=torch.float16)
    for operation, file in WITH_KERNEL.items():
        multiplies = [half] if operation == "attention_kl" else []
        chosen[operation] = choose_impl(operation, None, device, multiplies=multiplies)
        line = f"{operation} runs {'its Triton kernels' if chosen[operation] == 'triton' else 'the PyTorch path'}"
        if asked := os.environ.get("FASTDISTILL_IMPL"):
            line += f": FASTDISTILL_IMPL={asked}"
        elif obstacle := obstacle_to_triton(device.type, device.index, file):
            line += f": {obstacle}"
        elif multiplies:
            line += " in half precision"
        seen.append(line)
    return [
        *seen,
        *softmax_parities(device, chosen["softmax_kl"]),
        *linear_parities(device, chosen["linear_softmax_kl"]),
        *cross_vocab_parities(device, chosen["softmax_kl"]),
        *layer_parities(device, chosen["layer_loss"]),
        *attention_parities(device, chosen["attention_kl"]),
    ]


def _random(*shape: int, seed: int = 0) -> Tensor:
    """Normal, of deviation 2 about 0.5, so that neither centring nor scaling goes unseen."""
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5


def _weights(*shape: int) -> Tensor:
    """Of tokens: within [0.5, 2), and 0 for every fourth or so."""
    generator = torch.Generator().manual_seed(5)
    weights = 0.5 + 1.5 * torch.rand(shape, generator=generator)
    return weights.masked_fill(torch.rand(shape, generator=generator) < 0.25, 0)


def _targets(*shape: int) -> Tensor:
    """Ids below 53, and nothing to predict at every fourth or so."""
    generator = torch.Generator().manual_seed(6)
    targets = torch.randint(53, shape, generator=generator)
    return targets.masked_fill(torch.rand(shape, generator=generator) < 0.25, -100)
