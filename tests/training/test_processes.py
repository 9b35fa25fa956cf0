"""train.py in two processes: the run of one process with the same global batch, saved and gone on with as that is."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
STAGE = Path("seed-0/distilled")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")


@pytest.fixture
def launch(arguments, tmp_path):
    """train.py in so many processes, of one thread each."""

    def call(name: str, processes: int, **flags: object) -> Path:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*(launcher if processes > 1 else [sys.executable]), "train.py", *arguments(name, **flags)]
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / name

    return call


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / STAGE / "last" / "model.safetensors")


def difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in a))


def test_two_processes_are_one_with_their_global_batch(launch, records, smooth_teacher):
    one = launch("one", 1, teacher=smooth_teacher, grad_accum=2)
    two = launch("two", 2, teacher=smooth_teacher)
    assert difference(one, two) == 0.0  # two addends have one sum, in either order
    logs = [records(run / STAGE / "log.jsonl") for run in (one, two)]
    assert [(r["event"], r["step"]) for r in logs[0]] == [(r["event"], r["step"]) for r in logs[1]]
    for a, b in zip(*logs, strict=True):
        for name in ("total", "gradient_norm", "loss", "kl", "top1_agreement"):
            assert (name in a) == (name in b)
            assert name not in a or a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7)
        assert a.get("tokens") == b.get("tokens")
    assert "2 processes" in (two / "teacher.json").read_text()


COMPONENTS = {
    "attention_weight": 0.1, "attention_alignment_weight": 0.1, "routing_feature_weight": 0.1,
    "contrastive_weight": 0.1, "curriculum": "founding", "layer_map": "0:0,0:1,1:2,1:3",
}  # fmt: skip


@pytest.mark.parametrize("how", [{"balance": "gradient", "balance_steps": 2}, {"shard": True}], ids=["DDP", "FSDP2"])
def test_components_that_begin_later_are_the_same_in_two_processes(launch, records, smooth_teacher, how):
    """The micro-batches are the same, and so are the means over them."""
    alone = {name: value for name, value in how.items() if name != "shard"}
    one = launch("one", 1, teacher=smooth_teacher, grad_accum=2, **COMPONENTS, **alone)
    two = launch("two", 2, teacher=smooth_teacher, **COMPONENTS, **how)
    assert difference(one, two) < 1e-4
    logs = [[r for r in records(run / STAGE / "log.jsonl") if r["event"] == "train"] for run in (one, two)]
    assert set(logs[0][0]["components"]) == {"kd", "lm"}
    assert len(logs[0][-1]["components"]) == 8
    for a, b in zip(*logs, strict=True):
        for name, part in a["components"].items():
            assert part == pytest.approx(b["components"][name], rel=2e-3, abs=1e-6)
        assert a["diagnostics"] == pytest.approx(b["diagnostics"], rel=2e-3, abs=1e-6)


def test_sharded_processes_are_one_too_and_go_on_as_they_were(launch, smooth_teacher, teacher_folder):
    one = launch("one", 1, teacher=smooth_teacher, grad_accum=2, max_steps=3)
    sharded = launch("sharded", 2, teacher=smooth_teacher, shard=True, teacher_device="sharded", max_steps=3)
    assert difference(one, sharded) < 1e-4
    flags = {"shard": True, "ema_decay": 0.9}  # its dropout makes an unrestored generator of either process show
    whole = launch("whole", 2, teacher=teacher_folder, **flags)
    launch("stopped", 2, teacher=teacher_folder, stop_at=3, **flags)
    assert difference(launch("stopped", 2, resume=True), whole) == 0.0
