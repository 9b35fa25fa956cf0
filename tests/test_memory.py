"""Peak memory of the losses beyond their inputs, each in a fresh process."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastdistill import layer_loss, linear_softmax_kl, softmax_kl
from fastdistill.testing import DEVICE, differentiate, peak_memory, random_heads, random_logits, random_states

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not Path("/proc/self/clear_refs").exists(), reason="the resident set is measured on Linux alone"
)

MB = 10**6

softmax_kl_step = partial(differentiate, softmax_kl, wrt=("student_logits",))
linear_step = partial(differentiate, linear_softmax_kl, wrt=("student_hidden", "student_weight"))
small_chunk_step = partial(
    differentiate, partial(linear_softmax_kl, max_chunk_bytes=8 * MB), wrt=("student_hidden", "student_weight")
)


def kept_losses(arguments: dict[str, Any]) -> list[Any]:
    return [linear_step(arguments)[0] for _ in range(20)]


layer_loss_step = partial(differentiate, layer_loss, wrt=("student_states",))


def test_fused_head_fits_where_the_logits_do_not():
    """GPT-2's vocabulary and width at 4096 tokens, whose logits are 824 MB a model."""
    tokens, vocab, width = 4096, 50257, 768
    gradients = 4 * (tokens + vocab) * width
    peak = peak_memory(partial(random_heads, tokens, vocab=vocab, width=width), linear_step)
    assert peak - gradients < 600 * MB


def test_nothing_as_large_as_the_heads_gradient_is_held_beside_it():
    vocab, width = 32768, 2048
    peak = peak_memory(partial(random_heads, 64, vocab=vocab, width=width), small_chunk_step)
    assert peak < 1.6 * 4 * vocab * width  # some 50 MB of chunk, code and the matrix library's beside its 268


def test_scratch_of_the_fused_head_does_not_grow_with_the_tokens():
    few, many = (
        peak_memory(partial(random_heads, tokens, vocab=4096, width=16), small_chunk_step) for tokens in (512, 4096)
    )
    assert many - few < 10 * MB  # one model's logits grow by 59 MB


def test_a_loss_that_was_differentiated_does_not_keep_its_gradients():
    vocab, width = 16384, 128
    few = peak_memory(partial(random_heads, 64, vocab=vocab, width=width), linear_step)
    many = peak_memory(partial(random_heads, 64, vocab=vocab, width=width), kept_losses)
    assert many - few < 5 * 4 * vocab * width  # twenty losses have twenty such gradients


@pytest.mark.parametrize(
    ("make", "step"),
    [(partial(random_logits, 2048, 8192), softmax_kl_step), (partial(random_states, 4096, 4096), layer_loss_step)],
    ids=["softmax_kl", "layer_loss"],
)
def test_nothing_as_large_as_the_input_is_held_beside_its_gradient(make, step):
    gradient = 4 * 2048 * 8192
    assert peak_memory(make, step) < gradient + 90 * MB  # 40 of code, 24 of chunks; one more copy is 67
