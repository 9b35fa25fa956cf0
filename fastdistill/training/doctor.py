"""`fastdistill doctor`: is this machine ready, and what will a preset take on it?

Facts about the machine need torch alone; those about a preset need the [train] extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

import fastdistill
from fastdistill.training import hardware
from fastdistill.training.config import UsageError
from fastdistill.training.doctor_kernels import kernels
from fastdistill.training.doctor_machine import graphics, software
from fastdistill.training.finding import FAULT, GOOD, NOTE, Finding
from fastdistill.training.presets import PRESETS

SETTINGS = {"batch_size": int, "grad_accum": int, "seq_len": int, "precision": str, "gradient_checkpointing": bool}
"""Settings of train.py that memory depends on, and that may change the preset here as they do there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastdistill doctor`."""
    parser.add_argument("--preset", choices=[*PRESETS], help="what is to be run (default: demo)")
    for name, kind in SETTINGS.items():
        flag, help = f"--{name.replace('_', '-')}", "as for train.py"
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=help)
        else:
            parser.add_argument(flag, type=kind, metavar=kind.__name__, help=help)
    parser.add_argument("--measure", action="store_true", help="run steps of random models of the preset's sizes")
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def main(options: argparse.Namespace) -> int:
    """0 if all is ready, 1 if something must be mended, 2 for settings that cannot be."""
    found = []
    try:
        if not options.json:
            print(f"fastdistill {fastdistill.__version__}")
        for finding in examine(options):
            found.append(finding)
            if not options.json:
                print(finding, flush=True)
    except UsageError as error:
        print(f"fastdistill doctor: {error}", file=sys.stderr)
        return 2
    faults = list(dict.fromkeys(finding.topic for finding in found if finding.mark == FAULT))
    if options.json:
        report = {"fastdistill": fastdistill.__version__, "ready": not faults}
        print(json.dumps({**report, "findings": [dataclasses.asdict(finding) for finding in found]}, indent=1))
    else:
        print(f"{FAULT} to mend: {', '.join(faults)}" if faults else f"{GOOD} ready")
    return 1 if faults else 0


def examine(options: argparse.Namespace) -> Iterator[Finding]:
    """All that there is to say, as it is found."""
    yield from software()
    gpus, is_served = hardware.visible_gpus(), True
    for finding in graphics(gpus, hardware.nvidia_smi()):
        is_served &= (finding.mark, finding.topic) != (FAULT, "wheel")
        yield finding
    if is_served:
        yield from kernels(torch.device("cuda", 0) if gpus else torch.device("cpu"))
    else:
        yield Finding(NOTE, "kernels", "not tried: this build of torch cannot compute on the GPU")
    changed: dict[str, Any] = {name: getattr(options, name) for name in SETTINGS}
    changed = {name: value for name, value in changed.items() if value is not None}
    try:
        of_preset = importlib.import_module("fastdistill.training.doctor_preset")
    except ImportError as error:
        mark = FAULT if options.preset or options.measure or changed else NOTE
        yield Finding(mark, "preset", f"train.py cannot run: {error}", "pip install 'fastdistill[train]'")
        return
    preset = options.preset or "demo"
    yield from of_preset.plan(preset, changed, gpus[0] if gpus else None, is_served=is_served, measure=options.measure)
