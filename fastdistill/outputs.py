"""What the loss functions return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """Result of `softmax_kl` and `linear_softmax_kl`; float32, or float64 for float64 input.

    With x_i a token's value and w_i its weight, each field but the last two holds sum(w_i x_i) / num_tokens
    (reduction "mean", 0-d), sum(w_i x_i) ("sum", 0-d) or w_i x_i ("none", shaped like the targets). Only `loss`
    carries a gradient.
    """

    loss: Tensor
    kl: Tensor | None
    """The divergence, without T^2; None without a teacher."""
    ce: Tensor | None
    """The cross-entropy at temperature 1; None without targets."""
    student_entropy: Tensor | None
    """Entropy at temperature 1 over the shared ids; None without `metrics` and a teacher."""
    teacher_entropy: Tensor | None
    top1_agreement: Tensor | None
    """1 where student and teacher have the same most likely shared id."""
    num_tokens: Tensor
    """The divisor of the mean, 0-d."""
    invalid_targets: Tensor | None
    """How many targets lie outside the student's vocabulary, int64 0-d; None without targets. Such a token
    does not count. On the CPU it is a ValueError instead, so there this is 0."""


class CrossVocabOutput(NamedTuple):
    """Result of `linear_cross_vocab_kl`, each 0-d; float32, or float64 for float64 input. Only `loss` has a gradient.

    With x_i a token's value and w_i its weight, each field but the last holds sum(w_i x_i) / num_tokens (reduction
    "mean") or sum(w_i x_i) ("sum").
    """

    loss: Tensor
    kl: Tensor
    """The divergence of "shared" without T^2, or the distance of "sorted"."""
    top1_agreement: Tensor | None
    """1 where the most probable string of both models is the same shared one; None without `metrics`."""
    num_tokens: Tensor
    """The divisor of the mean."""


class LayerLossOutput(NamedTuple):
    """Result of `layer_loss`: the weighted mean over layers (0-d) and, detached, each layer's own loss [L]."""

    loss: Tensor
    per_layer: Tensor


class AttentionKLOutput(NamedTuple):
    """Result of `attention_kl`: the mean over queries and heads that count (0-d) and, detached, each head's own [H]."""

    loss: Tensor
    per_head: Tensor
