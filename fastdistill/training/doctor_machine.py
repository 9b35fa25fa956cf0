"""What doctor says of the machine: versions, driver, GPUs, and whether this build of PyTorch serves them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import torch

from fastdistill.training import hardware
from fastdistill.training.finding import FAULT, GOOD, NOTE, Finding
from fastdistill.training.hardware import Gpu, Smi
from fastdistill.training.wheels import FIRST_DRIVER, TURING, driver_line, install_line, is_served

PACKAGES = ("triton", "transformers", "accelerate", "datasets")


def software() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield Finding(GOOD, "python", f"{platform.python_version()}, {system}")
    made_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    built = f"built {made_for}{': ' if torch.cuda.get_arch_list() else ''}{' '.join(torch.cuda.get_arch_list())}"
    yield Finding(GOOD, "torch", f"{torch.__version__}, {built}")
    versions = {name: _version(name) for name in PACKAGES}
    text = ", ".join(f"{name} {version or 'is not installed'}" for name, version in versions.items())
    yield Finding(GOOD if all(versions.values()) else NOTE, "packages", text, numbers=versions)
    free, total = hardware.cpu_memory()
    memory = f"{gigabytes(free)} of {gigabytes(total)} GB of memory free" if free and total else "memory unknown"
    text = f"cores: {hardware.cores()}, PyTorch's threads: {torch.get_num_threads()}, {memory}"
    yield Finding(GOOD, "cpu", text, numbers={"free_bytes": free, "total_bytes": total})


def graphics(gpus: list[Gpu], smi: Smi) -> Iterator[Finding]:
    """Of the GPUs that PyTorch sees; or why it sees none."""
    if smi.driver:
        yield Finding(GOOD, "driver", f"NVIDIA {smi.driver}")
    elif smi.is_there:
        cure = "install NVIDIA's driver anew, or load it by a restart"
        text = f"nvidia-smi fails: {smi.error}"
        yield Finding(NOTE, "driver", text) if gpus else Finding(FAULT, "driver", text, cure)
    else:
        yield Finding(NOTE, "driver", "unknown: nvidia-smi is not there")
    if gpus:
        for index, gpu in enumerate(gpus):
            yield from _gpu(index, gpu, smi)
    else:
        yield _no_gpu(smi)
    if len(gpus) > 1:
        text = f"`torchrun --nproc-per-node {len(gpus)} train.py` uses all GPUs, `python train.py` the first"
        yield Finding(GOOD, "processes", text)


def _gpu(index: int, gpu: Gpu, smi: Smi) -> Iterator[Finding]:
    assert gpu.capability is not None
    major, minor = gpu.capability
    memory = f"{gigabytes(gpu.free)} of {gigabytes(gpu.total)} GB free"
    text = f"{gpu.name}, capability {major}.{minor}, {memory}, {gpu.multiprocessors} multiprocessors"
    numbers = {"name": gpu.name, "capability": gpu.capability, "free_bytes": gpu.free, "total_bytes": gpu.total}
    yield Finding(GOOD, f"gpu {index}", text, numbers=numbers)
    if torch.version.hip:
        yield Finding(NOTE, "wheel", "a ROCm build, on which fastdistill has never been tried")
        return
    if is_served(torch.cuda.get_arch_list(), gpu.capability):
        last = "; the last such builds are torch 2.14's for CUDA 12.6" if gpu.capability < TURING else ""
        yield Finding(GOOD, "wheel", f"this build of torch has code for sm_{major}{minor}{last}")
    else:
        text = f"this build of torch has no code for sm_{major}{minor}: {' '.join(torch.cuda.get_arch_list())}"
        yield Finding(FAULT, "wheel", text, install_line(gpu.capability, smi.branch))
    if major >= 8:
        yield Finding(GOOD, "bf16", "native")
    else:
        yield Finding(NOTE, "bf16", "emulated, so --precision auto takes fp16 with a gradient scaler")


def _no_gpu(smi: Smi) -> Finding:
    """Why there is none, and what changes that."""
    if not smi.gpus:
        if not smi.is_there and hardware.nvidia_on_the_bus():
            text = "an NVIDIA GPU is on the PCI bus, and no driver is here; the CPU serves"
            return Finding(NOTE, "gpu", text, "install NVIDIA's driver, or start the container with --gpus all")
        return Finding(NOTE, "gpu", "none that PyTorch sees; the CPU serves")
    gpu = smi.gpus[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden in ("", "-1"):
        return Finding(NOTE, "gpu", f"{gpu.name}, hidden by CUDA_VISIBLE_DEVICES={hidden!r}; the CPU serves")
    seen = f"{gpu.name}, which nvidia-smi sees and PyTorch does not: "
    if not torch.version.cuda:
        return Finding(FAULT, "gpu", f"{seen}this build of torch has no CUDA", install_line(gpu.capability, smi.branch))
    needed = FIRST_DRIVER.get(int(torch.version.cuda.split(".")[0]))
    if needed and smi.branch and smi.branch < needed:
        text = f"{seen}driver {smi.driver} is too old for CUDA {torch.version.cuda}, which needs {needed} or newer"
        can_stay = smi.branch >= FIRST_DRIVER[12] and "cu126" in install_line(gpu.capability, smi.branch)
        other = f", or keep it: {install_line(gpu.capability, smi.branch)}" if can_stay else ""
        return Finding(FAULT, "gpu", text, driver_line(gpu.capability) + other)
    return Finding(FAULT, "gpu", f"{seen}{_why_not()}", "restart the machine, or install its driver anew")


def _why_not() -> str:
    """What PyTorch says when it is to use a GPU."""
    try:
        torch.cuda.init()
    except Exception as error:  # whatever it says is the cause to name
        return " ".join(str(error).split())[:300]
    return "it says no cause"


def gigabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.1f}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
