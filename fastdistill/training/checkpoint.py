"""Checkpoints that are whole or not there: safetensors and JSON, a manifest of hashes last, then a rename."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

MANIFEST = "manifest.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why."""


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    state: dict[str, Any],
) -> Path:
    """Write `folder/step-<step>`: everything that the run needs to go on exactly as if it had not stopped."""

    def write(path: Path) -> None:
        save_model(module, str(path / "model.safetensors"))
        save_file(_optimizer_tensors(module, optimizer), path / "optimizer.safetensors")
        save_file(_random_tensors(), path / "random.safetensors")
        everything = {
            "step": step,
            "python_random": random.getstate(),
            "scaler": scaler and scaler.state_dict(),
            **state,
        }
        (path / "state.json").write_text(json.dumps(everything))

    path = folder / f"step-{step:08d}"
    write_folder(path, write)
    return path


def load(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None
) -> dict[str, Any]:
    """Restore what `save` wrote to a checkpoint that is whole; returns `state` with `step`."""
    load_model(module, str(path / "model.safetensors"))
    stored = load_file(path / "optimizer.safetensors")
    names = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    for key, value in stored.items():
        name, field = key.rsplit("/", 1)
        optimizer.state[names[name]][field] = value.to(names[name].device)
    state = json.loads((path / "state.json").read_text())
    if scaler is not None:
        scaler.load_state_dict(state.pop("scaler"))
    version, numbers, gauss = state.pop("python_random")
    random.setstate((version, tuple(numbers), gauss))
    _restore_random(load_file(path / "random.safetensors"))
    return state


def latest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`; each damaged one is named through `warn` and passed over."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            warn(f"{error}; using the one before it")
        else:
            return path
    return None


def rotate(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for path in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(path)


def verify(path: Path) -> None:
    """Raise `CheckpointError` unless every file is there with the bytes that were written."""
    try:
        hashes = json.loads((path / MANIFEST).read_text())["sha256"]
        for name, expected in hashes.items():
            if _sha256(path / name) != expected:
                raise CheckpointError(f"checkpoint {path} is damaged: {name} does not match its hash")
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} is incomplete: {error.strerror}: {error.filename}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read") from error


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Make the folder `path` with the files that `write` puts into it, all at once: a reader sees all or nothing.

    The files go to a folder beside it first and to the disk, then a manifest of their hashes, then the name changes.
    A folder that is there already is replaced.
    """
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    (partial / MANIFEST).unlink(missing_ok=True)  # that of a folder whose files were copied
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    hashes = {str(file.relative_to(partial)): _sha256(file) for file in files}
    (partial / MANIFEST).write_text(json.dumps({"sha256": hashes}, indent=2))
    for file in (*files, partial / MANIFEST, partial):
        _sync(file)
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
    _sync(path.parent)


def is_whole(path: Path) -> bool:
    """Whether `path` is a folder that `write_folder` made, unharmed."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def copy_folder(source: Path, path: Path) -> None:
    """Copy the folder `source` to `path`, whole or not at all."""
    write_folder(path, lambda partial: shutil.copytree(source, partial, dirs_exist_ok=True))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees all of it or none; text as UTF-8."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync(partial)
    partial.rename(path)
    _sync(path.parent)


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, not by position; tied parameters have one name and stand once."""
    tensors = {}
    for name, parameter in module.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{field}"] = value.detach().contiguous()
    return tensors


def _random_tensors() -> dict[str, Tensor]:
    _, numbers, position, *_ = numpy.random.get_state(legacy=True)
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor(numbers.tolist() + [position]),  # pyright: ignore[reportAttributeAccessIssue]
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors


def _restore_random(tensors: dict[str, Tensor]) -> None:
    torch.set_rng_state(tensors["torch"])
    *numbers, position = tensors["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(numbers, dtype=numpy.uint32), position, 0, 0.0))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda{i}"], i)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
