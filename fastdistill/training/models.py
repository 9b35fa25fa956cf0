"""Teacher and student: loaded or built, and taken apart into base, blocks and output head."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastdistill.training.config import MAY_CHANGE_ON_RESUME, Config, UsageError
from fastdistill.training.data import END_OF_TEXT

_NOT_OF_THE_TEACHER = MAY_CHANGE_ON_RESUME | {
    "student", "student_layers", "data", "data_share", "seeds", "baseline", "epochs", "temperature", "divergence",
    "eval_steps",
}  # fmt: skip
"""Fields of a demo teacher's recipe that leave its weights alone; its text is known by fingerprint."""


@dataclass(frozen=True)
class Parts:
    """A causal language model as the losses need it: logits = base(ids) @ head.weight.T + head.bias."""

    base: nn.Module
    blocks: nn.ModuleList
    head: nn.Linear


def parts(model: PreTrainedModel) -> Parts:
    """Base, transformer blocks and head of any model whose head is a plain linear map.

    Raises:
        UsageError: where there is no such structure, or where base and head do not give the model's own logits
            (soft-capped or scaled ones, say).
    """
    base, head = model.base_model, model.get_output_embeddings()
    depth = model.config.get_text_config().num_hidden_layers
    lists = [m for m in base.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if base is model or not lists or not isinstance(head, nn.Linear):
        raise UsageError(f"{type(model).__name__}: no base model, list of {depth} blocks and linear head found in it")
    probe = torch.arange(8, device=model.device)[None] % head.out_features
    with torch.no_grad(), _evaluating(model):
        own = model(input_ids=probe, use_cache=False).logits
        ours = head(base(input_ids=probe, use_cache=False).last_hidden_state)
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"{type(model).__name__}: its logits differ from head(hidden) by up to {(own - ours).abs().max():.3g}, so "
            "a loss on head and hidden states would be another model's"
        )
    return Parts(base, lists[0], head)


def context_length(model: PreTrainedModel) -> int:
    """How many positions the model can take."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", sys.maxsize)


def check_context(model: PreTrainedModel, seq_len: int, name: str) -> None:
    if seq_len > context_length(model):
        raise UsageError(f"--seq-len {seq_len} is more than the {context_length(model)} positions of the {name}")


@contextmanager
def captured_outputs(blocks: nn.ModuleList, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While it lasts, the output `[B, S, D]` of each chosen block, by index, from the latest forward pass."""
    outputs: dict[int, Tensor] = {}

    def keep(index: int):
        def hook(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            outputs[index] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [blocks[index].register_forward_hook(keep(index)) for index in indices]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in float32, and tokenizer from a folder or the hub. Weights that would be unpickled are refused."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError) as error:
        where = "the folder" if Path(name).is_dir() else "no such folder, and from the hub"
        raise UsageError(f"cannot load the model {name} ({where}): {str(error).splitlines()[0]}") from error
    return model, tokenizer


def demo_teacher(tokenizer: PreTrainedTokenizerBase, *, depth: int, width: int, seq_len: int) -> PreTrainedModel:
    """An untrained Llama of `depth` layers and `width` channels: tried beside a GPT-2 of this size, it learned markedly
    more in the same few hundred steps.
    """
    if width % 32:
        raise UsageError(f"--teacher-width must be a multiple of 32, the width of a head, got {width}")
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    assert isinstance(end, int)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=depth,
        num_attention_heads=width // 32, max_position_embeddings=seq_len, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def cached_teacher(recipe: Config, corpus_fingerprint: str) -> Path:
    """Where a demo teacher of this recipe and text is kept: below FASTDISTILL_CACHE, or the user's cache folder."""
    matters = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in _NOT_OF_THE_TEACHER}
    key = hashlib.sha256(json.dumps([matters, corpus_fingerprint], sort_keys=True).encode()).hexdigest()[:16]
    root = (
        os.environ.get("FASTDISTILL_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdistill"
    )
    return Path(root) / f"teacher-{key}"


def kept_layers(rule: str, depth: int) -> list[int]:
    """0-based teacher layers of `--student-layers`. "every-other" counts down from the last, which it keeps."""
    if rule == "every-other":
        return list(range((depth - 1) % 2, depth, 2))
    try:
        layers = [int(part) for part in rule.split(",")]
    except ValueError as error:
        raise UsageError(f"--student-layers must be every-other or numbers like 0,2,5, got {rule!r}") from error
    if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] >= depth:
        raise UsageError(f"--student-layers must rise within the teacher's layers 0 to {depth - 1}, got {rule!r}")
    return layers


def build_student(teacher: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of the teacher's kind made of its chosen layers; embeddings, final norm and head are copies."""
    config = copy.deepcopy(teacher.config)
    text_config = config.get_text_config()
    depth = text_config.num_hidden_layers
    for key, value in vars(text_config).items():
        if isinstance(value, list) and len(value) == depth:  # one entry a layer, `layer_types` for one
            setattr(text_config, key, [value[i] for i in layers])
    text_config.num_hidden_layers = len(layers)
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)

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
    student.load_state_dict(weights)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
