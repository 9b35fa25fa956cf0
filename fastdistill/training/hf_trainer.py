"""DistillationTrainer: the losses of train.py inside transformers' Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from fastdistill.align import shift_targets
from fastdistill.training.blocks import IGNORED, Batch, Inputs
from fastdistill.training.config import Config, UsageError
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.models import context_length
from fastdistill.training.objective import DistillationModule
from fastdistill.training.pairing import ONE_TOKENIZER
from fastdistill.training.teacher import Teacher
from fastdistill.training.window import Counts, Losses


class DistillationTrainer(Trainer):
    """A Trainer whose `model`, the student, learns from a frozen `teacher`, and which never holds the logits.

    The loss of an optimizer step is that of train.py, `kd_weight T^2 KL + lm_weight CE + layerwise_weight distance`:
    sums over the tokens of the whole accumulation window, divided by their number. A token counts if its label is not
    -100 and neither it nor the one before it, from which it is predicted, is padding. Beside `loss` the log has each
    component, unweighted: `kd_loss` (with its T^2), `lm_loss` and `layerwise_loss`.

    Batches have `input_ids` and `labels`, `[B, S]`, labels not shifted, as DataCollatorForLanguageModeling makes them,
    and may have `attention_mask`, for padding on either side, and `position_ids`. Both models read the same ids, so
    both must be of one tokenizer; of two heads of unlike size the ids are compared that both have.
    Without `position_ids` each model counts positions in its own way: one with learned positions counts padding on the
    left, as it does in Trainer.

    Evaluation reports means over every counted token, in nats: `eval_loss`, the cross-entropy alone, so that its exp
    is the perplexity; `eval_kl`, KL(teacher || student) at temperature 1; and `eval_top1_agreement`. There are no
    predictions: `predict` gives metrics alone.

    The student is saved, and only the student, as any model of transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments | None = None,
        *,
        teacher: PreTrainedModel,
        kd_weight: float = Config.kd_weight,
        lm_weight: float = Config.lm_weight,
        layerwise_weight: float = Config.layerwise_weight,
        layerwise_loss: str = Config.layerwise_loss,
        layerwise_skip_first: int = Config.layerwise_skip_first,
        layer_map: str = Config.layer_map,
        temperature: float = Config.temperature,
        divergence: str = Config.divergence,
        **others: Any,
    ):
        """Settings are those of train.py's flags, and `others` those of Trainer.

        Args:
            model: the student, with a plain linear head.
            teacher: is frozen in place, set to evaluation mode and moved to the student's device. It computes in its
                own dtype.
            kd_weight, lm_weight, layerwise_weight: of the three components; one of weight 0 is not computed.
            layerwise_loss: "layer_norm", "teacher_rms", "cosine" or "raw", as `LayerwiseLoss` says.
            layerwise_skip_first: how many first positions of each text are left out of the layerwise loss.
            layer_map: "uniform", which "auto" is here, "last", "skip" or pairs as "0:1,-1:-1", as `layer_pairs` says.
            temperature: T > 0 of both softmaxes in the divergence.
            divergence: "forward_kl", "reverse_kl" or "jsd".

        Raises:
            ValueError: for a setting that is out of range, a model whose logits are not those of a linear head, a
                layerwise loss between unlike widths (the projection would have to be trained and saved beside the
                student, as train.py does), or an argument of Trainer that does not go with these losses.
        """
        for name, given in (("model", model), ("teacher", teacher)):
            if not isinstance(given, PreTrainedModel):
                raise ValueError(f"{name} must be a PreTrainedModel, got {type(given).__name__}")
        if teacher is model:
            raise ValueError("teacher must be another model than the student, got the same one")
        for name in ("model_init", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
            if others.get(name) is not None:
                raise ValueError(f"{name} must be None, got {others[name]}: the loss is fixed and there are no logits")
        with _flags_as_arguments():
            config = Config(
                kd_weight=kd_weight,
                lm_weight=lm_weight,
                layerwise_weight=layerwise_weight,
                layerwise_loss=layerwise_loss,
                layerwise_skip_first=layerwise_skip_first,
                layer_map=layer_map,
                temperature=temperature,
                divergence=divergence,
                seq_len=context_length(model),
            )
        super().__init__(model, args, **others)
        self._check_arguments(layerwise_weight != 0)
        if teacher.device != self.args.device:
            nn.Module.to(teacher, self.args.device)
        with _flags_as_arguments():
            mapped = LayerMap.between(layer_map, model, teacher, None)
            if layerwise_weight and mapped.widths[0] != mapped.widths[1]:
                raise ValueError(
                    "layerwise_weight must be 0 where student and teacher differ in width, got "
                    f"{layerwise_weight} with widths {mapped.widths}: train.py learns the projection between them"
                )
            self.teacher = Teacher(teacher)
            self.module = DistillationModule.of(config, model, teacher, mapped, ONE_TOKENIZER)
        self.model_accepts_loss_kwargs = True  # no division by the number of micro-batches: the window's counts divide
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._evaluated: list[Tensor] = []

    def _check_arguments(self, layerwise: bool) -> None:
        """Raise `ValueError` for a training argument that would do something else than it says, or nothing."""
        args, checkpointing = self.args, self.args.gradient_checkpointing_kwargs
        reentrant = isinstance(checkpointing, dict) and checkpointing.get("use_reentrant")
        refused = [
            ("label_smoothing_factor", args.label_smoothing_factor, "0", "the targets are the ids alone"),
            ("torch_compile", args.torch_compile, "False", "the loss takes the place of the model's forward"),
            ("fsdp", self.is_fsdp_enabled, "off", "the losses need the head's weights whole"),
            ("deepspeed", self.is_deepspeed_enabled, "off", "the losses need the head's weights whole"),
            ("n_gpu", args.n_gpu > 1 and args.n_gpu, "at most 1", "start one process a GPU, with torchrun"),
            ("use_reentrant", layerwise and reentrant, "False", "it cuts the layerwise loss off from the blocks"),
        ]
        for name, got, expected, why in refused:
            if got:
                raise ValueError(f"{name} must be {expected}, got {got}: {why}")

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; what an earlier run left unlogged is forgotten."""
        self._sums, self._steps = {}, 0
        return super().train(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Counts | None]:
        """The micro-batches of an optimizer step, and in place of `num_items_in_batch` what divides their losses.

        Trainer's own count is of labels, of which, depending on its version, the first of a row may be one; these are
        of what is predicted and of what is compared. Over processes they are added up if
        `average_tokens_across_devices`.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not samples:
            return samples, None
        self._steps += 1
        counts = self.module.count([self._batch(inputs) for inputs in samples])
        values: Any = torch.stack([*counts.values()]).to(device)
        if self.args.average_tokens_across_devices:
            values = self.accelerator.reduce(values, "sum")
        return samples, dict(zip(counts, values.unbind(), strict=True))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Counts | None = None,
    ) -> Tensor | tuple[Tensor, Losses]:
        """The batch's share of its window's loss; `num_items_in_batch` as `get_batch_samples` gives it, by default the
        counts of the batch alone. The outputs are its `Losses`.
        """
        batch = self._batch(inputs)
        counts = num_items_in_batch or self.module.count([batch])
        states = self.teacher(batch.teacher, self.module.of_teacher) if self.module.needs_teacher else None
        # Called through whatever wraps the student, so that DDP sees the forward pass and averages its gradients.
        with _forward_replaced(self.module.student, self.module.forward), self.accelerator.autocast():
            losses = model(batch, states, counts)
        # DDP takes the mean over processes of what is to be their sum.
        share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        for name, value in losses.raw.items():
            self._sums[name] = self._sums.get(name, 0) + value * share
        total = losses.total * share
        return (total, losses) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds to a line that has the loss the components' means over the optimizer steps since the last such line."""
        if "loss" in logs and self._sums:
            sums = torch.stack(list(self._sums.values()))
            of_all: Any = self.accelerator.gather(sums)
            means = (of_all.view(-1, len(sums)).mean(0) / self._steps).tolist()
            logs.update({f"{name}_loss": mean for name, mean in zip(self._sums, means, strict=True)})
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's, with means over tokens in place of its mean over batches.

        Raises:
            ValueError: no token is predicted in the whole data set.
        """
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        loss, kl, top1, tokens = torch.cat(self._evaluated).cpu().double().sum(0).tolist()
        if not tokens:
            raise ValueError(f"{description}: the data set must have tokens to predict, got none among its labels")
        means = {"loss": loss / tokens, "kl": kl / tokens, "top1_agreement": top1 / tokens}
        metrics = (output.metrics or {}) | {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics=metrics)

    @torch.no_grad()
    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Keeps sums by row, of cross-entropy, KL, agreement and tokens, for `evaluation_loop`.

        By row, since with several processes the last batch is filled up with rows that are not to count.
        """
        batch = self._batch(self._prepare_inputs(inputs))
        states, base = self.teacher(batch.teacher), self.module.parts[0].base
        with self.accelerator.autocast():
            hidden = base(**batch.student.fed(), use_cache=False).last_hidden_state
            how = {"kl_weight": 0.0, "ce_weight": 1.0, "reduction": "none", "metrics": True}
            out = self.module.linear_loss(hidden, batch, states, **how)
        terms = [out.ce, out.kl, out.top1_agreement, (batch.targets != IGNORED).float()]
        rows = torch.stack([term.sum(1) for term in terms if term is not None], 1)
        gathered: Any = self.accelerator.gather_for_metrics(rows)
        self._evaluated.append(gathered)
        return None, None, None

    def _batch(self, inputs: Mapping[str, Any]) -> Batch:
        """A batch of Trainer's as the losses read it.

        Raises:
            ValueError: ids or labels are missing, something is there that neither model would read, or an id is beyond
                the smaller of the two vocabularies.
        """
        if not {"input_ids", "labels"} <= inputs.keys() <= {"input_ids", "labels", "attention_mask", "position_ids"}:
            raise ValueError(
                "a batch must have input_ids and labels, and may have attention_mask and position_ids, "
                f"got {', '.join(sorted(inputs))}"
            )
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        smaller = min(len(self.module.parts[0].head.weight), len(self.teacher.weight))
        for name in ("input_ids", "labels"):
            highest = int(inputs[name].max())
            if highest >= smaller:
                raise ValueError(
                    f"{name} must be below {smaller}, the smaller of the two vocabularies, got {highest}: student and "
                    "teacher must be of one tokenizer"
                )
        read = Inputs(ids, inputs.get("position_ids"), mask)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
        return Batch(read, real, shift_targets(inputs["labels"], mask), read, None)


@contextmanager
def _forward_replaced(model: nn.Module, forward: Callable) -> Iterator[None]:
    """While it lasts, a call of `model`, by itself or by what wraps it, is a call of `forward`."""
    own = vars(model).get("forward")  # of the instance: accelerate's, with autocast
    model.forward = forward
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


@contextmanager
def _flags_as_arguments() -> Iterator[None]:
    """Turns train.py's errors, which name flags, into ValueErrors that name arguments."""
    try:
        yield
    except UsageError as error:
        message = re.sub(r"--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(error))
        raise ValueError(message) from error
