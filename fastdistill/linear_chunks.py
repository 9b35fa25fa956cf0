"""linear_softmax_kl of checked arguments: over chunks of tokens, logits, their loss, and what it gives the gradients.

Three buffers are used again for every chunk: the logits of student and teacher, and the gradient, which goes over the
student's logits where it has their dtype. What lies between the matrix products is the one-launch kernel of
`softmax_kl`, or PyTorch, which takes a chunk in blocks of tokens, so that what it makes of them stays in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.differentiation import full_precision
from fastdistill.heads import MAX_CHUNK_BYTES, Gradients, Head, scaled
from fastdistill.products import Precision
from fastdistill.reference import compute_dtype
from fastdistill.rows import TokenRows, token_rows
from fastdistill.softmax_kl_torch import (
    BUFFERS,
    RESULTS,
    Scratch,
    SoftmaxKLOptions,
    TokenTerms,
    block_rows,
    chunk_terms,
)

TERMS = len(TokenTerms._fields)

CHUNK_ROWS = {6: 256, 7: 256, 8: 1024, 9: 2048}
"""Tokens of a chunk by a GPU's major compute capability, or the nearest older one: enough for the matrix products to
run at their full speed, on the memory that such a GPU has. Never timed on one."""

LARGEST_IN_FLOAT16 = 256.0
"""What a float16 gradient of the logits is scaled to at most, by a bound that holds for forward KL and cross-entropy.
Reverse KL may exceed it where a student is sure of what its teacher excludes: a factor of 255 is left for that, and
below there are 2^32 to the least number. Where products come in float16 too, 1: they add up many of them."""

ROW_ELEMENTS = 64
"""Rows of the kernel's buffers begin on multiples of 128 bytes in a half precision, whatever the vocabulary: odd rows
would keep cuBLAS from its fast kernels."""


class LossForm(NamedTuple):
    """What is computed of the logits, and how: the arguments that are no tensors."""

    divergence: str
    shared_vocab: int
    metrics: bool
    power: int
    """The temperature where it is known and 1, 2 or 4, else 0."""
    kl_in_loss: bool
    ce_in_loss: bool
    autocast: torch.dtype | None
    drop_uncounted: bool
    max_chunk_bytes: int | None
    impl: str


class LinearInputs(NamedTuple):
    """Both models' hidden states and heads, what the tokens must predict, their weights `[B, S]` or `[N]`, and the
    numbers of `losses.kernel_scalars`.
    """

    student_hidden: Tensor
    student_weight: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    targets: Tensor | None
    weights: Tensor
    scalars: Tensor

    def heads(self, form: LossForm) -> tuple[Head, Head | None]:
        compute = compute_dtype(self.student_hidden)

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int) -> Head:
            return Head(hidden, weight, bias, vocab, Precision.of(hidden, weight, compute, form.autocast))

        student = head(self.student_hidden, self.student_weight, self.student_bias, len(self.student_weight))
        if self.teacher_hidden is None or self.teacher_weight is None:
            return student, None
        return student, head(self.teacher_hidden, self.teacher_weight, self.teacher_bias, form.shared_vocab)

    def rows(self, form: LossForm) -> TokenRows:
        """The tokens to compute; those that count alone, whose number is waited for, unless a graph is captured."""
        capturing = self.weights.is_cuda and torch.cuda.is_current_stream_capturing()
        return token_rows(self.weights, self.targets, drop_uncounted=form.drop_uncounted and not capturing)


def loss_sums(
    inputs: LinearInputs, form: LossForm, needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """The summed terms `[6]`, in the order of `TokenTerms`; the gradients of hidden states, weight and bias, as far as
    they are needed, in the compute dtype; and the power of two by which these are too large.
    """
    with full_precision(inputs.student_hidden):
        (student, teacher), rows = inputs.heads(form), inputs.rows(form)
        gradients = Gradients(student, needs, inputs.weights.dtype)
        scale = _gradient_scale(student.precision, inputs.scalars, form, rows.weights)
        factors = scale.expand(len(rows)).contiguous() if any(needs) else None
        parts = []
        for chunk, hidden, values, dlogits in _walk(student, teacher, rows, inputs.scalars, form, factors):
            parts.append(values)
            if dlogits is not None:
                gradients.add(chunk, hidden, dlogits)
        return torch.cat(parts, 1).sum(1), gradients.hidden, gradients.weight, gradients.bias, scale


def loss_terms(inputs: LinearInputs, form: LossForm) -> Tensor:
    """Each token's terms `[6, B, S]` or `[6, N]`, 0 for those that do not count."""
    with full_precision(inputs.student_hidden):
        (student, teacher), rows = inputs.heads(form), inputs.rows(form)
        terms = inputs.weights.new_zeros(TERMS, *inputs.weights.shape)
        walk = _walk(student, teacher, rows, inputs.scalars, form, None)
        values = torch.cat([values for _, _, values, _ in walk], 1)
        rows.put(terms.movedim(0, -1), values.t())
        return terms


def loss_terms_backward(
    dloss: Tensor, inputs: LinearInputs, form: LossForm, needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Gradients of hidden states, weight and bias, each in its own dtype; `dloss` is shaped like the weights."""
    with full_precision(inputs.student_hidden):
        (student, teacher), rows = inputs.heads(form), inputs.rows(form)
        gradients = Gradients(student, needs, inputs.weights.dtype)
        factors = rows.take(dloss[..., None], dloss.dtype)[:, 0]
        scale = _gradient_scale(student.precision, inputs.scalars, form, rows.weights * factors)
        factors = factors * scale
        for chunk, hidden, _, dlogits in _walk(student, teacher, rows, inputs.scalars, form, factors):
            assert dlogits is not None
            gradients.add(chunk, hidden, dlogits)
    made = (gradients.hidden, gradients.weight, gradients.bias)
    pairs = zip(made, inputs[:3], strict=True)
    return [None if x is None or of is None else scaled(x, 1 / scale, of.dtype) for x, of in pairs]


def _walk(
    student: Head, teacher: Head | None, rows: TokenRows, scalars: Tensor, form: LossForm, factors: Tensor | None
) -> Iterator[tuple[TokenRows, Tensor, Tensor, Tensor | None]]:
    """For every chunk of rows: it, its student hidden states, its weighted terms `[6, n]` and, with `factors` `[N]`,
    the gradient of its logits times weights and factors, in the precision of the student's products.
    """
    buffers = _Buffers.of(student, teacher, rows, form, gradient=factors is not None)
    start = 0
    for chunk in rows.chunks(buffers.rows):
        # A row that does not count may hold NaN, and 0 * NaN would reach the weight's gradient.
        hidden = chunk.zero_uncounted_(student.rows(chunk))
        logits, teacher_logits = student.logits(hidden, buffers.student), None
        if teacher is not None and buffers.teacher is not None:
            teacher_logits = teacher.logits(teacher.rows(chunk), buffers.teacher)
        part = None if factors is None else factors[start : start + len(chunk)]
        dlogits = buffers.gradient[: len(chunk)]
        if form.impl == "triton":
            values = _loss_triton(logits, teacher_logits, chunk, scalars, form, part, dlogits)
        else:
            assert buffers.scratch is not None
            values = _loss_torch(logits, teacher_logits, chunk, scalars, form, part, dlogits, buffers.scratch)
        yield chunk, hidden, values, None if part is None else dlogits
        start += len(chunk)


class _Buffers(NamedTuple):
    """What every chunk uses again, `[rows, V]` each."""

    rows: int
    student: Tensor
    teacher: Tensor | None
    gradient: Tensor
    """May be the student's."""
    scratch: Scratch | None
    """Of the PyTorch path."""

    @staticmethod
    def of(student: Head, teacher: Head | None, rows: TokenRows, form: LossForm, *, gradient: bool) -> _Buffers:
        precision = student.precision
        # Over the logits only where an element takes the place of its own logit: another size would overwrite others.
        own_gradient = gradient and precision.operands != precision.logits
        vocabs = {"student": len(student.weight), "teacher": 0 if teacher is None else len(teacher.weight)}
        if form.impl == "triton":  # PyTorch's operations would copy rows that are not next to each other
            vocabs = {model: -(-vocab // ROW_ELEMENTS) * ROW_ELEMENTS for model, vocab in vocabs.items()}
        token_bytes = vocabs["student"] * (precision.logits.itemsize + own_gradient * precision.operands.itemsize)
        if teacher is not None:
            token_bytes += vocabs["teacher"] * teacher.precision.logits.itemsize
        vocab, like, scratch_bytes, block = len(student.weight), rows.weights, 0, 0
        copies = form.impl == "torch" and precision.logits != like.dtype
        if form.impl == "torch":
            scratch_bytes = (len(BUFFERS) if copies else RESULTS) * vocab * like.itemsize
            block = block_rows(vocab, like.dtype, like.device)
        size, block = chunk_and_block(form.max_chunk_bytes, token_bytes, scratch_bytes, block, like.device)
        size = min(max(1, len(rows)), size)

        def buffer(head: Head, width: int, dtype: torch.dtype) -> Tensor:
            return head.weight.new_empty(size, width, dtype=dtype)[:, : len(head.weight)]

        logits = buffer(student, vocabs["student"], precision.logits)
        return _Buffers(
            size,
            logits,
            None if teacher is None else buffer(teacher, vocabs["teacher"], teacher.precision.logits),
            buffer(student, vocabs["student"], precision.operands) if own_gradient else logits,
            Scratch.of(min(size, block), vocab, like, logits=copies) if form.impl == "torch" else None,
        )


def gpu_chunk_rows(major: int) -> int:
    """`CHUNK_ROWS` of a GPU of this major compute capability, known or not."""
    return CHUNK_ROWS[max((known for known in CHUNK_ROWS if known <= major), default=min(CHUNK_ROWS))]


def chunk_and_block(
    max_chunk_bytes: int | None, token_bytes: int, scratch_bytes: int, block: int, device: torch.device
) -> tuple[int, int]:
    """Tokens of a chunk, and of a block of it, at most `block`.

    A token of the chunk takes `token_bytes`; one of the block, `scratch_bytes` more.
    """
    if max_chunk_bytes is None and device.type == "cuda":
        return gpu_chunk_rows(torch.cuda.get_device_capability(device)[0]), block
    most = max_chunk_bytes or MAX_CHUNK_BYTES
    block = min(block, max(1, most // (token_bytes + scratch_bytes)))
    return max(1, (most - block * scratch_bytes) // token_bytes), block


def _gradient_scale(precision: Precision, scalars: Tensor, form: LossForm, weights: Tensor) -> Tensor:
    """The power of two that the gradient of the logits is multiplied by, 0-d: 1 but for float16."""
    if precision.operands != torch.float16:
        return scalars.new_ones(())
    temperature, kl_scale, ce_weight, _ = scalars.unbind()
    bound = kl_scale.abs() / temperature * form.kl_in_loss + ce_weight.abs() * form.ce_in_loss
    bound = (bound * torch.cat([weights.abs(), weights.new_zeros(1)]).amax()).clamp(min=1e-30)
    largest = LARGEST_IN_FLOAT16 if precision.logits == torch.float32 else 1.0
    return torch.frexp(bound).mantissa / bound * largest  # bound / mantissa is the power of two above it


def _loss_triton(
    student: Tensor,
    teacher: Tensor | None,
    chunk: TokenRows,
    scalars: Tensor,
    form: LossForm,
    factors: Tensor | None,
    dlogits: Tensor,
) -> Tensor:
    """The weighted terms `[6, n]` of logits `[n, V]`; with `factors` `[n]` also their gradient, in `dlogits`."""
    from fastdistill.kernels.softmax_kl import softmax_kl_one_launch, softmax_kl_stats

    tensors = student, teacher, chunk.targets, chunk.weights, scalars
    static: dict[str, Any] = form._asdict()
    static = {name: static[name] for name in ("divergence", "shared_vocab", "metrics", "power")}
    if factors is None:
        return softmax_kl_stats(*tensors, **static)[0]
    return softmax_kl_one_launch(
        factors, *tensors, dlogits, **static, kl_in_loss=form.kl_in_loss, ce_in_loss=form.ce_in_loss
    )[0]


def _loss_torch(
    student: Tensor,
    teacher: Tensor | None,
    chunk: TokenRows,
    scalars: Tensor,
    form: LossForm,
    factors: Tensor | None,
    dlogits: Tensor,
    scratch: Scratch,
) -> Tensor:
    """As `_loss_triton`, in PyTorch, as many tokens at a time as `scratch` is for; the logits are overwritten."""
    # Numbers cost the CPU less than tensors do, and nothing is waited for there.
    numbers = scalars.tolist() if scalars.device.type == "cpu" else scalars.unbind()
    temperature, kl_scale, ce_weight, jsd_beta = numbers
    options = SoftmaxKLOptions(
        temperature=temperature,
        divergence=form.divergence,
        jsd_beta=jsd_beta,
        kl_weight=kl_scale if form.kl_in_loss else 0.0,
        ce_weight=ce_weight if form.ce_in_loss else 0.0,
        temperature_squared=False,  # it is in the weight
        shared_vocab=form.shared_vocab,
        metrics=form.metrics,
    )

    def in_full(name: str, logits: Tensor) -> Tensor:
        return logits if logits.dtype == values.dtype else scratch.buffer(name, *logits.shape).copy_(logits)

    values = chunk.weights.new_zeros(TERMS, len(chunk))
    start = 0
    for block in chunk.chunks(scratch.memory.shape[1] // student.shape[1]):
        part = slice(start, start := start + len(block))
        z_s = in_full("student_logits", student[part])
        z_t = None if teacher is None else in_full("teacher_logits", teacher[part])
        terms, gradient = chunk_terms(z_s, z_t, block.targets, options, scratch, gradient=factors is not None)
        for row, term in zip(values, terms.weighted(block), strict=True):
            if term is not None:
                row[part] = term
        if factors is not None and gradient is not None:
            torch.mul(gradient, (block.weights * factors[part])[:, None], out=dlogits[part])
            block.zero_uncounted_(dlogits[part])
    return values
