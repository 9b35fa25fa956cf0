"""Nothing of a run is lost: killed, interrupted, out of time, out of memory, out of disk, or damaged afterwards."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastdistill.training import checkpoint
from fastdistill.training.objective import DistillationModule
from fastdistill.training.stage import Result

ROOT = Path(__file__).resolve().parents[2]
STAGE = Path("seed-0/distilled")
LONG = {"max_steps": 24, "eval_steps": 5, "save_steps": 2}


@pytest.fixture
def start(arguments):
    """train.py as a program, until its log has so many lines of training."""

    def begin(name: str, lines: int, **flags: object) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "train.py"), *arguments(name, **flags)]
        environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # another number rounds otherwise
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        folder = Path(command[command.index("--output-dir") + 1])
        log, deadline = folder / STAGE / "log.jsonl", time.monotonic() + 300
        while not (log.exists() and log.read_text().count('"train"') >= lines):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    return begin


def test_a_killed_run_goes_on_as_if_it_had_not_been(run, start, assert_same_run):
    whole = run("whole", **LONG)
    moment = random.Random(0)
    for lines in (1, 5, 9, 14, 20):
        process = start(f"killed-{lines}", lines, **LONG)
        time.sleep(moment.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert_same_run(run(f"killed-{lines}", resume=True), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(run, start, assert_same_run, number):
    flags = {"max_steps": 60, "eval_steps": 50, "save_steps": 60}
    process = start("interrupted", 5, **flags)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    step = int(re.findall(r"stopped and saved at step (\d+) of 60", errors)[0])
    assert 5 <= step < 60
    assert "train.py --resume --output-dir" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert_same_run(run("interrupted", resume=True), run("whole", **flags))


def test_out_of_time_saves_and_is_no_failure(run, records, assert_same_run, capsys):
    stopped = run("stopped", max_hours=1e-6)
    assert len([r for r in records(stopped / STAGE / "log.jsonl") if r["event"] == "train"]) == 1
    errors = capsys.readouterr().err
    assert "stopped and saved at step 1 of 6" in errors
    assert "train.py --resume --output-dir" in errors.splitlines()[-1]
    assert_same_run(run("stopped", resume=True), run("whole"))


@pytest.mark.parametrize("at", ["forward", "step"])
def test_out_of_memory_saves_and_the_half_batch_goes_on(run, records, monkeypatch, capsys, smooth_teacher, at):
    """In the fourth window, or in its optimizer step. The same tokens come again, in micro-batches half as long."""
    whole = run("whole", teacher=smooth_teacher)
    calls = iter(range(1, 100))
    owner, name = (DistillationModule, "forward") if at == "forward" else (torch.optim.AdamW, "step")
    genuine = getattr(owner, name)

    def full(self, *args, **kwargs):
        if next(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        return genuine(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        stopped = run("stopped", expect=1, teacher=smooth_teacher)
    errors = capsys.readouterr().err
    assert "stopped: out of memory: 2.50 GiB more could not be had" in errors
    assert "Traceback" not in errors
    assert re.search(r"train\.py --resume --output-dir \S+ --batch-size 2 --grad-accum 2$", errors.strip())
    assert max((stopped / STAGE / "checkpoints").iterdir()).name == "step-00000003"
    resumed = run("stopped", resume=True, batch_size=2, grad_accum=2)
    logs = [[r for r in records(each / STAGE / "log.jsonl") if "total" in r] for each in (whole, resumed)]
    assert [r["step"] for r in logs[1]] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(*logs, strict=True):
        assert b["total"] == pytest.approx(a["total"], rel=1e-3)


def test_out_of_memory_between_log_lines_loses_no_step_and_no_random_number(run, monkeypatch, assert_same_run):
    """The step before has not been taken in yet. There is dropout: the window that failed draws again what it had."""
    seldom = dict.fromkeys(("log_steps", "eval_steps", "save_steps"), 6)
    forward, calls = DistillationModule.forward, iter(range(1, 100))

    def full(self, batch, teacher, counts):
        losses = forward(self, batch, teacher, counts)
        if next(calls) == 4:
            raise torch.OutOfMemoryError
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "forward", full)
        run("stopped", expect=1, **seldom)
    assert_same_run(run("stopped", resume=True), run("whole", **seldom))


def test_a_full_disk_ends_the_run_and_keeps_the_last_good_checkpoint(run, monkeypatch, capsys, assert_same_run):
    save_file, calls = checkpoint.save_file, iter(range(1, 100))

    def full(tensors, path):
        if next(calls) == 6:  # in the second checkpoint
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        stopped = run("stopped", expect=1)
    errors = capsys.readouterr().err
    assert "the checkpoint of step 4 could not be written ([Errno 28] No space left on device)" in errors
    assert "the last good one is" in errors
    assert "train.py --resume --output-dir" in errors.splitlines()[-1]
    assert [path.name for path in (stopped / STAGE / "checkpoints").iterdir()] == ["step-00000002"]
    assert_same_run(run("stopped", resume=True), run("whole"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_log_that_cannot_be_written_ends_the_run(run, monkeypatch, capsys):
    monkeypatch.setattr("fastdistill.training.monitor.LOG", "/dev/full")
    run(expect=1)
    errors = capsys.readouterr().err
    assert "stopped: cannot write: [Errno 28] No space left on device" in errors
    assert "train.py --resume --output-dir" in errors.splitlines()[-1]


def damaged(content: bytes, damage: str) -> bytes | None:
    half = len(content) // 2
    flipped = content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :]
    return {"missing": None, "empty": b"", "cut short": content[:half], "one bit flipped": flipped}[damage]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "empty", "cut short", "one bit flipped"])
def test_whatever_is_damaged_nothing_is_lost(run, tmp_path, capsys, assert_same_run, damage):
    whole, stopped = run("whole"), run("stopped", stop_at=5)
    for file in (*checkpoint.FILES, "manifest.json"):
        shutil.copytree(stopped, tmp_path / "copy")
        path = tmp_path / "copy" / STAGE / "checkpoints" / "step-00000005" / file
        content = damaged(path.read_bytes(), damage)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        capsys.readouterr()
        assert_same_run(run("copy", resume=True), whole)
        said = capsys.readouterr()
        assert "damaged-step-00000005, and the one before it is used" in said.out + said.err
        assert (path.parents[1] / "damaged-step-00000005").exists()
        shutil.rmtree(tmp_path / "copy")


def test_a_best_model_that_is_damaged_is_said_and_not_kept(run, capsys):
    stopped = run("stopped", stop_at=4)
    (stopped / STAGE / "best-00000003" / "model.safetensors").write_bytes(b"half")
    run("stopped", resume=True)
    said = capsys.readouterr()
    assert "the best model before, of step 3, is damaged: the best from here on is kept" in said.out + said.err
    assert (stopped / STAGE / "best-00000006").is_dir()
    results = [Result.read(folder / STAGE) for folder in (stopped, run("whole"))]
    assert results[0] is not None
    assert results[1] is not None
    assert results[0].untrained == results[1].untrained


def test_the_best_models_are_kept_that_a_kept_checkpoint_knows(run, capsys):
    flags = {"eval_steps": 1, "save_steps": 2, "keep_checkpoints": 2}
    folder = run("run", stop_at=5, **flags)
    assert sorted(path.name for path in (folder / STAGE).glob("best-*")) == ["best-00000004", "best-00000005"]
    shutil.rmtree(folder / STAGE / "checkpoints" / "step-00000005")
    run("run", resume=True)
    assert "is damaged" not in capsys.readouterr().err
    assert (folder / STAGE / "best-00000006").is_dir()
