"""The configuration: one frozen dataclass, from which flags, presets and files of settings derive."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdistill.training.presets import PRESETS


class UsageError(Exception):
    """Something the user asked for cannot be done; the message is all that they need to see."""


def flag(default: Any, help: str, choices: Sequence[Any] | None = None) -> Any:
    """A field that is a flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


def check_flags(settings: Any) -> None:
    """Raise `UsageError` for a field of a dataclass of `flag`s that is none of its choices, or not finite."""
    for f in dataclasses.fields(settings):
        value, choices = getattr(settings, f.name), f.metadata.get("choices")
        if choices and value not in choices:
            known = [str(choice) for choice in choices if choice is not None]
            raise UsageError(
                f"--{dashed(f.name)} must be one of {', '.join(known)}, got {value!r}{nearest(str(value), known)}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"--{dashed(f.name)} must be finite, got {value}")


_DTYPES = ("fp32", "bf16", "fp16")

_PRESET_LINES = "\n".join(
    "- {}: {}".format(name, preset.about.replace("\n", "\n  ")) for name, preset in PRESETS.items()
)


@dataclass(frozen=True)
class Config:
    """Every field is a flag: `batch_size` is `--batch-size`."""

    preset: str | None = flag(
        None,
        f"base settings, which other flags change; demo, if neither --teacher nor --config is given\n{_PRESET_LINES}\n",
        (None, *PRESETS),
    )

    teacher: str = flag("demo", "'demo' (trained here once, then cached), a model folder, hub name or .gguf file")
    teacher_dtype: str = flag("auto", "number format of the teacher; auto: --precision's", ("auto", *_DTYPES))
    teacher_bits: int | None = flag(None, "load the teacher quantised to 8 or 4 bits, by bitsandbytes", (None, 8, 4))
    teacher_device: str = flag(
        "auto",
        "where the teacher computes; auto: where the student does; sharded: its blocks spread over the processes",
        ("auto", "cpu", "sharded"),
    )
    student: str | None = flag(None, "model folder or hub name to start from; default: layers of the teacher")
    student_layers: str = flag(
        "every-other",
        "teacher layers the student is made of: every-other, first, first:N, importance,\n"
        "importance:N (those that the teacher misses most), or 0,2,5,...",
    )

    data: str = flag(
        "pydoc",
        "text: 'pydoc' (Python's language reference, on every machine), .txt, .jsonl or .parquet files and\n"
        "folders of them, wikitext-2, wikitext-103, bookcorpus, openwebtext, c4, fineweb-edu, or any hub\n"
        "data set as owner/name or owner/name:config; several as a,b or with shares as a=0.7,b=0.3",
    )
    text_field: str = flag("text", "which field of a row is its text")
    streaming: bool = flag(False, "read the text as it is needed instead of before")
    data_share: float = flag(1.0, "share of the training text that the student sees, drawn by seed")
    packing: str = flag(
        "documents",
        "rows of several documents that do not see each other, of a stream of documents that do,\n"
        "or padded rows of one document",
        ("documents", "stream", "padded"),
    )
    align: str = flag(
        "bytes",
        "with two tokenizers, compare positions that have read the same text, or cut to the shorter and\n"
        "compare by number (mostly unrelated text)",
        ("bytes", "cut"),
    )
    cross_vocab: str = flag(
        "shared",
        "with two tokenizers, compare the strings that both have and the rest of the mass, or sorted\nprobabilities",
        ("shared", "sorted"),
    )

    output_dir: str | None = flag(None, "where the run is kept; default runs/<time>")
    resume: bool = flag(False, "go on with the run in --output-dir")
    seed: int = flag(0, "seed of the first run")
    seeds: int = flag(1, "how many seeds to run, one after another")
    baseline: bool = flag(False, "also train the same student on the same tokens without the teacher")
    baseline_steps: int | None = flag(
        None, "optimizer steps of that one, if not those of the run: more of them take as long as fewer with a teacher"
    )

    epochs: float = flag(1.0, "passes over the student's text, unless --max-steps is given")
    max_steps: int | None = flag(None, "optimizer steps")
    stop_at: int | None = flag(None, "end the run at this step of a student, saved, without changing the schedule")
    max_hours: float | None = flag(None, "end the run after this long, saved, without changing the schedule")
    batch_size: int = flag(8, "sequences in a micro-batch of one process")
    grad_accum: int = flag(1, "micro-batches in an optimizer step")
    seq_len: int = flag(128, "tokens in a sequence")
    lr: float = flag(5e-4, "peak learning rate")
    schedule: str = flag("cosine", "course of the learning rate after warm-up", ("cosine", "linear", "constant"))
    warmup_steps: int = flag(20, "optimizer steps of linear warm-up")
    weight_decay: float = flag(0.1, "AdamW weight decay of matrices")
    clip: float = flag(1.0, "largest gradient norm")
    precision: str = flag(
        "auto",
        "number format of the student's forward pass; its weights stay fp32. auto: bf16 where the GPU\n"
        "computes in it, fp16 on older ones, fp32 on a CPU",
        ("auto", *_DTYPES),
    )
    gradient_checkpointing: bool = flag(False, "compute the student's blocks twice, to hold one block's activations")
    ema_decay: float = flag(0.0, "evaluate and keep a running mean of the weights; 0: the weights themselves")
    shard: bool = flag(False, "spread weights, gradients and optimizer over the processes (FSDP2), in place of DDP")

    kd_weight: float = flag(0.5, "weight of T^2 KL(teacher || student)")
    lm_weight: float = flag(0.5, "weight of the next-token cross-entropy")
    layerwise_weight: float = flag(0.0, "weight of --layerwise-loss between the outputs of mapped blocks")
    layerwise_loss: str = flag(
        "layer_norm",
        "layer_norm: half the squared error of layer-normalised states, which is 1 - their correlation;\n"
        "cosine: 1 - cos; teacher_rms: squared error over the teacher's mean square; raw: squared error",
        ("layer_norm", "teacher_rms", "cosine", "raw"),
    )
    layerwise_skip_first: int = flag(
        0,
        "leave out the first N positions of each document; position 0 carries activations thousands of\ntimes the rest",
    )
    attention_weight: float = flag(0.0, "weight of --attention-loss between the attention maps of mapped blocks")
    attention_loss: str = flag("kl", "kl: KL(teacher || student) of rows of attention; mse: squared", ("kl", "mse"))
    head_map: str = flag(
        "auto",
        "which heads are compared: auto (each with its own, unlike numbers as means of groups), or pairs\n"
        "student:teacher as 0:0,1:3",
    )
    attention_alignment_weight: float = flag(
        0.0, "weight of the KL between what student's and teacher's states find among the teacher's earlier states"
    )
    routing_feature_weight: float = flag(
        0.0, "weight of the distance to a mixture of the teacher's states that a router chooses for each token"
    )
    load_balance_weight: float = flag(0.01, "weight of the router's load balance, where there is a router")
    routing_over: str = flag(
        "layers",
        "what the router chooses from: outputs of the teacher's mapped blocks, or of the experts of its last block",
        ("layers", "experts"),
    )
    routing_top_k: int = flag(2, "of how many a token's mixture is at the end of the run; it begins with all")
    contrastive_weight: float = flag(
        0.0, "weight of InfoNCE: which of the teacher's texts is the student's, by their last mapped blocks"
    )
    contrastive_temperature: float = flag(0.1, "temperature of its similarities")
    contrastive_negatives: str = flag(
        "auto",
        "texts of the batch on all processes, tokens of the same text, or texts where there are at least 32",
        ("auto", "texts", "tokens"),
    )
    layer_map: str = flag(
        "auto",
        "which blocks are compared, by all losses between blocks: auto (the teacher's that the student was made of,\n"
        "else uniform), uniform, last, skip, or pairs student:teacher as 0:1,-1:-1 (--layer-map=-1:-1 where\n"
        "a minus comes first)",
    )
    projection: str = flag(
        "learned",
        "where student and teacher differ in width, what brings the student's states to the teacher's:\n"
        "a matrix that is learned beside the student, or fixed as the identity",
        ("learned", "fixed"),
    )
    temperature: float = flag(2.0, "T of both softmaxes, at the start")
    temperature_end: float | None = flag(None, "T at the last step, if --temperature-schedule is not constant")
    temperature_schedule: str = flag("constant", "course of T over the run", ("constant", "linear", "cosine"))
    curriculum: str = flag(
        "none",
        "when components begin: founding (kd and lm, at 10 % of the steps attention, attention_alignment and\n"
        "routing_feature, at 40 % layerwise, at 70 % contrastive), or as layerwise:0.4,contrastive:0.7",
    )
    balance: str = flag(
        "none",
        "hold each component beside kd and lm at its weight times their size: that of the losses (magnitude)\n"
        "or of their gradients",
        ("none", "magnitude", "gradient"),
    )
    balance_steps: int = flag(20, "steps between measurements of gradients for --balance gradient")
    divergence: str = flag("forward_kl", "which divergence", ("forward_kl", "reverse_kl", "jsd"))

    log_steps: int = flag(100, "steps between log lines")
    detail_steps: int = flag(1000, "steps between detailed blocks")
    eval_steps: int = flag(500, "steps between evaluations on held-out text")
    patience: int | None = flag(None, "stop after this many evaluations without a better held-out loss")
    min_delta: float = flag(0.0, "how many nats lower a held-out loss must be to count as better")
    patience_from: int = flag(0, "step from which --patience counts")
    save_steps: int = flag(1000, "steps between checkpoints")
    keep_checkpoints: int = flag(2, "how many checkpoints to keep")
    max_bad_steps: int = flag(5, "stop after this many steps in a row with a NaN or infinite loss")
    tensorboard: bool = flag(True, "write the log for TensorBoard too, where it is installed")

    teacher_steps: int = flag(600, "demo teacher: optimizer steps")
    teacher_lr: float = flag(3e-3, "demo teacher: peak learning rate")
    teacher_depth: int = flag(4, "demo teacher: layers")
    teacher_width: int = flag(128, "demo teacher: width")
    vocab_size: int = flag(1024, "demo teacher: size of the vocabulary")

    def __post_init__(self) -> None:
        check_flags(self)
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{dashed(name)} must be at least 1, got {value}")
        for name in _ABOVE_ZERO:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(f"--{dashed(name)} must be greater than 0, got {value}")
        for name in _AT_LEAST_ZERO:
            if getattr(self, name) < 0:
                raise UsageError(f"--{dashed(name)} must be at least 0, got {getattr(self, name)}")
        if self.seq_len < 2:
            raise UsageError(f"--seq-len must be at least 2 (one token predicts the next), got {self.seq_len}")
        if self.layerwise_skip_first >= self.seq_len:
            raise UsageError(
                f"--layerwise-skip-first must be less than --seq-len {self.seq_len}, got {self.layerwise_skip_first}: "
                "no position would be left to compare"
            )
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"--ema-decay must be in [0, 1), got {self.ema_decay}")
        if self.teacher_device == "sharded" and self.teacher_bits:
            raise UsageError("--teacher-device sharded: a teacher quantised by --teacher-bits cannot be spread")
        if not 0 < self.data_share <= 1:
            raise UsageError(f"--data-share must be in (0, 1], got {self.data_share}")
        if not any(getattr(self, f"{name}_weight") for name in COMPONENTS):
            raise UsageError("--kd-weight, --lm-weight and all other weights are 0: nothing would be learned")
        if (self.temperature_schedule == "constant") != (self.temperature_end is None):
            raise UsageError(
                "--temperature-end goes with a --temperature-schedule of linear or cosine, and they with it, got "
                f"{self.temperature_end} with {self.temperature_schedule}"
            )
        if self.balance != "none" and not (self.kd_weight or self.lm_weight):
            raise UsageError(f"--balance {self.balance} measures against kd and lm, whose weights are both 0")
        if self.balance == "gradient" and self.shard:
            raise UsageError("--balance gradient: gradients of weights spread by --shard cannot be measured apart")
        if self.baseline_steps and not self.baseline:
            raise UsageError(f"--baseline-steps {self.baseline_steps} needs --baseline, the student that takes them")
        if self.resume and self.output_dir is None:
            raise UsageError("--resume needs --output-dir, the run to go on with")

    def without_teacher(self) -> Config:
        """The same run on the text alone."""
        weights = {f"{name}_weight": float(name == "lm") for name in COMPONENTS}
        steps = self.baseline_steps or self.max_steps
        return dataclasses.replace(self, **weights, curriculum="none", balance="none", max_steps=steps)


COMPONENTS = ("kd", "lm", "layerwise", "attention", "attention_alignment", "routing_feature", "contrastive")
"""What a weight each is given for; `load_balance` comes with `routing_feature`."""

_ABOVE_ZERO = (
    "lr", "teacher_lr", "clip", "temperature", "temperature_end", "contrastive_temperature", "epochs", "max_hours",
)  # fmt: skip

_AT_LEAST_ONE = (
    "seeds", "baseline_steps", "max_steps", "stop_at", "batch_size", "grad_accum", "log_steps", "detail_steps",
    "eval_steps", "save_steps", "keep_checkpoints", "max_bad_steps", "teacher_steps", "teacher_depth", "patience",
    "routing_top_k", "balance_steps",
)  # fmt: skip

_AT_LEAST_ZERO = (
    *(f"{name}_weight" for name in COMPONENTS), "load_balance_weight", "layerwise_skip_first", "weight_decay",
    "warmup_steps", "seed", "min_delta", "patience_from",
)  # fmt: skip

MAY_CHANGE_ON_RESUME = {
    "output_dir", "resume", "stop_at", "max_hours", "log_steps", "detail_steps", "save_steps", "keep_checkpoints",
    "max_bad_steps", "tensorboard", "gradient_checkpointing",
}  # fmt: skip
"""Fields that leave the numbers of a run alone; any other must stay as the run began with it."""


def dashed(name: str) -> str:
    """A field's name as its flag has it."""
    return name.replace("_", "-")


def scalar_type(hint: Any) -> type:
    """`int` for `int | None`."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a message: what may have been meant, if anything known is like it."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ""
