"""Which positions, ids and tokens are compared."""

import pytest
import torch
import torch.nn.functional as F

from fastdistill import shift_targets, softmax_kl
from fastdistill.align import common_positions, cut, mean, shared_vocab_size, token_weights

I = -100  # noqa: E741
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])

PADDINGS = {
    "none": ([[1, 1, 1, 1], [1, 1, 1, 1]], [[2, 3, 4, I], [6, 7, 8, I]]),
    "right": ([[1, 1, 1, 0], [1, 1, 0, 0]], [[2, 3, I, I], [6, I, I, I]]),
    "left": ([[0, 1, 1, 1], [0, 0, 1, 1]], [[I, 3, 4, I], [I, I, 8, I]]),
    "both": ([[0, 1, 1, 0], [1, 1, 1, 1]], [[I, 3, I, I], [6, 7, 8, I]]),
    "a_gap": ([[1, 0, 1, 1], [1, 1, 1, 1]], [[I, I, 4, I], [6, 7, 8, I]]),
    "all": ([[0, 0, 0, 0], [0, 0, 0, 1]], [[I, I, I, I], [I, I, I, I]]),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)  # what tokenizers and models hold
@pytest.mark.parametrize(("attention_mask", "targets"), PADDINGS.values(), ids=PADDINGS.keys())
def test_a_target_is_the_next_token_where_both_are_text(attention_mask, targets, dtype):
    ids = IDS.clone()
    assert shift_targets(ids, torch.tensor(attention_mask).to(dtype)).tolist() == targets
    assert torch.equal(ids, IDS)


def test_without_a_mask_only_the_last_position_has_no_target():
    assert shift_targets(IDS).tolist() == PADDINGS["none"][1]


def test_ignore_index_and_dtype_are_kept():
    targets = shift_targets(IDS.int(), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), ignore_index=-1)
    assert targets.dtype == torch.int32
    assert targets.tolist() == [[2, 3, -1, -1], [6, 7, 8, -1]]


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 1)], ids=str)
def test_too_short_a_text_has_no_targets(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    assert shift_targets(ids, torch.ones_like(ids)).tolist() == torch.full(shape, I).tolist()


def test_shifted_targets_give_the_language_model_loss():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    loss = softmax_kl(logits, None, shift_targets(IDS), kl_weight=0, ce_weight=1).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("student", "teacher", "common"),
    [
        ((2, 5, 3), (2, 7, 4), (2, 5)),
        ((2, 7, 3), (2, 5, 4), (2, 5)),
        ((2, 7, 3), None, (2, 7)),
        ((7, 3), (7, 4), (7,)),
    ],
)
def test_positions_are_cut_to_the_shorter(student, teacher, common):
    student, teacher = torch.zeros(student), None if teacher is None else torch.zeros(teacher)
    assert common_positions(student, teacher) == common
    assert cut(student, common).shape == (*common, 3)


def test_cutting_copies_nothing():
    logits = torch.zeros(2, 7, 3)
    part = cut(logits, (2, 5))
    assert part.data_ptr() == logits.data_ptr()
    assert part.stride() == logits.stride()
    assert cut(logits[0], (7,)) is not None


@pytest.mark.parametrize(
    ("student", "teacher", "asked", "shared"),
    [(10, 12, None, 10), (12, 10, None, 10), (12, None, None, 12), (12, 10, 7, 7), (12, None, 7, 7)],
)
def test_shared_ids_are_the_first_that_both_have(student, teacher, asked, shared):
    assert shared_vocab_size(student, teacher, asked) == shared


@pytest.mark.parametrize(
    ("mask", "targets", "weights"),
    [
        (None, None, [[1, 1, 1], [1, 1, 1]]),
        ([[True, False, True, True], [False, True, True, True]], None, [[1, 0, 1], [0, 1, 1]]),
        ([[2, 0, 1, 1], [0, 3, 1, 1]], None, [[2, 0, 1], [0, 3, 1]]),
        ([[0.5, 0.0, 1.5, 1.0], [0.0, 0.25, 1.0, 1.0]], None, [[0.5, 0, 1.5], [0, 0.25, 1]]),
        (None, [[I, 0, 9, 0], [10, -1, 5, 0]], [[0, 1, 1], [0, 0, 1]]),
        ([[0.5, 0.5, 0.5, 1.0], [2.0, 2.0, 2.0, 1.0]], [[I, 0, 9, 0], [0, 1, I, 0]], [[0, 0.5, 0.5], [2, 2, 0]]),
    ],
    ids=["none", "bool", "int", "float", "targets", "both"],
)
def test_a_token_weighs_its_mask_where_its_target_counts(mask, targets, weights):
    made = token_weights(
        (2, 3),
        None if targets is None else torch.tensor(targets),
        None if mask is None else torch.tensor(mask),
        ignore_index=I,
        student_vocab=10,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    assert made.dtype == torch.float32
    assert made.tolist() == weights


def test_mean_over_no_tokens_is_0_even_of_an_infinite_total():
    totals, counts = torch.tensor([torch.inf, 3.0, torch.inf, 2.0]), torch.tensor([0.0, 0.5, 4.0, 0.0])
    assert mean(totals, counts).tolist() == [0, 6, torch.inf, 0]
