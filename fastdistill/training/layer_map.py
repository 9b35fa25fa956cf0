"""Which blocks' outputs are compared: pairs of a student block and a teacher block, by rule or by number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from fastdistill.training.config import UsageError
from fastdistill.training.models import hidden_width, parts

_RULES = "auto, uniform, last, skip, or pairs student:teacher like 0:1,-1:-1"
_LINE = 100


@dataclass(frozen=True)
class LayerMap:
    """`pairs` (student block, teacher block), 0-based; `rule` says what decided them.

    `depth` is the teacher's number of blocks, `widths` are those of the student's states and of the teacher's.
    """

    pairs: tuple[tuple[int, int], ...]
    rule: str
    depth: int
    widths: tuple[int, int]

    @classmethod
    def between(
        cls, rule: str, student: PreTrainedModel, teacher: PreTrainedModel, made_of: Sequence[int] | None
    ) -> LayerMap:
        """The map that `--layer-map` asks for; `made_of` are the teacher blocks that the student was made of, if any.

        Raises:
            UsageError: as `layer_pairs`.
        """
        student_depth, depth = (len(parts(model).blocks) for model in (student, teacher))
        if rule == "auto" and made_of is not None:
            rule, pairs = "made of them", list(enumerate(made_of))
        else:
            rule = "uniform" if rule == "auto" else rule
            pairs = layer_pairs(rule, student_depth, depth)
        return cls(tuple(pairs), rule, depth, (hidden_width(student), hidden_width(teacher)))

    def picture(self, projection: str) -> str:
        """For the log: the teacher's blocks in a row, and under each the student's that is compared with it.

        `projection` is "learned" or "fixed", said where the widths differ.
        """
        student_width, teacher_width = self.widths
        width = f"width {student_width}"
        if student_width != teacher_width:
            width += f", projected to {teacher_width} ({projection})"
        beneath = [",".join(str(s) for s, t in sorted(self.pairs) if t == block) or "." for block in range(self.depth)]
        size = max(len(cell) for cell in (*beneath, str(self.depth - 1)))
        lines = [f"layers compared ({self.rule}), states of {width}:"]
        columns = (_LINE - len("  teacher")) // (size + 2)
        for first in range(0, self.depth, columns):
            blocks = range(first, min(first + columns, self.depth))
            lines.append("  teacher" + "".join(f"  {block:>{size}}" for block in blocks))
            lines.append("  student" + "".join(f"  {beneath[block]:>{size}}" for block in blocks))
        return "\n".join(lines)


def layer_pairs(rule: str, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Pairs (student block, teacher block), 0-based, of a student of Ls blocks and a teacher of Lt.

    Args:
        rule: "uniform", student block i with teacher block ceil((i + 1) Lt / Ls) - 1, so that the last meets the last
            (TinyBERT, Jiao et al. 2020, arXiv:1909.10351); "last", with Lt - Ls + i; "skip", with (i + 1) k - 1 where
            k = Lt // Ls, without the student's last block, which the head trains (PKD-skip, Sun et al. 2019,
            arXiv:1908.09355); or the pairs themselves, "0:1,-1:-1", negatives counted from the end.
        student_depth, teacher_depth: Ls and Lt. What is compared is a block's output: the final norm is never in it.

    Raises:
        UsageError: the rule is none of these, names a block that is not there or a pair twice, or leaves no pair; or
            "last" or "skip" is asked for and the student is deeper than the teacher.
    """
    if rule == "uniform":
        return [(i, -(-(i + 1) * teacher_depth // student_depth) - 1) for i in range(student_depth)]
    if rule in ("last", "skip"):
        if student_depth > teacher_depth:
            raise UsageError(
                f"--layer-map {rule} needs a student no deeper than its teacher, "
                f"got {student_depth} blocks against {teacher_depth}"
            )
        if rule == "last":
            return [(i, teacher_depth - student_depth + i) for i in range(student_depth)]
        if student_depth == 1:
            raise UsageError("--layer-map skip leaves out the last block: it needs a student of at least 2, got 1")
        step = teacher_depth // student_depth
        return [(i, (i + 1) * step - 1) for i in range(student_depth - 1)]
    if not re.fullmatch(r"-?\d+:-?\d+(,-?\d+:-?\d+)*", rule):
        raise UsageError(f"--layer-map must be {_RULES}, got {rule!r}")
    pairs = []
    for text in rule.split(","):
        student, teacher = map(int, text.split(":"))
        for name, block, depth in (("student", student, student_depth), ("teacher", teacher, teacher_depth)):
            if not -depth <= block < depth:
                raise UsageError(
                    f"--layer-map {rule}: the {name}'s blocks are 0 to {depth - 1}, or -{depth} to -1, got {block}"
                )
        pair = student % student_depth, teacher % teacher_depth
        if pair in pairs:
            raise UsageError(f"--layer-map {rule} must name each pair once, got {pair[0]}:{pair[1]} twice")
        pairs.append(pair)
    return pairs
