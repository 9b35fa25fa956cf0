"""A model and its tokenizer from a folder, the hub or a GGUF file, in the number format that is asked for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastdistill.training import gguf_file
from fastdistill.training.config import UsageError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(
    name: str, *, dtype: str = "fp32", bits: int | None = None, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, on `device`, and tokenizer. Code that comes with a model is not run, and no weights are unpickled.

    Args:
        name: a folder, a name on the hub, or the path of a `.gguf` file.
        dtype: "fp32", "bf16" or "fp16", of the weights and of the arithmetic.
        bits: 8 or 4 to keep the weights of linear layers, but the head, quantised by bitsandbytes (LLM.int8 or NF4).

    Raises:
        UsageError: says in one line what is missing and what to do.
    """
    if dtype not in DTYPES:
        raise UsageError(f"the dtype of a model must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if bits not in (None, 4, 8):
        raise UsageError(f"a model can be loaded in 4 or 8 bits, got {bits}")
    if bits and find_spec("bitsandbytes") is None:
        raise UsageError(f"loading {name} in {bits} bits is done by bitsandbytes: pip install bitsandbytes")
    if name.endswith(".gguf"):
        source = gguf_file.model_folder(Path(name), DTYPES[dtype])
    else:
        source = Path(name) if Path(name).is_dir() else name
        _check_folder(name)
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "use_safetensors": True, "trust_remote_code": False}
    if bits:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )  # fmt: skip
        options["device_map"] = {"": device}  # quantised weights stay where they are loaded
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"cannot load the model {name}: {_reason(error)}") from error
    return (model if bits else model.to(torch.device(device))), tokenizer


def _check_folder(name: str) -> None:
    """What a folder lacks is said here, in fewer words than by the library that would look for it on the hub."""
    path = Path(name)
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise UsageError(f"cannot load the model {name}: there is no such folder")
        return
    if not (path / "config.json").is_file():
        raise UsageError(f"cannot load the model {name}: the folder has no config.json, so it holds no model")
    if not any(path.glob("*.safetensors")):
        pickled = ", ".join(sorted(file.name for file in path.glob("*.bin")))
        raise UsageError(
            f"cannot load the model {name}: "
            + (
                f"its weights are pickled ({pickled}), and unpickling can run any code: save them as safetensors, with "
                "save_pretrained, where you trust them"
                if pickled
                else "the folder has no weights (*.safetensors)"
            )
        )


def _reason(error: Exception) -> str:
    """One line; the library's own errors of the hub are many, and wrapped."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return "its owner lets in only those who asked: ask on its page, then log in with `hf auth login`"
        if isinstance(cause, RepositoryNotFoundError):
            return "there is no such folder, and no such name on the hub (a private one needs `hf auth login`)"
        if isinstance(cause, LocalEntryNotFoundError):
            return (
                "there is no such folder, and the hub cannot be reached to look for the name there: give a folder, "
                "or download the model first with `hf download`"
            )
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())
