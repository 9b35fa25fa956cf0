"""What a run needs, by arithmetic from shapes and settings: memory by part, and floating-point operations.

Nothing is run. docs/presets.md compares the memory with what PyTorch allocates on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

from fastdistill.attention_torch import BUFFERS as BUFFERS_OF_SCORES
from fastdistill.attention_torch import STATISTICS, block_queries
from fastdistill.backend import TENSOR_CORES
from fastdistill.cross_vocab import SHARED_BUFFERS, SORTED_BUFFERS
from fastdistill.heads import MAX_CHUNK_BYTES
from fastdistill.linear_chunks import chunk_and_block, gpu_chunk_rows
from fastdistill.softmax_kl_torch import RESULTS, block_rows
from fastdistill.training.config import COMPONENTS, Config
from fastdistill.training.contrastive import ENOUGH_TEXTS
from fastdistill.training.shapes import Shape, kept_bytes

FLOAT32, HALF = 4, 2

MAPS_AT_WORK = 5
"""Attention maps of one block that are alive for a moment beside those that are kept, measured on a CPU."""

CONTRASTS_AT_WORK = 8
"""Tables of cosines `[B, S, S]` of tokens that are alive when the second direction is made, measured on a CPU."""

BACKWARD_WIDEST, TEACHER_WIDEST = 3, 5
"""How many states as wide as the widest inside a block are alive for a moment, beside what is kept: in a block's
backward pass, and in the teacher's forward pass. Of GPT-2 and Llama, measured on a CPU."""


class Device(NamedTuple):
    """Where a run computes."""

    name: str
    capability: int | None
    """The major number of a GPU's compute capability, None for a CPU."""
    precision: str
    """What `--precision auto` takes there."""
    peak: float | None = None
    """FLOP/s of matrix products in that precision with float32 sums, by the maker's data sheet."""
    share: float = 1.0
    """Of the peak that small models are taken to reach: a guess, not a measurement."""

    def seconds(self, flops: float) -> float:
        """How long so many operations take at that share of the peak."""
        assert self.peak is not None
        return flops / (self.peak * self.share)


CPU = Device("CPU", None, "fp32")
# The P100 has no units that sum half-precision products in float32: they are taken to run at its float32 peak.
P100 = Device("P100", 6, "fp16", 9.3e12, 1 / 3)
T4 = Device("T4", 7, "fp16", 65e12, 1 / 5)
H200 = Device("H200", 9, "bf16", 989e12, 1 / 10)


@dataclass(frozen=True)
class Estimate:
    """Memory in bytes by part, at the moment of a step at which it is most; and floating-point operations."""

    memory: dict[str, int]
    moment: str
    """"teacher", "loss", "components" (those after kd and lm), "backward" or "end" (of it, and the optimizer)."""
    step_flops: int
    """Of an optimizer step of the distilled student."""
    run_flops: int | None
    """Of all students and steps; None where the number of steps is not known."""
    chunk_tokens: int
    """How many of a micro-batch `linear_softmax_kl` takes at a time."""

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def estimate(
    config: Config,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    device: Device,
    *,
    two_tokenizers: bool = False,
    rows: int | None = None,
) -> Estimate:
    """What one process of a run needs once Adam has its state, all rows being full.

    Memory is that of tensors alone: not the libraries' own (on a GPU some hundred MB), not what the allocator cannot
    use between blocks. Weights, gradients and Adam's two means are float32, four times 4 bytes a parameter; what the
    forward pass keeps is counted by `kept_bytes`; the losses are by the law of docs/memory.md. Evaluation needs less.

    Operations: a backward pass takes twice those of the forward pass, so 6 a parameter and token for the student and
    2 for the teacher (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), both with their heads and attention;
    with gradient checkpointing the student's blocks go forward twice. Evaluation, norms, softmaxes, the optimizer and
    what components beside kd and lm compute are left out, and so is the training of the demo's teacher.

    Args:
        student, teacher: their configurations, the student's as it is trained, of fewer layers than its teacher.
        two_tokenizers: whether they differ, so that `linear_cross_vocab_kl` compares the two.
        rows: how many the text has, for `epochs`; not needed with `max_steps`.

    Raises:
        ValueError: for a student of experts, as `kept_bytes` says.
    """
    shapes = Shape.of(student), Shape.of(teacher)
    run = _Memory(config, *shapes, student, device, two_tokenizers)
    moments = {moment: getattr(run, moment)() for moment in ("teacher", "loss", "components", "backward", "end")}
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    memory = {part: size for part, size in (run.held() | moments[moment]).items() if size}

    taught, alone = step_flops(config, *shapes), step_flops(config, shapes[0], None)
    steps = config.max_steps
    if steps is None and rows is not None:
        steps = math.ceil(config.epochs * rows / (config.batch_size * config.grad_accum))
    run_flops = None
    if steps is not None:
        run_flops = config.seeds * (steps * taught + config.baseline * (config.baseline_steps or steps) * alone)
    return Estimate(memory, moment, taught, run_flops, run.chunk_of_logits()[0])


def step_flops(config: Config, student: Shape, teacher: Shape | None) -> int:
    """Operations of an optimizer step of all its micro-batches, with a teacher or without."""
    forward = student.block_flops(config.seq_len)
    flops = 3 * (forward + student.head_flops()) + config.gradient_checkpointing * forward
    if teacher and _is_taught(config):
        flops += teacher.block_flops(config.seq_len) + bool(config.kd_weight) * teacher.head_flops()
    return flops * config.batch_size * config.grad_accum * config.seq_len


def _is_taught(config: Config) -> bool:
    return any(getattr(config, f"{name}_weight") for name in COMPONENTS if name != "lm")


@dataclass(frozen=True)
class _Memory:
    """Bytes by part: what is held all the time, and what each moment of a step adds to it."""

    config: Config
    student: Shape
    teacher_shape: Shape
    student_config: PreTrainedConfig
    device: Device
    two_tokenizers: bool

    def held(self) -> dict[str, int]:
        trained = FLOAT32 * self._trained()
        return {
            "student's weights": trained,
            "Adam's two means": 2 * trained,
            "averaged weights": bool(self.config.ema_decay) * FLOAT32 * self.student.parameters,
            "teacher's weights": self._teacher_weights(),
        }

    def teacher(self) -> dict[str, int]:
        """In one of its last blocks, while the states of the batch before are not yet given up."""
        if not _is_taught(self.config) or self._teacher_is_elsewhere():
            return {}
        inside = TEACHER_WIDEST * self._tokens() * self.teacher_shape.widest * self._teacher_bytes()
        return self._earlier_gradients() | self._teacher_states(batches=2) | {"inside the teacher": inside}

    def loss(self) -> dict[str, int]:
        """In the forward pass of the losses, while they have a chunk of logits."""
        chunk, gradients, casts = self._loss_buffers()
        return (
            self._earlier_gradients()
            | self._teacher_states()
            | self._compared_states()
            | {
                "student's activations": self._kept_at_loss(),
                "half-precision copies": self._is_half() * HALF * self.student.matrices + casts,
                "a chunk of logits": chunk,
                "gradients of the losses": gradients,
            }
        )

    def components(self) -> dict[str, int]:
        """When the last attention or mixtures are compared, the output heads being done with."""
        own = {
            "attention maps": self._attention_maps(),
            "attention without maps": self._attention_rows(),
            "router's candidates": self._candidates(),
            "cosines of tokens": self._cosines(),
        }
        others = {part: size for part, size in self.loss().items() if part != "a chunk of logits"}
        return others | own if any(own.values()) else {}

    def backward(self) -> dict[str, int]:
        """In the student's last block, whose turn comes first."""
        _, gradients, _ = self._loss_buffers()
        kept, copies = self._kept_at_loss(), HALF * self.student.matrices
        if self.config.gradient_checkpointing:  # of this block alone, beside what the others begin from
            kept += self._kept // self.student.depth
            copies //= self.student.depth
        of_states = self._pairs() * self._tokens() * self.teacher_shape.width * FLOAT32
        return (
            self._earlier_gradients()
            | self._teacher_states()
            | self._compared_states()
            | {
                "student's activations": kept,
                "half-precision copies": self._is_half() * copies,
                "gradients of the losses": gradients + of_states,
                "inside a block": self._inside_block(),
            }
        )

    def end(self) -> dict[str, int]:
        """At the embedding, whose turn is last and whose gradient is as large as the head's."""
        embedding = FLOAT32 * self.student.vocab_size * self.student.width
        again = embedding * (1 + (self.config.grad_accum > 1)) * self.student.tied
        gradients = {"gradients": FLOAT32 * self._trained(), "gradients of the losses": again}
        return gradients | self._teacher_states()

    def _tokens(self) -> int:
        return self.config.batch_size * self.config.seq_len

    def _is_half(self) -> bool:
        return self._precision() != "fp32"

    def _precision(self) -> str:
        return self.device.precision if self.config.precision == "auto" else self.config.precision

    def _pairs(self) -> int:
        """Blocks whose outputs are compared; no rule of a map takes more but pairs written out."""
        config = self.config
        weights = config.layerwise_weight, config.attention_alignment_weight, config.routing_feature_weight
        return self.student.depth * any(weights)

    def _projections(self) -> int:
        """Matrices to the teacher's width, of which each component has its own."""
        config = self.config
        each = bool(config.layerwise_weight) + bool(config.attention_alignment_weight)
        return self.student.depth * each + bool(config.routing_feature_weight) + bool(config.contrastive_weight)

    def _candidates(self) -> int:
        """Bytes of what the router chooses from, layers being as many as the student's, and of a passing copy."""
        states = bool(self.config.routing_feature_weight) * self.student.depth * self._tokens()
        return 2 * FLOAT32 * states * self.teacher_shape.width

    def _cosines(self) -> int:
        """Bytes of those of each token with each of its row; of texts they are nothing beside the rest."""
        config = self.config
        few = config.contrastive_negatives == "auto" and config.batch_size < ENOUGH_TEXTS
        of_tokens = bool(config.contrastive_weight) and (few or config.contrastive_negatives == "tokens")
        return CONTRASTS_AT_WORK * FLOAT32 * of_tokens * config.batch_size * config.seq_len**2

    def _attention_maps(self) -> int:
        """Bytes of those kept for the backward pass, and of those of one block that are alive while they are made."""
        if not self.config.attention_weight or not self._takes_maps():
            return 0
        heads, teacher_heads = self.student.heads, self.teacher_shape.heads
        kept = teacher_heads + heads * (2 if self.config.attention_loss == "mse" else 1)
        each = FLOAT32 * self.config.batch_size * self.config.seq_len**2
        return (kept * self.student.depth + MAPS_AT_WORK * max(heads, teacher_heads)) * each

    def _takes_maps(self) -> bool:
        """As `AttentionLoss` says."""
        config = self.config
        unlike = self.student.heads != self.teacher_shape.heads and config.head_map == "auto"
        return config.attention_loss == "mse" or unlike

    def _attention_rows(self) -> int:
        """Bytes that `attention_kl` keeps, the alignment's vectors too, and those of a block of maps."""
        config, tokens, heads, teacher = self.config, self._tokens(), self.student.heads, self.teacher_shape
        kept = chunk = 0
        if config.attention_weight and not self._takes_maps():
            kept += STATISTICS * heads
            chunk = 0 if self._is_half() and (self.device.capability or 0) >= TENSOR_CORES // 10 else heads
        if config.attention_alignment_weight:
            kept += STATISTICS * teacher.heads + 2 * teacher.width
            chunk = max(chunk, teacher.heads)
        all_heads, positions = chunk * config.batch_size, config.seq_len
        kind = "cpu" if self.device.capability is None else "cuda"
        queries = min(positions, block_queries(all_heads, positions, FLOAT32, kind))
        block = BUFFERS_OF_SCORES * FLOAT32 * all_heads * positions * queries
        return FLOAT32 * kept * tokens * self.student.depth + block

    def _trained(self) -> int:
        """Numbers that learn: the student's, and those of the projections to another width."""
        widths = self.student.width, self.teacher_shape.width
        learned = widths[0] != widths[1] and self.config.projection == "learned"
        return self.student.parameters + learned * self._projections() * widths[0] * widths[1]

    def _earlier_gradients(self) -> dict[str, int]:
        """Those of the micro-batches before."""
        return {"gradients": (self.config.grad_accum > 1) * FLOAT32 * self._trained()}

    def _teacher_bytes(self) -> int:
        """Of one of its numbers; a quantised teacher computes in its dtype too."""
        dtype = self.config.teacher_dtype
        return FLOAT32 if (self._precision() if dtype == "auto" else dtype) == "fp32" else HALF

    def _teacher_is_elsewhere(self) -> bool:
        return self.config.teacher_device == "cpu" and self.device.capability is not None

    def _teacher_weights(self) -> int:
        shape, size = self.teacher_shape, self._teacher_bytes()
        if self._teacher_is_elsewhere():  # but for its head
            return shape.vocab_size * shape.width * size
        bits = self.config.teacher_bits
        others = shape.parameters - shape.matrices
        return others * size + (shape.matrices * bits // 8 if bits else shape.matrices * size)

    def _teacher_states(self, batches: int = 1) -> dict[str, int]:
        """What its head takes, the outputs of its mapped blocks, and their queries and keys, taken to be as many."""
        config, shape = self.config, self.teacher_shape
        states = bool(config.kd_weight) + (self._pairs() or bool(config.contrastive_weight))
        channels = states * shape.width + bool(config.attention_weight) * 2 * self.student.depth * shape.attention_width
        return {"teacher's states": batches * self._tokens() * channels * self._teacher_bytes()}

    def _compared_states(self) -> dict[str, int]:
        """Copies of both models' states: with two tokenizers at the positions compared, and where widths differ
        projected, from a copy in the precision of the product.
        """
        width, teacher_width = self.student.width, self.teacher_shape.width
        both = FLOAT32 * width + self._teacher_bytes() * teacher_width
        copies = self.two_tokenizers * both * (bool(self.config.kd_weight) + self._pairs())
        if width != teacher_width:
            each = HALF * (width + teacher_width) if self._is_half() else FLOAT32 * teacher_width
            copies += self._projections() * each
        return {"states compared": copies * self._tokens()}

    @cached_property
    def _kept(self) -> int:
        """What the student keeps without gradient checkpointing."""
        config = self.config
        masks = config.packing == "documents"
        return kept_bytes(self.student_config, config.batch_size, config.seq_len, half=self._is_half(), masks=masks)

    def _kept_at_loss(self) -> int:
        if not self.config.gradient_checkpointing:
            return self._kept
        return (self.student.depth + 1) * self._tokens() * self.student.width * FLOAT32

    def _inside_block(self) -> int:
        return BACKWARD_WIDEST * self._tokens() * self.student.widest * (HALF if self._is_half() else FLOAT32)

    def _loss_buffers(self) -> tuple[int, int, int]:
        """A chunk; gradients of hidden states and head; heads cast to another precision: bytes of each.

        With two tokenizers two losses have their turns, and each keeps its gradients.
        """
        config, vocab = self.config, self.student.vocab_size
        parts = []
        if config.lm_weight or (config.kd_weight and not self.two_tokenizers):
            parts.append((self.chunk_of_logits()[1], self._cast_heads()))
        if config.kd_weight and self.two_tokenizers:
            parts.append(self._cross_vocab_loss())
        gradients = FLOAT32 * self.student.width * (self._tokens() + vocab)
        chunks, casts = zip(*parts, strict=True) if parts else ((0,), (0,))
        return max(chunks), len(parts) * gradients, max(casts)

    def chunk_of_logits(self) -> tuple[int, int]:
        """How many tokens `linear_softmax_kl` takes at a time, all of them counting, and the bytes it has for them."""
        vocab, tokens = self.student.vocab_size, self._tokens()
        token = FLOAT32 * (vocab + self._fused_teacher_vocab()) + self._is_half() * HALF * vocab
        of_states = self._chunk_states()
        if self.device.capability is not None:
            tokens = min(tokens, gpu_chunk_rows(self.device.capability))
            return tokens, tokens * (token + of_states)
        cpu, scratch = torch.device("cpu"), RESULTS * FLOAT32 * vocab
        most, block = chunk_and_block(None, token, scratch, block_rows(vocab, torch.float32, cpu), cpu)
        tokens = min(tokens, most)
        return tokens, tokens * (token + of_states) + min(tokens, block) * scratch

    def _chunk_states(self) -> int:
        """Bytes of a token's hidden states, which are copied, and of the gradient of the student's."""
        width = self.student.width
        copies = width + self.teacher_shape.width * bool(self._fused_teacher_vocab())
        return (HALF if self._is_half() else FLOAT32) * copies + FLOAT32 * width

    def _cast_heads(self) -> int:
        """Bytes of both heads in the precision of the products of `linear_softmax_kl`."""
        cast = self.student.vocab_size * self.student.width
        if self._teacher_bytes() == FLOAT32:
            cast += self._fused_teacher_vocab() * self.teacher_shape.width
        return self._is_half() * HALF * cast

    def _fused_teacher_vocab(self) -> int:
        """Of the logits that `linear_softmax_kl` makes of the teacher, if it does."""
        return self.teacher_shape.vocab_size if self.config.kd_weight and not self.two_tokenizers else 0

    def _cross_vocab_loss(self) -> tuple[int, int]:
        """The same in `linear_cross_vocab_kl`, which computes in float32."""
        buffers = SORTED_BUFFERS if self.config.cross_vocab == "sorted" else SHARED_BUFFERS
        token = buffers * FLOAT32 * (self.student.vocab_size + self.teacher_shape.vocab_size)
        tokens = max(1, MAX_CHUNK_BYTES // token)
        cast = self.teacher_shape.vocab_size * self.teacher_shape.width if self._teacher_bytes() == HALF else 0
        return min(self._tokens(), tokens) * token, FLOAT32 * cast
