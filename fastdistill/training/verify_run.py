"""A run in miniature, for the checks of `fastdistill verify`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fastdistill.training import checkpoint, engine
from fastdistill.training.averaged import AveragedWeights
from fastdistill.training.blocks import Block, Blocks, collate, cut
from fastdistill.training.config import Config
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.objective import DistillationModule
from fastdistill.training.pairing import ONE_TOKENIZER
from fastdistill.training.schedule import learning_rate
from fastdistill.training.teacher import Teacher
from fastdistill.training.tokens import Tokens
from fastdistill.training.walk import ShuffledWalk

CPU = torch.device("cpu")
VOCAB, STUDENT_BLOCKS, TEACHER_BLOCKS = 50, 2, 3
LENGTHS = (16, 5, 11, 8, 16, 3, 13, 6)
"""Of the documents, in tokens: unequal, so that padding and the mean of means would be seen."""

DOCUMENTS = torch.randint(VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(LENGTHS)

WEIGHTS = {"kd": 0.5, "lm": 0.3, "layerwise": 0.2}
RECIPE = Config(
    kd_weight=WEIGHTS["kd"], lm_weight=WEIGHTS["lm"], layerwise_weight=WEIGHTS["layerwise"], layerwise_skip_first=1,
    layer_map="0:1", temperature=2.0, lr=1e-2, max_steps=6, warmup_steps=2, batch_size=1, grad_accum=4, clip=0.1,
    packing="padded", ema_decay=0.9, seq_len=16,
)  # fmt: skip


class Run:
    """Of the parts that train.py is made of: a GPT-2 of two blocks learns from one of three."""

    def __init__(self, recipe: Config = RECIPE, *, dropout: float = 0.0, seed: int = 0):
        self.recipe, self.step = recipe, 0
        torch.manual_seed(100)
        teacher = small_model(TEACHER_BLOCKS, dropout)
        torch.manual_seed(seed)
        student = small_model(STUDENT_BLOCKS, dropout)
        layer_map = LayerMap.between(recipe.layer_map, student, teacher, None)
        self.teacher = Teacher(teacher)
        self.module = DistillationModule.of(recipe, student.train(), teacher, layer_map, ONE_TOKENIZER)
        self.optimizer = engine.make_optimizer(self.module, recipe)
        self.averaged = AveragedWeights(self.module, recipe.ema_decay)
        self.trained = checkpoint.Trained(self.module, self.optimizer, self.averaged, None)
        self.walk = ShuffledWalk(text(), "0")

    def window(self) -> list[Block]:
        """The rows of the next step."""
        size = self.recipe.batch_size * self.recipe.grad_accum
        return self.walk.take(self.step * size, size)

    def gradients(self, rows: list[Block]) -> float:
        """Forward and backward passes over micro-batches; the loss of the window."""
        size = self.recipe.batch_size
        batches = [collate(rows[i : i + size], CPU) for i in range(0, len(rows), size)]
        counts, loss = self.module.count(batches), 0.0
        for batch in batches:
            losses = self.module(batch, self.teacher(batch.teacher, self.module.of_teacher), counts)
            engine.backward(losses.total, 1, None)
            loss += losses.total.item()
        return loss

    def update(self) -> Tensor:
        """An optimizer step; the gradients' norm before it was clipped."""
        norm = engine.clip_gradients(self.module, self.optimizer, self.recipe.clip, None)
        engine.step_if_finite(self.optimizer, self.rate(), norm, None)
        self.step += 1
        self.averaged.update(self.step)
        return norm

    def rate(self) -> float:
        recipe = self.recipe
        how = {"peak": recipe.lr, "warmup_steps": recipe.warmup_steps, "shape": recipe.schedule}
        return learning_rate(self.step, total_steps=recipe.max_steps or 1, **how)

    def train(self, steps: int) -> list[float]:
        """So many steps; the loss of each."""
        losses = []
        for _ in range(steps):
            losses.append(self.gradients(self.window()))
            self.update()
        return losses

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.module.parameters()]

    def grads(self) -> list[Tensor]:
        """The gradient of each parameter."""
        return [p.grad.clone() for p in self.module.parameters() if p.grad is not None]

    def state(self) -> list[Tensor]:
        """All that training has changed."""
        adam = [value for p in self.module.parameters() for _, value in sorted(self.optimizer.state[p].items())]
        return [*self.weights(), *(value.clone() for value in adam), *(m.clone() for m in self.averaged.means.values())]


def small_model(blocks: int, dropout: float = 0.0) -> PreTrainedModel:
    made = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=blocks, n_head=2, bos_token_id=0, eos_token_id=0,
            embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout, initializer_range=0.2,
        )
    )  # fmt: skip
    made.loss_type = "ForCausalLM"  # which transformers takes for its loss anyhow, with a warning
    return made


def text() -> Blocks:
    """The documents as rows, one each."""
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    return cut((Tokens(torch.cat(DOCUMENTS).int(), starts, None, None),), 16, "padded")
