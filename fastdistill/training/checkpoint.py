"""Checkpoints: everything that a run needs to go on exactly as if it had not stopped, as safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from fastdistill.training import random_state
from fastdistill.training.averaged import AveragedWeights
from fastdistill.training.guard import TrainingFault
from fastdistill.training.whole import DamagedError, verify, write_folder

FILES = ("model.safetensors", "optimizer.safetensors", "averaged.safetensors", "random.safetensors", "state.json")


@dataclass(frozen=True)
class Trained:
    """All that training changes, beside the generators and the caller's own counters."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    averaged: AveragedWeights
    scaler: torch.amp.GradScaler | None

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """File, name and live tensor of each; a tied one once. Optimizer state goes by the parameter's name."""
        seen = set()
        for name, value in self.module.state_dict(keep_vars=True).items():
            if id(value) not in seen:
                seen.add(id(value))
                yield "model", name, value
        for name, parameter in self.module.named_parameters():
            for field, value in self.optimizer.state.get(parameter, {}).items():
                yield "optimizer", f"{name}/{field}", value
        for name, value in self.averaged.means.items():
            yield "averaged", name, value


def save(
    folder: Path,
    step: int,
    trained: Trained,
    state: dict[str, Any],
    generators: dict[str, Tensor] | None = None,
) -> None:
    """Write `folder/step-<step>`. Every process calls it, since shards are gathered; the first writes.

    `generators` are the random generators' if not as they are now; `state` is JSON.

    Raises:
        TrainingFault: it could not be written (a full disk, say). What was there before is as it was.
    """
    processes = PartialState()
    files: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "averaged": {}, "random": {}}
    for file, name, value in trained.tensors():
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if processes.is_main_process:
            files[file][name] = whole.detach().contiguous().cpu()
    for rank, own in enumerate(gather_object([generators or random_state.capture()])):
        files["random"] |= {f"{rank}/{name}": value for name, value in own.items()}
    if not processes.is_main_process:
        return
    scaler = trained.scaler and trained.scaler.state_dict()

    def write(path: Path) -> None:
        for name, tensors in files.items():
            save_file(tensors, path / f"{name}.safetensors")
        (path / "state.json").write_text(
            json.dumps({"processes": processes.num_processes, "scaler": scaler, **state, "step": step})
        )

    try:
        write_folder(folder / f"step-{step:08d}", write)
    except (OSError, SafetensorError) as error:
        kept = sorted(path.name for path in folder.glob("step-*"))
        last = f"the last good one is {folder / kept[-1]}" if kept else "there is none before it"
        raise TrainingFault(f"the checkpoint of step {step} could not be written ({error}); {last}", []) from error


def load(path: Path, trained: Trained) -> dict[str, Any]:
    """Restore what `save` wrote to a checkpoint that is whole, random generators included; returns `state` with `step`.

    Raises:
        TrainingFault: it is of another student, or of another number of processes.
    """
    state = json.loads((path / "state.json").read_text())
    processes = PartialState()
    if state["processes"] != processes.num_processes:
        raise TrainingFault(
            f"checkpoint {path} is of {state['processes']} processes, and there are {processes.num_processes}: launch "
            "as many"
        )
    stored = {name: load_file(path / f"{name}.safetensors") for name in ("model", "optimizer", "averaged", "random")}
    for name, parameter in trained.module.named_parameters():
        for field in (key.rsplit("/", 1)[1] for key in stored["optimizer"] if key.rsplit("/", 1)[0] == name):
            like = parameter if field != "step" else torch.zeros((), device=parameter.device)
            trained.optimizer.state[parameter][field] = torch.zeros_like(like, requires_grad=False)
    live = {(file, name): value for file, name, value in trained.tensors()}
    found = {(file, name) for file in ("model", "optimizer", "averaged") for name in stored[file]}
    if odd := sorted(found ^ live.keys()):
        raise TrainingFault(f"checkpoint {path} is of another model: {odd[0][1]} is in one of them alone")
    with torch.no_grad():
        for (file, name), value in live.items():
            whole = stored[file][name]
            if whole.shape != value.shape:
                raise TrainingFault(
                    f"checkpoint {path} is of another model: {name} is {list(whole.shape)} there and "
                    f"{list(value.shape)} here"
                )
            if isinstance(value, DTensor):
                whole = distribute_tensor(whole.to(value.device), value.device_mesh, value.placements)
            value.copy_(whole)
    if trained.scaler is not None:
        trained.scaler.load_state_dict(state["scaler"])
    own = f"{processes.process_index}/"
    random_state.restore({k.removeprefix(own): v for k, v in stored["random"].items() if k.startswith(own)})
    return state


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, None where none was ever written; and what is to be said of newer ones.

    Those are damaged. They are set aside, so that they are neither deleted nor counted among those that are kept.

    Raises:
        TrainingFault: all are damaged.
    """
    said: list[str] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            verify(path, FILES)
        except DamagedError as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            said.append(f"checkpoint {error}; it is now {aside.name}, and the one before it is used")
        else:
            return path, said
    if said:
        raise TrainingFault(f"{said[0].split(';')[0]}, and so is each before it: move {folder} away to begin anew")
    return None, said


def rotate(folder: Path, keep: int) -> list[dict[str, Any]]:
    """Delete all but the newest `keep` checkpoints; the state of each that stays."""
    paths = sorted(folder.glob("step-*"))
    for path in paths[:-keep]:
        shutil.rmtree(path)
    return [json.loads((path / "state.json").read_text()) for path in paths[-keep:]]
