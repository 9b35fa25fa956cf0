"""What the GPU benchmark times is one loss, whoever computes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_softmax_kl import errors, steps
from fastdistill.backend import obstacle_to_triton
from fastdistill.testing import DEVICE, random_logits, random_targets


@pytest.mark.skipif(obstacle_to_triton(DEVICE, None) is not None, reason="Triton needs a GPU, or what stands in for it")
def test_every_implementation_on_triton_computes_the_same_loss_and_gradient():
    student, teacher = random_logits(6, 129).values()
    student.requires_grad_()
    targets = random_targets(6, vocab=129, ignored=0)
    compared = steps(student, teacher, targets)
    assert {"eager", "torch.compile", "fastdistill, two launches", "fastdistill, one launch"} <= compared.keys()
    for name, step in compared.items():
        loss_error, gradient_error = errors(step, student, teacher, targets)
        assert loss_error < 1e-5, name
        assert gradient_error < 1e-5, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_softmax_kl", str(tmp_path / "results.json")]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert "PyTorch finds none" in process.stderr
