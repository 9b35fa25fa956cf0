"""Which implementation is chosen, and what is said where the kernels cannot run."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastdistill import backend, ops
from fastdistill.backend import choose_impl, obstacle_to_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def nothing_is_known_yet(monkeypatch):
    monkeypatch.delenv("FASTDISTILL_IMPL", raising=False)
    backend._obstacle.cache_clear()
    backend._warn_once.cache_clear()
    yield
    backend._obstacle.cache_clear()


@pytest.fixture
def obstacle(monkeypatch):
    """Sets what stands in the way of Triton, on any device."""
    return lambda cause: monkeypatch.setattr(backend, "obstacle_to_triton", lambda *device: cause)


def test_a_gpu_that_can_run_the_kernel_gets_it(obstacle):
    obstacle(None)
    assert choose_impl("softmax_kl", None, GPU) == "triton"


@pytest.mark.parametrize(
    ("capability", "dtype", "impl"),
    [
        ((8, 0), torch.float16, "triton"),
        ((9, 0), torch.bfloat16, "triton"),
        ((9, 0), torch.float32, "torch"),
        ((7, 5), torch.float16, "torch"),
        ((6, 0), torch.float16, "torch"),
    ],
)
def test_what_multiplies_gets_its_kernel_where_that_has_tensor_cores(capability, dtype, impl, obstacle, monkeypatch):
    obstacle(None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    half, factor = torch.zeros(1, dtype=torch.float16), torch.zeros(1, dtype=dtype)
    assert choose_impl("attention_kl", None, GPU, multiplies=(half, factor)) == impl
    assert choose_impl("attention_kl", "triton", GPU, multiplies=(half, factor)) == "triton"
    assert choose_impl("attention_kl", None, CPU, multiplies=(half, factor)) == "torch"


def test_an_operation_without_a_kernel_and_a_cpu_get_pytorch_without_a_word(obstacle):
    obstacle(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_impl("layer_loss", None, CPU) == "torch"
        assert choose_impl("sorted-probability matching", None, GPU) == "torch"
        assert choose_impl("softmax_kl", None, CPU) == "torch"


def test_a_gpu_that_cannot_gets_pytorch_and_one_warning_that_names_the_cause(obstacle):
    obstacle("the moon is full")
    with pytest.warns(UserWarning, match="PyTorch path instead of its Triton kernels: the moon is full"):
        assert choose_impl("softmax_kl", None, GPU) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_impl("softmax_kl", None, GPU) == "torch"


@pytest.mark.parametrize("source", ["impl", "FASTDISTILL_IMPL"])
def test_an_explicit_choice_never_falls_back(source, obstacle, monkeypatch):
    obstacle("the moon is full")
    impl = "triton" if source == "impl" else None
    if impl is None:
        monkeypatch.setenv(source, "triton")
    with pytest.raises(RuntimeError, match=f"{source}='triton' was asked for, but the moon is full"):
        choose_impl("softmax_kl", impl, GPU)
    with pytest.raises(RuntimeError, match=f"{source}='triton' was asked for, but no_operation has no Triton kernel"):
        choose_impl("no_operation", impl, GPU)


def test_the_argument_beats_the_environment_which_beats_the_device(obstacle, monkeypatch):
    obstacle(None)
    monkeypatch.setenv("FASTDISTILL_IMPL", "torch")
    assert choose_impl("softmax_kl", None, GPU) == "torch"
    assert choose_impl("softmax_kl", "triton", GPU) == "triton"


class Target:
    backend, arch = "cuda", 60


class Driver:
    """Of a GPU that this process has."""

    def __init__(self, **target):
        self.target = type("Target", (Target,), target)

    def get_active_torch_device(self):
        return GPU

    def get_current_target(self):
        return self.target


@pytest.fixture
def driver(monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is installed on Linux x86_64 alone")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)

    def set_active(active):
        monkeypatch.setattr(triton.runtime.driver, "_active", active)

    return set_active


def test_a_p100_is_tried_whatever_pytorch_says_of_it(driver, monkeypatch):
    driver(Driver())
    tried = []
    monkeypatch.setattr(backend, "_trial", lambda *what: tried.append(what))
    assert obstacle_to_triton("cuda", 0) is None
    assert obstacle_to_triton("cuda", 0) is None
    assert obstacle_to_triton("cuda", 0, "layer_loss") is None
    assert tried == [("softmax_kl", GPU), ("layer_loss", GPU)]


@pytest.mark.parametrize(
    ("target", "device", "cause"),
    [
        ({"arch": 52}, "cuda", "a cuda 52, not an NVIDIA GPU from sm_60 on"),
        ({"backend": "hip", "arch": 942}, "cuda", "a hip 942, not an NVIDIA GPU"),
        ({}, "cpu", "the tensors are on 'cpu', and Triton runs on 'cuda'"),
    ],
)
def test_what_the_kernels_do_not_run_on_is_named(target, device, cause, driver):
    driver(Driver(**target))
    assert cause in str(obstacle_to_triton(device, 0))


def test_an_old_triton_is_named(driver, monkeypatch):
    driver(Driver())
    monkeypatch.setattr("triton.__version__", "3.3.1")
    assert obstacle_to_triton("cuda", 0) == "Triton 3.3.1 is installed, and they need 3.4 or later"


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    assert "Triton cannot be imported" in str(obstacle_to_triton("cuda", 0))


@pytest.mark.parametrize("file", ["softmax_kl", "layer_loss"])
def test_what_a_compiler_says_of_the_trial_is_the_cause(file, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("ptxas fatal:\n  Value 'sm_60' is not defined")

    monkeypatch.setattr(ops, file, fail)
    assert (
        backend._trial(file, CPU) == "a trial of them failed: RuntimeError: ptxas fatal: Value 'sm_60' is not defined"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_that_is_the_cause(driver):
    driver(None)
    assert "Triton finds no GPU" in str(obstacle_to_triton("cpu", None))
