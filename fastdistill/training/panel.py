"""A teacher and its students on one text, side by side, measured by the code that evaluates in the loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdistill.training.blocks import Blocks
from fastdistill.training.config import Config, UsageError, check_flags, flag
from fastdistill.training.data import Cutter
from fastdistill.training.evaluate import LM, Evaluation, measured, perplexity, summary
from fastdistill.training.footprint import Footprint, footprint
from fastdistill.training.harness import task_scores
from fastdistill.training.loading import load
from fastdistill.training.measures import Retention
from fastdistill.training.models import check_document_masks, context_length
from fastdistill.training.objective import DistillationModule
from fastdistill.training.pairing import Pairing, describe, pair, text_bytes
from fastdistill.training.sources import open_sources
from fastdistill.training.teacher import Teacher

PLACES = (0, 1, 4, 16, 64, 256, 1024, 4096, math.inf)
"""Edges of buckets by how many tokens of the document, or of the row, were read before the last one."""
ENTROPIES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, math.inf)
"""Edges of buckets by the entropy of the teacher's distribution, in nats."""
SEQ_LEN = 512


@dataclass(frozen=True)
class Settings:
    """What is evaluated, on what, and how; each is a flag, but for the student."""

    student: str
    teacher: str | None = flag(None, "model to compare the student with: folder, hub name or .gguf file")
    untrained: str | None = flag(None, "the student before it was trained, to say how much of the gap was closed")
    data: str = flag("pydoc", "text, as for train.py: 'pydoc', files, folders, or a data set of the hub")
    text_field: str = flag("text", "which field of a row is its text")
    part: str = flag("held-out", "the part that train.py holds out of this text, or all of it", ("held-out", "all"))
    max_characters: int | None = flag(None, "documents until there are so many characters; default all")
    seq_len: int | None = flag(None, f"tokens in a row; default {SEQ_LEN}, or what the models can take")
    stride: int | None = flag(
        None,
        "new tokens in a row: the others are read again, as context; fewer take longer and give each token\n"
        "more context; default all but one",
    )
    packing: str = flag(
        "documents",
        "rows of several documents that do not see each other, of a stream of documents that do,\n"
        "or padded rows of one document",
        ("documents", "stream", "padded"),
    )
    align: str = flag("bytes", "with two tokenizers, the positions compared, as for train.py", ("bytes", "cut"))
    batch_size: int = flag(8, "rows at a time")
    dtype: str = flag("fp32", "number format in which the models are loaded and compute", ("fp32", "bf16", "fp16"))
    tasks: str | None = flag(None, "also these tasks of lm-evaluation-harness, as a,b (needs pip install lm_eval)")
    tasks_folder: str | None = flag(None, "folder of tasks of your own for it, as YAML files")
    task_limit: int | None = flag(None, "examples of each task, for a trial; default all")
    output: str | None = flag(None, "folder to write evaluation.json, .md, .html and images into")

    def __post_init__(self) -> None:
        check_flags(self)
        for name in ("max_characters", "stride", "batch_size", "task_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.seq_len is not None and self.seq_len < 2:
            raise UsageError(f"--seq-len must be at least 2 (one token predicts the next), got {self.seq_len}")
        if self.tasks is None and (self.tasks_folder or self.task_limit):
            raise UsageError("--tasks-folder and --task-limit are about --tasks, which is not given")
        if self.untrained and not self.teacher:
            raise UsageError("--untrained says how much of the gap to a teacher was closed: give --teacher too")


@dataclass(frozen=True)
class Bucket:
    """Means over tokens whose `low <= key < high`, and over those compared with the teacher; None where none is."""

    low: float
    high: float
    tokens: int
    loss: float | None
    compared: int
    kl: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class Panel:
    """One model on the text. `word_perplexity` is exp(nats a word)."""

    name: str
    model: str
    evaluation: Evaluation
    word_perplexity: float
    by_place: list[Bucket]
    by_entropy: list[Bucket]
    footprint: Footprint
    tasks: dict[str, dict[str, float]]
    """By task and metric, where tasks are asked for."""


@dataclass(frozen=True)
class Comparison:
    """`panels` are of the teacher, the untrained student and the student, as far as they are given."""

    settings: Settings
    panels: list[Panel]
    one_tokenizer: bool
    tokens: int
    words: int
    documents: int
    seq_len: int
    stride: int
    notes: list[str]


def compare(settings: Settings, device: torch.device) -> Comparison:
    """Load the models, one after another measure them.

    Raises:
        UsageError: a model cannot be loaded, rows are longer than it can take, or the text has nothing to predict.
    """
    student, tokenizer = load(settings.student, dtype=settings.dtype, device=device)
    models, pairing = {"student": student}, Pairing((tokenizer,), "one tokenizer")
    teacher, teacher_tokenizer = None, tokenizer
    if settings.teacher:
        teacher_model, teacher_tokenizer = load(settings.teacher, dtype=settings.dtype, device=device)
        pairing = pair(tokenizer, teacher_tokenizer, Config(align=settings.align), device)
        models = {"teacher": teacher_model, **models}
        teacher = Teacher(teacher_model, device)
    if settings.untrained:
        untrained, untrained_tokenizer = load(settings.untrained, dtype=settings.dtype, device=device)
        if not pair(untrained_tokenizer, tokenizer, Config(), device).is_one:
            raise UsageError(f"--untrained {settings.untrained} has another tokenizer than {settings.student}")
        models = {"teacher": models["teacher"], "untrained student": untrained, "student": student}
    notes, sizes = [], pairing.text_bytes
    if pairing.is_one:
        try:
            sizes = (text_bytes(pairing.tokenizers[0], device),)
        except UsageError as error:
            notes.append(f"no bits per byte: {error}")
    pairing = replace(pairing, text_bytes=sizes)

    seq_len = settings.seq_len or min(SEQ_LEN, *(context_length(model) for model in models.values()))
    stride = settings.stride or seq_len - 1
    for name, model in models.items():
        if seq_len > context_length(model):
            raise UsageError(f"--seq-len {seq_len} is more than the {context_length(model)} positions of the {name}")
        if settings.packing == "documents":
            check_document_masks(model, name)
    if stride >= seq_len:
        raise UsageError(f"--stride must be less than the {seq_len} tokens of a row, got {stride}")
    documents, said = text(settings)
    blocks = Cutter(pairing.tokenizers, seq_len, settings.packing, context=seq_len - stride)(documents)
    if not blocks.num_targets():
        raise UsageError(f"--data {settings.data}: the {settings.part} text has no token to predict")
    notes += [*said, *([describe(pairing, blocks)] if teacher else [])]
    words = sum(len(document.split()) for document in documents)
    asked, panels = settings.tasks.split(",") if settings.tasks else [], []
    for name, model in models.items():
        own = (blocks.side(-1), pairing.of_teacher()) if name == "teacher" else (blocks, pairing)
        source = {"teacher": settings.teacher, "untrained student": settings.untrained}.get(name) or settings.student
        reads = teacher_tokenizer if name == "teacher" else tokenizer
        scores = (
            task_scores(
                model,
                reads,
                asked,
                folder=settings.tasks_folder,
                limit=settings.task_limit,
                batch_size=settings.batch_size,
            )
            if asked
            else {}
        )
        panels.append(panel(name, source, model, *own, teacher, words, settings.batch_size, seq_len, scores))
    return Comparison(
        settings, panels, pairing.is_one, panels[-1].evaluation.tokens, words, len(documents), seq_len, stride, notes
    )


def text(settings: Settings) -> tuple[list[str], list[str]]:
    """Documents, and what is to be said of them."""
    sources = open_sources(settings.data, text_field=settings.text_field)
    notes = list(chain.from_iterable(source.notes for source in sources))
    found = []
    for source in sources:
        if settings.part == "all" and not isinstance(source.train, list):
            raise UsageError(f"--part all: {source.name} is a stream, of which the held-out part alone is at hand")
        found += [*(source.train if settings.part == "all" else []), *source.held_out]
    chosen, characters = [], 0
    for document in found:
        if settings.max_characters is not None and characters >= settings.max_characters:
            break
        chosen.append(document)
        characters += len(document)
    return chosen, notes


def panel(
    name: str,
    source: str,
    model: PreTrainedModel,
    blocks: Blocks,
    pairing: Pairing,
    teacher: Teacher | None,
    words: int,
    batch_size: int,
    seq_len: int,
    tasks: dict[str, dict[str, float]],
) -> Panel:
    """One model on `blocks`, of a text of so many words."""
    module = DistillationModule(model, LM, pairing=pairing)
    found = [measures for measures, _ in measured(module, blocks, batch_size=batch_size, teacher=teacher)]

    def each(field: str) -> Tensor:
        return torch.cat([getattr(measures, field) for measures in found]).cpu()

    evaluation = summary(torch.stack([measures.sums() for measures in found]).sum(0))
    place, loss = each("place"), each("loss")
    by_place, by_entropy = buckets(PLACES, (place, loss)), []
    if teacher:
        kept = Retention(*(torch.cat(values).cpu() for values in zip(*(m.retention for m in found), strict=True)))
        by_place = buckets(PLACES, (place, loss), (each("compared_place"), kept))
        alike = slice(None if pairing.is_one else 0)  # with two tokenizers a loss has no teacher's distribution to it
        by_entropy = buckets(ENTROPIES, (kept.teacher_entropy[alike], loss[alike]), (kept.teacher_entropy, kept))
    return Panel(
        name, source, evaluation, perplexity(evaluation.loss * evaluation.tokens / max(1, words)), by_place, by_entropy,
        footprint(model, min(batch_size, len(blocks)), seq_len), tasks,
    )  # fmt: skip


def buckets(
    edges: Sequence[float], predicted: tuple[Tensor, Tensor], compared: tuple[Tensor, Retention] | None = None
) -> list[Bucket]:
    """Those that hold any of the tokens predicted (key and loss) or compared (key and what was retained)."""
    found = []
    for low, high in pairwise(edges):
        key, loss = predicted
        losses = loss[(key >= low) & (key < high)]
        kl = top1 = losses[:0]
        if compared:
            key, kept = compared
            here = (key >= low) & (key < high)
            kl, top1 = kept.kl[here], kept.top1[here]
        if len(losses) or len(kl):
            found.append(Bucket(low, high, len(losses), _mean(losses), len(kl), _mean(kl), _mean(top1)))
    return found


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None
