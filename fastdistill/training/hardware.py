"""What this machine has, as PyTorch and nvidia-smi see it. Needs nothing but torch."""

from __future__ import annotations

import os
import subprocess
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdistill.training.wheels import Capability

SMI_SECONDS = 20
NVIDIA_ON_PCI, DISPLAY_ON_PCI = "0x10de", "0x03"


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes; what nvidia-smi alone sees has neither free memory nor a number of multiprocessors."""

    name: str
    capability: Capability | None
    total: int | None = None
    free: int | None = None
    multiprocessors: int | None = None


@dataclass(frozen=True)
class Smi:
    """What nvidia-smi says: `error` where it says nothing good, `is_there` whether it is installed."""

    is_there: bool
    error: str | None = None
    driver: str | None = None
    gpus: tuple[Gpu, ...] = ()

    @property
    def branch(self) -> int | None:
        """550 of driver 550.54.15."""
        return int(self.driver.split(".")[0]) if self.driver else None


def nvidia_smi() -> Smi:
    """Driver and GPUs; drivers before 510 do not tell a GPU's capability."""
    error = ""
    for fields in ("driver_version,name,compute_cap", "driver_version,name"):
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS)
        except FileNotFoundError:
            return Smi(is_there=False)
        except (OSError, subprocess.SubprocessError) as failure:
            return Smi(is_there=True, error=" ".join(str(failure).split()))
        rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and rows:
            gpus = tuple(Gpu(row[1], _capability(row[2]) if len(row) > 2 else None) for row in rows)
            return Smi(is_there=True, driver=rows[0][0], gpus=gpus)
        error = " ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}"
    return Smi(is_there=True, error=error)


def _capability(text: str) -> Capability:
    major, minor = text.split(".")
    return int(major), int(minor)


def visible_gpus() -> list[Gpu]:
    """Those that PyTorch sees, in its order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of GPUs that this build does not serve: doctor says that itself
        if not torch.cuda.is_available():
            return []
        gpus = []
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            try:
                free, _ = torch.cuda.mem_get_info(index)
            except RuntimeError:  # other programs have left too little to begin with
                free = 0
            capability = about.major, about.minor
            gpus.append(Gpu(about.name, capability, about.total_memory, free, about.multi_processor_count))
        return gpus


def nvidia_on_the_bus(devices: Path = Path("/sys/bus/pci/devices")) -> bool:
    """Whether Linux sees an NVIDIA GPU on the PCI bus, with a driver or without one."""

    def says(device: Path, name: str, start: str) -> bool:
        return (device / name).is_file() and (device / name).read_text().startswith(start)

    return devices.is_dir() and any(
        says(device, "vendor", NVIDIA_ON_PCI) and says(device, "class", DISPLAY_ON_PCI) for device in devices.iterdir()
    )


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_memory() -> tuple[int | None, int | None]:
    """Bytes that are free for a new program and in all, on Linux; within a container, as its limit leaves them."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return None, None
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no container, or "max"
        return free, total
    return min(free, max(0, limit - used)), min(total, limit)
