"""The student as others load it: an ordinary model folder with tokenizer, generation settings and a model card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fastdistill.training.config import Config
from fastdistill.training.models import context_length
from fastdistill.training.report_markdown import table
from fastdistill.training.report_parts import recipe, retention
from fastdistill.training.results import Row
from fastdistill.training.whole import write_folder

SAMPLE_PROMPT = "The statement"


def model(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write model and tokenizer to the folder `path`, whole or not at all.

    Every process calls it, since sharded weights are gathered; the first writes.
    """
    gathered: dict[int, Any] = {}  # by identity: a tied weight stays one
    weights = student.state_dict(keep_vars=True)
    for value in weights.values():
        if id(value) not in gathered:
            gathered[id(value)] = value.full_tensor().cpu() if isinstance(value, DTensor) else value.detach()
    state = {name: gathered[id(value)] for name, value in weights.items()}

    def write(folder: Path) -> None:
        student.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)

    if PartialState().is_main_process:
        write_folder(path, write)


def student(trained: Path, path: Path, config: Config, rows: Sequence[Row]) -> None:
    """Copy the folder of a trained student to `path` and add its model card."""

    def write(folder: Path) -> None:
        shutil.copytree(trained, folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(_card(config, rows))

    write_folder(path, write)


def sample(path: Path, new_tokens: int = 40) -> str:
    """What the model in `path`, loaded by plain transformers, writes after a fixed prompt: greedily, in its context."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    student: Any = AutoModelForCausalLM.from_pretrained(path)
    prompt = tokenizer(SAMPLE_PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ids = student.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(new_tokens, context_length(student) - prompt.shape[1]),
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _card(config: Config, rows: Sequence[Row]) -> str:
    demo = config.teacher == "demo"
    teacher = "the demo's own, trained on the same text" if demo else f"`{config.teacher}` (its licence applies)"
    data = (
        "Python's language reference (`pydoc_data.topics`, PSF licence)"
        if config.data == "pydoc"
        else f"`{config.data}` (its licence applies)"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [fastdistill, distillation]
---
# A student distilled with fastdistill

- Teacher: {teacher}. Student: {config.student or f"the teacher's layers `{config.student_layers}`"}.
- Data: {data}, {config.data_share:.0%} of its training part to draw from; the held-out part was not trained on.
- Recipe: {recipe(config)}.
- These are the weights of the checkpoint with the lowest held-out loss, of seed {config.seed}. It was chosen on the
  same held-out text that the table reports.

{table(retention(rows))}

Limits: it knows what its teacher and its text taught it, and has not been tested for anything but the table. Licence:
that of the teacher and of the data; fastdistill itself sets none.
"""
