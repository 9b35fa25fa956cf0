"""Which positions, ids and tokens are compared."""

import pytest
import torch
import torch.nn.functional as F

from fastdistill import shift_targets, softmax_kl
from fastdistill.align import (
    aligned_positions,
    common_positions,
    cut,
    mean,
    shared_vocab_size,
    shared_vocabulary,
    token_weights,
)

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


def positions_one_by_one(student_ends, teacher_ends):
    """The definition: of the positions that share an end, the last on either side."""
    pairs = []
    for b, (student, teacher) in enumerate(zip(student_ends.tolist(), teacher_ends.tolist(), strict=True)):
        for i, end in enumerate(student):
            is_last = end >= 0 and end not in student[i + 1 :]
            pairs += [(b, i, j) for j, e in enumerate(teacher) if is_last and e == end and end not in teacher[j + 1 :]]
    return pairs


def random_ends(generator, rows, length):
    ends = torch.randint(0, 12, (rows, length), generator=generator).sort(dim=1).values
    return ends.masked_fill(torch.rand(ends.shape, generator=generator) < 0.3, -1)


@pytest.mark.parametrize("seed", range(20))
def test_positions_with_one_end_are_paired_by_their_last(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 20, (2,), generator=generator).tolist()
    ends = [random_ends(generator, 4, length) for length in lengths]
    aligned = torch.stack(aligned_positions(*ends), dim=1)
    assert aligned.dtype == torch.int64
    assert [tuple(pair) for pair in aligned.tolist()] == positions_one_by_one(*ends)


def test_a_row_without_text_is_paired_with_nothing():
    nothing = torch.full((2, 3), -1)
    ends = torch.tensor([[0, 1, 2], [3, 3, 5]])
    for student, teacher in ((nothing, ends), (ends, nothing), (ends[:0], ends[:0]), (ends[:, :0], ends)):
        assert [len(part) for part in aligned_positions(student, teacher)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.tensor([[1, 2]]), torch.tensor([[1, 5, -1, 4]]), r"teacher_ends must not fall.*4 after 5 in row 0"),
        (torch.tensor([[1, 2], [2, 1]]), torch.tensor([[1], [1]]), r"student_ends must not fall.*1 after 2 in row 1"),
        (torch.tensor([1, 2]), torch.tensor([[1]]), r"student_ends must be int64 \[B, S\].*shape \(2,\)"),
        (torch.tensor([[1]]), torch.tensor([[1.0]]), r"teacher_ends must be int64 \[B, S\], got torch\.float32"),
        (
            torch.tensor([[1]]),
            torch.tensor([[1], [2]]),
            "teacher_ends must have the 1 rows of student_ends on cpu, got 2",
        ),
        (torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.int64, device="meta"), "on cpu, got 1 on meta"),
    ],
)
def test_ends_that_cannot_be_compared_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        aligned_positions(student, teacher)


def test_ends_may_start_again_in_the_next_row():
    ends = torch.tensor([[5, 9], [0, 5]])
    assert [part.tolist() for part in aligned_positions(ends, ends)] == [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 0, 1]]


def test_shared_ids_are_those_of_equal_strings_once_each():
    student = [None, b"a", b"b", b"", b"\xff", b"a"]
    teacher = [b"b", None, b"a", b"c", b"b", b""]
    ids, teacher_ids = shared_vocabulary(student, teacher)
    assert (ids.tolist(), teacher_ids.tolist()) == ([2, 3, 5], [4, 5, 2])
    assert ids.dtype == teacher_ids.dtype == torch.int64


def test_vocabularies_without_a_common_string_share_no_ids():
    ids, teacher_ids = shared_vocabulary([b"a", None], [None, b"b"])
    assert (ids.shape, teacher_ids.shape) == ((0,), (0,))
