"""What the GPU benchmarks time is one loss, whoever computes it; how they are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_attention_kl as attention
from bench import gpu_largest_batch as batch
from bench import gpu_layer_loss as layers
from bench import gpu_linear_softmax_kl as linear
from bench import gpu_softmax_kl as logits
from fastdistill.backend import obstacle_to_triton
from fastdistill.testing import DEVICE, random_logits, random_states, random_targets, relative_error

needs_triton = pytest.mark.skipif(
    obstacle_to_triton(DEVICE, None) is not None, reason="Triton needs a GPU, or what stands in for it"
)


@needs_triton
def test_every_implementation_on_triton_computes_the_same_loss_and_gradient():
    student, teacher = random_logits(6, 129).values()
    student.requires_grad_()
    targets = random_targets(6, vocab=129, ignored=0)
    compared = logits.steps(student, teacher, targets)
    assert {"eager", "torch.compile", "fastdistill, two launches", "fastdistill, one launch"} <= compared.keys()
    for name, step in compared.items():
        loss_error, gradient_error = logits.errors(step, student, teacher, targets)
        assert loss_error < 1e-5, name
        assert gradient_error < 1e-5, name


@needs_triton
@pytest.mark.parametrize("form", layers.FORMS)
def test_every_implementation_on_triton_computes_the_same_distance_and_gradients(form):
    students, teachers = random_states(6, 129, layers=3).values()
    students = [student.requires_grad_() for student in students]
    compared = layers.steps(students, teachers, form)
    assert compared.keys() == {"eager", "torch.compile", "fastdistill", "fastdistill, PyTorch path"}
    for name, step in compared.items():
        assert max(layers.errors(step, students, teachers, form)) < 1e-5, name


@needs_triton
def test_a_result_of_layer_loss_says_what_was_run_and_its_share_of_the_copy_rate(monkeypatch):
    """Its times, rates and peaks are stood in for."""
    monkeypatch.setattr(layers, "SHAPES", [(3, 6, 129, torch.float32)])
    monkeypatch.setattr(layers, "median_ms", lambda step: (step(), 2.0)[1])
    monkeypatch.setattr(layers, "peak_bytes", lambda step: (step(), 1_000_000)[1])
    monkeypatch.setattr(layers, "copy_rate", lambda elements, dtype: 0.01)
    found = list(layers.results())
    assert {(each["implementation"], each["form"]) for each in found} == {
        (name, form)
        for name in ("eager", "torch.compile", "fastdistill", "fastdistill, PyTorch path")
        for form in layers.FORMS
    }
    for each in found:
        assert each["gb_per_s"] == pytest.approx(3 * 6 * 129 * 20 / 2e-3 / 1e9)
        assert each["of_copy"] == pytest.approx(each["gb_per_s"] / 0.01)


@needs_triton
@pytest.mark.parametrize("loss", linear.LOSSES)
def test_every_implementation_on_triton_computes_the_same_loss_and_gradients_of_heads(loss):
    inputs = linear.make_inputs(linear.Shape(300, 129, 16, 24, torch.float32))  # more than a slice of the truth
    true = linear.truth(inputs, loss)
    compared = linear.steps(inputs, loss)
    assert {"eager", "torch.compile", "fastdistill", "fastdistill, PyTorch path"} <= compared.keys()
    for name, step in compared.items():
        assert max(map(relative_error, step(), true)) < 1e-5, name


@needs_triton
def test_a_result_says_what_was_run_and_how_it_compares(monkeypatch):
    """Its times and peaks are stood in for."""
    monkeypatch.setattr(linear, "SHAPES", [linear.Shape(40, 129, 16, 24, torch.float32)])
    monkeypatch.setattr(linear, "median_ms", lambda step: (step(), 2.0)[1])
    monkeypatch.setattr(linear, "peak_bytes", lambda step: (step(), 1_000_000)[1])
    products, *others = linear.results()
    assert (products["implementation"], products["chunk"]) == ("products alone", 40)
    assert products["tflop_per_s"] == pytest.approx(2 * 40 * 129 * (3 * 16 + 24) / 2e-3 / 1e12)
    assert {(each["implementation"], each["loss"]) for each in others} >= {
        (name, loss) for name in ("eager", "torch.compile", "fastdistill") for loss in linear.LOSSES
    }
    for each in others:
        assert each["of_products"] == 1
        assert max(each[f"{name}_error"] for name in ("loss", "dhidden", "dweight")) < 1e-5


ATTENTION = attention.Shape(2, 4, 2, 37, 16, 24, torch.float32)


@needs_triton
def test_every_implementation_on_triton_computes_the_same_divergence_of_attention():
    inputs = attention.make_inputs(ATTENTION)
    true = attention.truth(inputs)
    compared = attention.steps(inputs)
    assert compared.keys() == {"eager", "torch.compile", "fastdistill", "fastdistill, PyTorch path"}
    for name, step in compared.items():
        assert max(map(relative_error, step(), true)) < 1e-5, name


@pytest.mark.parametrize("fits", [True, False])
def test_a_result_of_attention_says_what_was_run_and_its_rate_or_that_memory_did_not_suffice(monkeypatch, fits):
    """Its times, rates and peaks are stood in for, and so is what needs Triton."""
    steps = attention.steps

    def some(inputs):
        def too_large():
            raise torch.OutOfMemoryError

        return {"eager": steps(inputs)["eager"] if fits else too_large, "last": steps(inputs)["eager"]}

    monkeypatch.setattr(attention, "SHAPES", [ATTENTION])
    monkeypatch.setattr(attention, "steps", some)
    monkeypatch.setattr(attention, "median_ms", lambda step: (step(), 2.0)[1])
    monkeypatch.setattr(attention, "peak_bytes", lambda step: (step(), 1_000_000)[1])
    monkeypatch.setattr(attention, "product_rate", lambda dtype: 0.01)
    eager, last = attention.results()
    assert (eager["implementation"], last["implementation"]) == ("eager", "last")
    for each in (eager, last) if fits else (last,):
        products = 5 * 16 + 3 * 24  # rows and columns of each, halved because later keys are not seen
        assert each["tflop_per_s"] == pytest.approx(2 * 2 * 4 * 37 * 37 * products / 2 / 2e-3 / 1e12)
        assert each["of_product"] == pytest.approx(each["tflop_per_s"] / 0.01)
        assert each["peak_mb_beyond_gradients"] == pytest.approx(1 - 4 * 2 * 6 * 37 * 16 / 1e6)
        assert max(each[f"{name}_error"] for name in ("loss", "dq", "dk")) < 1e-5
    assert fits or eager == {key: eager[key] for key in attention.Shape._fields} | {
        "implementation": "eager",
        "product_tflop_per_s": 0.01,
        "out_of_memory": True,
    }


def test_the_bare_products_are_those_of_the_loss():
    inputs = linear.make_inputs(linear.Shape(300, 129, 16, 24, torch.float32))
    dhidden, dweight = linear.products_step(inputs, 128)
    assert torch.allclose(dhidden, inputs["student_weight"].sum(0).expand(300, 16), atol=1e-4)
    assert torch.allclose(dweight, inputs["student_hidden"].sum(0).expand(129, 16), atol=1e-4)


def test_the_batches_compared_are_trained_by_one_loss():
    losses, gradients = {}, {}
    for name, make_module in batch.MODULES.items():
        module = make_module(*batch.make_models(n_embd=16, n_head=2, vocab_size=61, n_positions=12))
        loss = module(batch.make_batch(3, 12, 61))
        loss.backward()
        losses[name], gradients[name] = loss.detach(), [parameter.grad for parameter in module.parameters()]
    torch.testing.assert_close(losses["fastdistill"], losses["eager"])
    torch.testing.assert_close(gradients["fastdistill"], gradients["eager"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 8, 13, 100])
def test_the_largest_that_fits_is_found(limit):
    assert batch.largest(lambda number: number <= limit) == limit


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize(
    "name", ["gpu_softmax_kl", "gpu_linear_softmax_kl", "gpu_layer_loss", "gpu_attention_kl", "gpu_largest_batch"]
)
def test_a_machine_without_a_gpu_is_told_so(name, tmp_path):
    command = [sys.executable, "-m", f"bench.{name}", str(tmp_path / "results.json")]
    process = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (2, "")
    assert "PyTorch finds none" in process.stderr
