"""Which blocks are compared: each rule by hand, what it refuses, and the picture in the log."""

from __future__ import annotations

import pytest

from fastdistill.training.config import UsageError
from fastdistill.training.layer_map import LayerMap, layer_pairs
from tests.training.families import FAMILIES, GPT2, make


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "blocks"),
    [
        # ceil((i + 1) Lt / Ls) - 1
        ("uniform", 2, 4, [1, 3]),
        ("uniform", 3, 7, [2, 4, 6]),
        ("uniform", 4, 6, [1, 2, 4, 5]),
        ("uniform", 4, 4, [0, 1, 2, 3]),
        ("uniform", 1, 5, [4]),
        ("uniform", 4, 2, [0, 0, 1, 1]),
        ("last", 2, 4, [2, 3]),
        ("last", 3, 3, [0, 1, 2]),
        ("last", 1, 5, [4]),
        ("skip", 6, 12, [1, 3, 5, 7, 9]),
        ("skip", 3, 8, [1, 3]),
        ("skip", 2, 7, [2]),
        ("skip", 4, 4, [0, 1, 2]),
    ],
)
def test_a_rule_pairs_the_first_blocks_of_the_student_in_turn(rule, student, teacher, blocks):
    assert layer_pairs(rule, student, teacher) == list(enumerate(blocks))


def test_pairs_may_be_named_from_either_end_and_many_to_one():
    assert layer_pairs("0:1,1:3,-1:-1", 3, 6) == [(0, 1), (1, 3), (2, 5)]
    assert layer_pairs("0:2,1:2,1:0", 2, 3) == [(0, 2), (1, 2), (1, 0)]
    assert layer_pairs("-2:-6", 2, 6) == [(0, 0)]


@pytest.mark.parametrize(
    ("rule", "student", "teacher", "message"),
    [
        ("frist", 2, 4, "--layer-map must be auto, uniform, last, skip, or pairs .*, got 'frist'"),
        ("", 2, 4, "--layer-map must be .*, got ''"),
        ("0:1,", 2, 4, "--layer-map must be .*, got '0:1,'"),
        ("0-1", 2, 4, "--layer-map must be .*, got '0-1'"),
        ("2:1", 2, 4, "--layer-map 2:1: the student's blocks are 0 to 1, or -2 to -1, got 2"),
        ("0:1,1:-5", 2, 4, "--layer-map 0:1,1:-5: the teacher's blocks are 0 to 3, or -4 to -1, got -5"),
        ("0:1,1:3,-2:1", 2, 4, "--layer-map 0:1,1:3,-2:1 must name each pair once, got 0:1 twice"),
        ("last", 4, 2, "--layer-map last needs a student no deeper than its teacher, got 4 blocks against 2"),
        ("skip", 4, 2, "--layer-map skip needs a student no deeper than its teacher, got 4 blocks against 2"),
        ("skip", 1, 2, "--layer-map skip leaves out the last block: it needs a student of at least 2, got 1"),
    ],
)
def test_a_map_that_cannot_be_is_refused(rule, student, teacher, message):
    with pytest.raises(UsageError, match=message):
        layer_pairs(rule, student, teacher)


def test_auto_is_what_the_student_was_made_of_or_else_uniform():
    student, teacher = make(GPT2), make(FAMILIES["llama"])
    made = LayerMap.between("auto", student, teacher, made_of=[0, 1, 2, 3])
    assert (made.pairs, made.rule) == (((0, 0), (1, 1), (2, 2), (3, 3)), "made of them")
    other = LayerMap.between("auto", student, teacher, made_of=None)
    assert (other.pairs, other.rule) == (made.pairs, "uniform")
    asked = LayerMap.between("-1:2", student, teacher, made_of=[0, 1, 2, 3])
    assert (asked.pairs, asked.rule, asked.depth) == (((3, 2),), "-1:2", 4)
    assert asked.widths == (student.config.n_embd, teacher.config.hidden_size)


def test_the_picture_sets_each_student_block_under_its_teacher_block():
    layer_map = LayerMap(((0, 1), (1, 3), (2, 5)), "made of them", 6, (576, 576))
    assert layer_map.picture("learned") == (
        "layers compared (made of them), states of width 576:\n  teacher  0  1  2  3  4  5\n  student  .  0  .  1  .  2"
    )


def test_the_picture_tells_of_projections_and_of_many_on_one():
    layer_map = LayerMap(((2, 1), (1, 0), (0, 0)), "uniform", 2, (576, 2048))
    assert layer_map.picture("fixed") == (
        "layers compared (uniform), states of width 576, projected to 2048 (fixed):\n"
        "  teacher    0    1\n"
        "  student  0,1    2"
    )


def test_the_picture_of_a_deep_teacher_is_wrapped():
    layer_map = LayerMap(tuple(zip(range(16), range(3, 64, 4), strict=True)), "uniform", 64, (8, 8))
    title, *lines = layer_map.picture("learned").splitlines()
    assert max(map(len, (title, *lines))) <= 100
    assert len(lines) == 6
    cells = {
        row: [cell for line in lines if row in line for cell in line.split()[1:]] for row in ("teacher", "student")
    }
    assert cells["teacher"] == [str(block) for block in range(64)]
    assert [(int(s), t) for t, s in enumerate(cells["student"]) if s != "."] == list(layer_map.pairs)
    for above, below in zip(lines[::2], lines[1::2], strict=True):
        assert len(above) == len(below)
