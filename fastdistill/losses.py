"""softmax_kl, the loss on logits: check, align, choose the implementation, reduce."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdistill import checks
from fastdistill.align import common_positions, cut, mean, outside_vocabulary, shared_vocab_size, token_weights
from fastdistill.backend import choose_impl
from fastdistill.outputs import LossOutput
from fastdistill.reference import compute_dtype
from fastdistill.rows import TokenRows, token_rows
from fastdistill.softmax_kl_torch import SoftmaxKLOptions, TokenTerms, is_on
from fastdistill.softmax_kl_torch import softmax_kl as softmax_kl_torch


def softmax_kl(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    targets: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    kl_weight: float | Tensor = 1.0,
    ce_weight: float | Tensor = 0.0,
    temperature_squared: bool = True,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    num_tokens: float | Tensor | None = None,
    reduction: str = "mean",
    metrics: bool = False,
    inplace_backward: bool = False,
    impl: str | None = None,
) -> LossOutput:
    """Divergence between teacher and student over the vocabulary, with the cross-entropy in the same pass.

    `loss = sum_i w_i (kl_weight T^2 div_i + ce_weight ce_i) / num_tokens`, natural logarithms, float32 inside
    (float64 for float64 input). T^2 keeps the gradient's size as T changes (Hinton et al. 2015, arXiv:1503.02531).
    A term of weight 0 is left out of the loss, but its value is still reported.

    Args:
        student_logits: `[B, S, V]` or `[N, V]`, any float type. Gradients go to these alone.
        teacher_logits: `[B, St, Vt]` or `[N, Vt]`, any float type; None for the cross-entropy alone. Where St
            differs from S both are cut to the shorter: right for one text under two paddings, wrong for two
            tokenizers.
        targets: `[B, S]` or `[N]`, the id each position must predict, already shifted (see `shift_targets`).
        mask: like `targets`; bool, or a weight >= 0 a token. A token counts when its mask is not 0 and its target,
            if any, is not `ignore_index`; the others give exactly 0 to loss and gradient, even if their logits are
            NaN.
        temperature: T > 0, of both softmaxes in the divergence. The cross-entropy is always at T = 1.
        divergence: "forward_kl" KL(teacher || student), "reverse_kl" KL(student || teacher), or "jsd"
            `b KL(p_t || m) + (1 - b) KL(p_s || m)` with `m = b p_t + (1 - b) p_s`, `b = jsd_beta` inside (0, 1).
        kl_weight, ce_weight: weights of the two terms; `ce_weight` other than 0 needs `targets`.
        temperature_squared: whether T^2 multiplies the divergence in the loss. It never does in the field `kl`.
        vocab_size: how many leading ids the divergence compares; default `min(V, Vt)`. Ids above are padding of a
            larger head. The cross-entropy runs over the student's whole V.
        num_tokens: divisor of the mean; default the sum of the weights. Give the count of the whole accumulation
            window to make micro-batches add up to it. A divisor of 0 gives loss 0 and gradient 0.
        reduction: "mean", "sum", or "none" for a value a token, shaped like `targets`.
        metrics: also fill `student_entropy`, `teacher_entropy` and `top1_agreement`.
        inplace_backward: write the gradient over `student_logits` in backward. Saves one `[N, V]`; every alias of
            the logits is overwritten, and a second backward raises.
        impl: "torch" or "triton"; default FASTDISTILL_IMPL, else the best there is for the device.

    Temperature, weights and `num_tokens` may be 0-d tensors; on a GPU they are not read back.

    Raises:
        ValueError: for a wrong argument, with its name, before any work is done.
        RuntimeError: for an `impl` asked for that cannot be had.
    """
    checks.check_float_tensor("student_logits", student_logits, (2, 3), "[B, S, V] or [N, V]")
    if teacher_logits is not None:
        checks.check_float_tensor("teacher_logits", teacher_logits, (2, 3), "[B, St, Vt] or [N, Vt]")
        checks.check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
    checks.check_teacher_is_constant("teacher_logits", teacher_logits)
    if inplace_backward:
        _check_inplace(student_logits)
    prepared = prepare(
        student_logits,
        teacher_logits,
        targets,
        student_vocab=student_logits.shape[-1],
        teacher_vocab=None if teacher_logits is None else teacher_logits.shape[-1],
        mask=mask,
        temperature=temperature,
        divergence=divergence,
        jsd_beta=jsd_beta,
        kl_weight=kl_weight,
        ce_weight=ce_weight,
        temperature_squared=temperature_squared,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        num_tokens=num_tokens,
        reduction=reduction,
        metrics=metrics,
    )
    if choose_impl("softmax_kl", impl, student_logits.device) == "triton":
        return _softmax_kl_triton(student_logits, teacher_logits, prepared, inplace_backward)
    rows = prepared.rows(drop_uncounted=student_logits.device.type == "cpu")
    terms = softmax_kl_torch(student_logits, teacher_logits, rows, prepared.options, inplace_backward=inplace_backward)
    return prepared.output(terms, rows)


def _softmax_kl_triton(
    student_logits: Tensor, teacher_logits: Tensor | None, prepared: Prepared, inplace_backward: bool
) -> LossOutput:
    from fastdistill import ops

    options, weights = prepared.options, prepared.weights.contiguous()
    scalars, power = kernel_scalars(options, weights, has_teacher=teacher_logits is not None)
    terms, _ = ops.softmax_kl(
        with_unit_stride(student_logits),
        None if teacher_logits is None else with_unit_stride(teacher_logits.detach()),
        None if prepared.targets is None else prepared.targets.contiguous(),
        weights,
        scalars,
        options.divergence,
        options.shared_vocab,
        options.metrics,
        power,
        teacher_logits is not None and is_on(options.kl_weight),
        prepared.targets is not None and is_on(options.ce_weight),
        inplace_backward,
    )
    return prepared.output_of(terms, has_teacher=teacher_logits is not None)


def with_unit_stride(rows: Tensor) -> Tensor:
    """Logits or hidden states, copied if neighbours in a row are not neighbours in memory."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def kernel_scalars(options: SoftmaxKLOptions, beside: Tensor, *, has_teacher: bool) -> tuple[Tensor, int]:
    """The numbers that softmax_kl's kernels read from the device, and the temperature where it is 1, 2 or 4, else 0.

    The numbers are the temperature, the divergence's weight with its T^2, the cross-entropy's, and beta, like `beside`.
    """
    temperature = options.temperature if has_teacher else 1.0
    kl_scale = options.kl_weight * temperature**2 if options.temperature_squared else options.kl_weight
    numbers = (temperature, kl_scale, options.ce_weight, options.jsd_beta)
    is_power = not isinstance(temperature, Tensor) and temperature in (1.0, 2.0, 4.0)
    return torch.stack([number_on_device(number, beside) for number in numbers]), int(temperature) if is_power else 0


def number_on_device(value: float | Tensor, beside: Tensor) -> Tensor:
    """A number as a 0-d tensor like `beside`, without a copy that the device would be waited for."""
    if isinstance(value, Tensor):
        return value.detach().to(beside)
    return beside.new_full((), value)


@dataclass(frozen=True)
class Prepared:
    """A call's checked and aligned arguments beside its big tensors."""

    options: SoftmaxKLOptions
    leading: tuple[int, ...]
    weights: Tensor
    targets: Tensor | None
    num_tokens: Tensor
    reduction: str
    invalid_targets: Tensor | None

    def rows(self, *, drop_uncounted: bool) -> TokenRows:
        return token_rows(self.weights, self.targets, drop_uncounted=drop_uncounted)

    def output(self, terms: TokenTerms, rows: TokenRows) -> LossOutput:
        """Reduce weighted terms of the tokens in `rows`."""

        def reduce(term: Tensor) -> Tensor:
            if self.reduction == "none":
                return rows.spread(term, self.leading)
            return mean(term.sum(), self.num_tokens) if self.reduction == "mean" else term.sum()

        loss, *values = terms
        return LossOutput(
            reduce(loss),
            *(None if x is None else reduce(x) for x in values),
            num_tokens=self.num_tokens,
            invalid_targets=self.invalid_targets,
        )

    def output_of(self, terms: Tensor, *, has_teacher: bool) -> LossOutput:
        """Reduce weighted terms, in the order of `LossOutput`, of all compared tokens: `[6, N]`, or summed, `[6]`."""
        if self.reduction == "none":
            terms = terms.view(len(terms), *self.weights.shape)
            if self.weights.shape != self.leading:
                terms = torch.nn.functional.pad(terms, (0, self.leading[1] - self.weights.shape[1]))
        else:
            terms = terms if terms.ndim == 1 else terms.sum(1)
            terms = mean(terms, self.num_tokens) if self.reduction == "mean" else terms
        has_metrics = has_teacher and self.options.metrics
        reported = (has_teacher, self.targets is not None, has_metrics, has_metrics, has_metrics)
        loss, *values = terms.unbind()
        return LossOutput(
            loss,
            *(x.detach() if has_it else None for x, has_it in zip(values, reported, strict=True)),
            num_tokens=self.num_tokens,
            invalid_targets=self.invalid_targets,
        )


def prepare(
    student: Tensor,
    teacher: Tensor | None,
    targets: Tensor | None,
    *,
    student_vocab: int,
    teacher_vocab: int | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    divergence: str,
    jsd_beta: float,
    kl_weight: float | Tensor,
    ce_weight: float | Tensor,
    temperature_squared: bool,
    ignore_index: int,
    vocab_size: int | None,
    num_tokens: float | Tensor | None,
    reduction: str,
    metrics: bool,
) -> Prepared:
    """Check what `softmax_kl` and `linear_softmax_kl` share; `student` and `teacher` are logits or hidden states."""
    leading = tuple(student.shape[:-1])
    checks.check_choice("divergence", divergence, checks.DIVERGENCES)
    checks.check_choice("reduction", reduction, checks.REDUCTIONS)
    checks.whole_number("ignore_index", ignore_index)
    jsd_beta = float(checks.scalar("jsd_beta", jsd_beta))
    if not 0 < jsd_beta < 1:
        raise ValueError(
            f"jsd_beta must be strictly between 0 and 1, got {jsd_beta}: for the ends use divergence='forward_kl' "
            "or 'reverse_kl'"
        )
    options = SoftmaxKLOptions(
        temperature=checks.scalar("temperature", temperature, above=0),
        divergence=divergence,
        jsd_beta=jsd_beta,
        kl_weight=checks.scalar("kl_weight", kl_weight),
        ce_weight=checks.scalar("ce_weight", ce_weight),
        temperature_squared=bool(temperature_squared),
        shared_vocab=_shared_vocab(student_vocab, teacher_vocab, vocab_size),
        metrics=bool(metrics),
    )
    if teacher is None and is_on(options.kl_weight):
        raise ValueError(f"the teacher must be given unless kl_weight is 0, got None with kl_weight={kl_weight}")
    if targets is None and is_on(options.ce_weight):
        raise ValueError(f"targets must be given unless ce_weight is 0, got None with ce_weight={ce_weight}")
    if targets is not None:
        checks.check_targets(targets, leading, student, ignore_index, student_vocab)
        targets = targets.long()
    if mask is not None:
        checks.check_mask(mask, leading, student)
        mask = mask.detach()

    shape, dtype = common_positions(student, teacher), compute_dtype(student)
    weights = token_weights(
        shape,
        targets,
        mask,
        ignore_index=ignore_index,
        student_vocab=student_vocab,
        dtype=dtype,
        device=student.device,
    )
    invalid_targets = None
    if targets is not None:
        targets = cut(targets, shape)
        invalid_targets = outside_vocabulary(targets, ignore_index, student_vocab).sum()
    return Prepared(options, leading, weights, targets, count_tokens(num_tokens, weights), reduction, invalid_targets)


def count_tokens(num_tokens: float | Tensor | None, weights: Tensor) -> Tensor:
    """The divisor, 0-d and in the weights' dtype: the one given, or the sum of the weights."""
    if num_tokens is None:
        return weights.sum()
    given = checks.scalar("num_tokens", num_tokens, at_least=0)
    return torch.as_tensor(given, device=weights.device).to(weights.dtype)


def _shared_vocab(student_vocab: int, teacher_vocab: int | None, vocab_size: int | None) -> int:
    if vocab_size is not None:
        most = student_vocab if teacher_vocab is None else min(student_vocab, teacher_vocab)
        checks.whole_number("vocab_size", vocab_size, at_least=1, at_most=most)
    return shared_vocab_size(student_vocab, teacher_vocab, vocab_size)


def _check_inplace(student_logits: Tensor) -> None:
    if student_logits.requires_grad and student_logits.is_leaf:
        raise ValueError(
            "inplace_backward=True would overwrite student_logits, a leaf tensor whose values are yours: expected the "
            "output of a model"
        )
    sizes = zip(student_logits.shape, student_logits.stride(), strict=True)
    span = 1
    for size, stride in sorted(((n, step) for n, step in sizes if n > 1), key=lambda pair: pair[1]):
        if stride < span:
            raise ValueError(
                "inplace_backward=True needs student_logits whose elements do not share memory, got shape "
                f"{tuple(student_logits.shape)} with strides {student_logits.stride()} (expanded or overlapping)"
            )
        span = stride * (size - 1) + span
