"""A student made of its teacher's layers: which ones to keep, and the model that they make."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastdistill import linear_softmax_kl, shift_targets
from fastdistill.training.config import Config, UsageError
from fastdistill.training.layer_map import LayerMap
from fastdistill.training.loading import load
from fastdistill.training.models import check_fit, evaluating, parts
from fastdistill.training.whole import write_file

_RULES = "every-other, first or first:N, importance or importance:N, or rising numbers like 0,2,5"

_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers")
"""Fields of a configuration that list numbers of layers, where others have one entry a layer."""

_MAY_DIFFER = {"layer_idx", "layer_id", "layer_number", "training", "gradient_checkpointing"}
"""Attributes of a block's modules that have no part in what it computes."""


def kept_layers(rule: str, depth: int, importance: Callable[[], Tensor] | None = None) -> list[int]:
    """0-based teacher layers that `--student-layers` asks for, in order. Where it gives no number, half, rounded up.

    Args:
        rule: "every-other", which counts down from the last and keeps it; "first" or "first:N"; "importance" or
            "importance:N"; or the numbers themselves, "0,2,5".
        depth: how many layers the teacher has.
        importance: gives one number a layer, as `layer_importance` does; called for that rule alone.

    Raises:
        UsageError: the rule is none of these, asks for layers that are not there, or for an importance not given.
    """
    if rule == "every-other":
        return list(range((depth - 1) % 2, depth, 2))
    if named := re.fullmatch(r"(first|importance)(?::(\d+))?", rule):
        count = int(named[2]) if named[2] else (depth + 1) // 2
        if not 1 <= count <= depth:
            raise UsageError(f"--student-layers {rule}: the teacher has {depth} layers to choose from")
        if named[1] == "first":
            return list(range(count))
        if importance is None:
            raise UsageError(f"--student-layers {rule}: importance is measured on text, and there is none")
        return sorted(importance().topk(count).indices.tolist())
    if not re.fullmatch(r"\d+(,\d+)*", rule):
        raise UsageError(f"--student-layers must be {_RULES}, got {rule!r}")
    layers = [int(number) for number in rule.split(",")]
    if layers != sorted(set(layers)) or layers[-1] >= depth:
        raise UsageError(f"--student-layers must rise within the teacher's layers 0 to {depth - 1}, got {rule!r}")
    return layers


@torch.no_grad()
def layer_importance(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """How much worse the model predicts text when one layer is left out, its output being its input.

    Args:
        model: any that `parts` takes. It is run once whole and once a layer, without dropout and without gradients.
        ids: text `[B, S]`; a few hundred tokens tell the layers apart.

    Returns:
        fp32 `[L]` on the CPU: mean next-token cross-entropy without that layer, less that of the whole model, in nats.
    """
    own = parts(model)
    ids = ids.to(model.device)
    targets = shift_targets(ids)

    def loss() -> float:
        hidden = own.base(input_ids=ids, use_cache=False).last_hidden_state
        out = linear_softmax_kl(
            hidden, own.head.weight, None, None, targets, student_bias=own.head.bias, kl_weight=0.0, ce_weight=1.0
        )
        return float(out.loss)

    def loss_without(block: nn.Module) -> float:
        handle = block.register_forward_hook(_left_out, with_kwargs=True)
        try:
            return loss()
        finally:
            handle.remove()

    with evaluating(model):
        whole = loss()
        return torch.tensor([loss_without(block) - whole for block in own.blocks])


def build_student(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of the teacher's kind made of its chosen layers, in float32; embeddings, final norm and head are copies.

    Raises:
        UsageError: the teacher's weights are quantised, or its layers depend on their number in a way that its
            configuration cannot say of the chosen ones: the student would be another model when loaded again.
    """
    if getattr(teacher.config, "quantization_config", None) is not None:
        raise UsageError(
            f"{type(teacher).__name__}: a student cannot be made of quantised layers: load the teacher without "
            "quantisation, or name a --student"
        )
    student = AutoModelForCausalLM.from_config(_config_of_layers(teacher, layers), dtype=torch.float32)
    blocks = parts(teacher).blocks
    prefix = next(name for name, module in teacher.named_modules() if module is blocks) + "."
    new_index = {old: new for new, old in enumerate(layers)}
    weights = {}
    for name, weight in teacher.state_dict().items():
        if name.startswith(prefix):
            old, rest = name.removeprefix(prefix).split(".", 1)
            if int(old) not in new_index:
                continue
            name = f"{prefix}{new_index[int(old)]}.{rest}"
        weights[name] = weight
    try:
        student.load_state_dict(weights)
    except RuntimeError as error:
        raise _depends_on_number(teacher, layers, str(error).splitlines()[-1].strip()) from error
    for old, new in zip(layers, parts(student).blocks, strict=True):
        _check_same_block(teacher, layers, blocks[old], new)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


def _config_of_layers(teacher: PreTrainedModel, layers: Sequence[int]) -> Any:
    """The teacher's configuration with what it says of each layer said of the chosen ones."""
    config = copy.deepcopy(teacher.config)
    text_config = config.get_text_config()
    depth = text_config.num_hidden_layers
    for key, value in vars(text_config).items():
        if not isinstance(value, list) or "token" in key:
            continue
        if key in _LAYER_NUMBERS:
            setattr(text_config, key, [new for new, old in enumerate(layers) if old in value])
        elif len(value) == depth:  # one entry a layer, `layer_types` for one
            setattr(text_config, key, [value[i] for i in layers])
    text_config.num_hidden_layers = len(layers)
    return config


def _check_same_block(teacher: PreTrainedModel, layers: Sequence[int], old: nn.Module, new: nn.Module) -> None:
    """All that two blocks hold beside tensors must agree, but for their number: windows, kinds of attention, scales."""
    for (path, ours), (_, theirs) in zip(new.named_modules(), old.named_modules(), strict=True):
        for key, value in vars(ours).items():
            if key in _MAY_DIFFER or key.startswith("_") or not isinstance(value, bool | int | float | str | None):
                continue
            expected = vars(theirs).get(key)
            if value != expected:
                raise _depends_on_number(teacher, layers, f"{path}.{key} would be {value!r} for {expected!r}")


def _depends_on_number(teacher: PreTrainedModel, layers: Sequence[int], what: str) -> UsageError:
    return UsageError(
        f"{type(teacher).__name__}: its layers depend on their number, so {','.join(map(str, layers))} cannot make a "
        f"student ({what}): choose others, or name a --student"
    )


def _left_out(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor | tuple) -> Tensor | tuple:
    states = args[0] if args else kwargs["hidden_states"]
    return (states, *output[1:]) if isinstance(output, tuple) else states


def obtain_student(
    config: Config, teacher: PreTrainedModel, text: Callable[[], Tensor], layers_file: Path
) -> tuple[PreTrainedModel, LayerMap]:
    """The student that `config` names, and which of its blocks are compared with which of the teacher's.

    Which layers it is made of is settled once a run, by `text()` `[B, S]` if text decides, and kept in `layers_file`:
    a run that is resumed has the student that it began with.
    """
    if config.student:
        student, layers = load(config.student)[0], None
    else:
        if not layers_file.exists():
            depth = len(parts(teacher).blocks)
            layers = kept_layers(config.student_layers, depth, lambda: layer_importance(teacher, text()))
            write_file(layers_file, json.dumps(layers))
        layers = json.loads(layers_file.read_text())
        student = build_student(teacher, layers)
    check_fit(student, config, "student")
    return student, LayerMap.between(config.layer_map, student, teacher, made_of=layers)
