"""What doctor says of machines with and without GPUs, pretended here, and the code with which it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import fastdistill.__main__
from fastdistill import backend
from fastdistill.training import doctor_kernels, doctor_preset, hardware
from fastdistill.training.estimate import CPU, H200, P100, T4
from fastdistill.training.finding import Finding
from fastdistill.training.hardware import nvidia_smi
from fastdistill.training.preset_shapes import estimate_preset
from fastdistill.training.wheels import install_line, is_served

ROOT = Path(__file__).resolve().parents[2]

# As PyTorch's release notes list them.
ARCHITECTURES = {
    None: [],
    "12.6": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
    "12.8": ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
    "13.0": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}
CARDS = {"Tesla P100-PCIE-16GB": (6, 0), "Tesla T4": (7, 5), "NVIDIA H200": (9, 0)}
A_P100, A_T4, AN_H200 = CARDS
CU126, CU130 = (
    f'pip uninstall -y torch && pip install "torch==2.14.*" --index-url https://download.pytorch.org/whl/{build}'
    for build in ("cu126", "cu130")
)


class Answer(NamedTuple):
    code: int
    out: str
    err: str

    def line(self, topic: str) -> str:
        """The mark and text of the only finding of a topic, and its cure after an arrow, as one line."""
        lines: list[list[str]] = []
        for line in self.out.splitlines():
            if line.startswith(" "):
                lines[-1].append(line.strip())
            else:
                lines.append([line])
        (found,) = [" ".join(parts) for parts in lines if parts[0][2:16].strip() == topic]
        return found


@pytest.fixture
def doctor(monkeypatch, capsys) -> Callable[..., Answer]:
    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["fastdistill", "doctor", *arguments])
        code = fastdistill.__main__.main()
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture
def machine(monkeypatch) -> Callable[..., None]:
    """Pretends a build of torch for `cuda`, GPUs that it sees, and what nvidia-smi prints (None: it is not there)."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("FASTDISTILL_IMPL", raising=False)

    def pretend(
        cuda: str | None = None,
        gpus: tuple[str, ...] = (),
        smi: str | None = None,
        *,
        smi_code: int = 0,
        free: float = 15,
    ) -> None:
        def nvidia_smi_prints(command, **how):
            assert command[0] == "nvidia-smi"
            assert how["timeout"]
            if smi is None:
                raise FileNotFoundError
            return subprocess.CompletedProcess(command, smi_code, smi, "")

        def properties(index):
            major, minor = CARDS[gpus[index]]
            sizes = {"total_memory": int(16e9), "multi_processor_count": 40}
            return SimpleNamespace(name=gpus[index], major=major, minor=minor, **sizes)

        monkeypatch.setattr(hardware.subprocess, "run", nvidia_smi_prints)
        monkeypatch.setattr(hardware, "nvidia_on_the_bus", lambda: False)
        monkeypatch.setattr(torch, "__version__", f"2.13.0+cu{cuda.replace('.', '')}" if cuda else "2.13.0+cpu")
        monkeypatch.setattr(torch.version, "cuda", cuda)
        for name, value in {
            "is_available": lambda: bool(gpus),
            "device_count": lambda: len(gpus),
            "get_arch_list": lambda: ARCHITECTURES[cuda],
            "get_device_properties": properties,
            "get_device_capability": lambda device=0: CARDS[gpus[0]],
            "get_device_name": lambda device=0: gpus[0],
            "mem_get_info": lambda index: (int(free * 1e9), int(16e9)),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        if gpus:
            monkeypatch.setattr(backend, "obstacle_to_triton", lambda *of: None)
            monkeypatch.setattr(doctor_kernels, "difference", lambda operation, device: 2e-7)
            monkeypatch.setattr(doctor_preset, "_product_rate", lambda plan: 4e12)

    return pretend


def test_without_a_gpu_the_cpu_is_ready(machine, doctor):
    machine()
    found = doctor()
    assert found.code == 0
    assert found.out.splitlines()[-1] == "✓ ready"
    assert found.line("torch") == "✓ torch         2.13.0+cpu, built without CUDA"
    assert "nvidia-smi is not there" in found.line("driver")
    assert found.line("gpu").startswith("! gpu           none that PyTorch sees")
    assert "`fastdistill compile-check` compiles them for GPUs that are not here" in found.line("kernels")
    assert found.line("preset") == "✓ preset        demo: a student of 0.533M and a teacher of 0.935M parameters"
    assert found.line("precision") == "✓ precision     fp32 (a CPU's own), weights and optimizer in fp32"
    assert "8 x 1 rows of 128 tokens a step; the fused loss takes 1,024 of them at a time" in found.line("batch")
    assert "assumed" in found.line("time")
    assert "(measured)" in found.line("time")


def test_a_measured_step_is_beside_the_estimate_of_its_memory(machine, doctor):
    machine()
    found = doctor("--measure", "--json")
    report = json.loads(found.out)
    assert (found.code, report["ready"]) == (0, True)
    numbers = {each["topic"]: each["numbers"] for each in report["findings"]}
    expected = estimate_preset("demo", CPU)
    assert numbers["memory"]["estimated_bytes"] == expected.peak
    assert numbers["memory"]["parts"] == expected.memory
    measured = numbers["measured"]
    assert expected.peak / measured["bytes"] == pytest.approx(1, abs=0.15)
    assert measured["estimate_off_by"] == expected.peak / measured["bytes"] - 1
    assert 0 < measured["seconds_per_step"] < 20


def test_json_says_what_the_lines_say(machine, doctor, monkeypatch):
    machine()
    monkeypatch.setattr(doctor_preset, "_product_rate", lambda plan: 4e10)
    monkeypatch.setattr(hardware, "cpu_memory", lambda: (10**10, 10**10))
    found = [str(Finding(**each)) for each in json.loads(doctor("--json").out)["findings"]]
    assert doctor().out == "\n".join([f"fastdistill {fastdistill.__version__}", *found, "✓ ready\n"])


def test_a_p100_with_a_build_that_left_it_out(machine, doctor):
    machine("12.8", (A_P100,), f"570.86.15, {A_P100}, 6.0\n")
    found = doctor("--preset", "gpt2")
    assert found.code == 1
    wheel = found.line("wheel")
    assert wheel.startswith("✗ wheel         this build of torch has no code for sm_60: sm_70 sm_75")
    assert wheel.endswith(f"→ {CU126}")
    assert f"→ {CU126}\n" in found.out  # whole, on a line of its own
    assert "not tried" in found.line("kernels")
    assert "no rate can be measured" in found.line("time")
    assert found.out.splitlines()[-1] == "✗ to mend: wheel"


def test_a_p100_with_the_last_builds_that_serve_it(machine, doctor):
    machine("12.6", (A_P100,), f"570.86.15, {A_P100}, 6.0\n")
    found = doctor("--preset", "gpt2")
    assert found.code == 0
    assert found.line("driver") == "✓ driver        NVIDIA 570.86.15"
    assert "capability 6.0, 15.0 of 16.0 GB free, 40 multiprocessors" in found.line("gpu 0")
    assert found.line("wheel").startswith(
        "✓ wheel         this build of torch has code for sm_60; the last such builds"
    )
    assert found.line("bf16").startswith("! bf16          emulated")
    assert "fp16 with a gradient scaler" in found.line("precision")
    assert "takes 256 of them" in found.line("batch")
    assert f"✓ memory        {estimate_preset('gpt2', P100).peak / 1e9:.1f} GB of tensors" in found.line("memory")


def test_two_t4(machine, doctor):
    machine("13.0", (A_T4, A_T4), f"580.65.06, {A_T4}, 7.5\n" * 2)
    found = doctor()
    assert found.code == 0
    assert found.line("gpu 1").startswith(f"✓ gpu 1         {A_T4}")
    assert "`torchrun --nproc-per-node 2 train.py` uses all GPUs" in found.line("processes")
    assert found.out.count("has code for sm_75\n") == 2
    assert f"✓ memory        {estimate_preset('demo', T4).peak / 1e6:.0f} MB of tensors" in found.line("memory")
    assert [line[:30] for line in found.out.splitlines() if " kernels " in line] == [
        f"✓ kernels       {operation}: its Trit"[:30] for operation in backend.WITH_KERNEL
    ]
    assert "4 ms a step, 1.4 s a run: 5.9e+09 FLOP a step, 1.9e+12 a run" in found.line("time")
    assert "at a third (assumed) of the 4,000 GFLOP/s of one large product (measured)" in found.line("time")


def test_an_h200(machine, doctor):
    machine("13.0", (AN_H200,), f"580.65.06, {AN_H200}, 9.0\n", free=140)
    found = doctor("--preset", "gpt2")
    assert found.code == 0
    assert found.line("bf16") == "✓ bf16          native"
    assert "bf16 (native on NVIDIA H200)" in found.line("precision")
    assert "takes 2,048 of them" in found.line("batch")
    assert f"{estimate_preset('gpt2', H200).peak / 1e9:.1f} GB of tensors" in found.line("memory")


@pytest.mark.parametrize(
    ("card", "driver", "cure"),
    [(A_P100, "570.86", CU126), (A_T4, "580.65", CU130), (A_T4, "550.54", CU126), (AN_H200, "580.65", CU130)],
)
def test_a_build_without_cuda_beside_a_gpu(card, driver, cure, machine, doctor):
    machine(None, (), "{}, {}, {}.{}\n".format(driver, card, *CARDS[card]))
    found = doctor()
    assert found.code == 1
    expected = f"✗ gpu           {card}, which nvidia-smi sees and PyTorch does not: this build of torch has no CUDA"
    assert found.line("gpu") == f"{expected} → {cure}"


def test_a_driver_too_old_for_the_build(machine, doctor):
    machine("13.0", (), f"550.54.15, {A_T4}, 7.5\n")
    found = doctor()
    assert found.code == 1
    assert "driver 550.54.15 is too old for CUDA 13.0, which needs 580 or newer" in found.line("gpu")
    assert "install NVIDIA's driver 580 or newer" in found.line("gpu")
    assert found.line("gpu").endswith(f", or keep it: {CU126}")


def test_a_gpu_that_pytorch_does_not_see_for_another_reason(machine, doctor, monkeypatch):
    def fail():
        raise RuntimeError("CUDA unknown error - this may be due to an\nincorrectly set up environment")

    machine("13.0", (), f"580.65.06, {A_T4}, 7.5\n")
    monkeypatch.setattr(torch.cuda, "init", fail)
    found = doctor()
    assert found.code == 1
    assert "PyTorch does not: CUDA unknown error - this may be due to an incorrectly set up" in found.line("gpu")


def test_a_driver_that_does_not_answer(machine, doctor):
    machine("13.0", (), "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n", smi_code=9)
    found = doctor()
    assert found.code == 1
    assert found.line("driver").startswith("✗ driver        nvidia-smi fails: NVIDIA-SMI has failed because")


def test_a_gpu_without_a_driver(machine, doctor, monkeypatch):
    machine("13.0")
    monkeypatch.setattr(hardware, "nvidia_on_the_bus", lambda: True)
    found = doctor()
    assert found.code == 0  # a container may well be meant to have none
    assert found.line("gpu").startswith("! gpu           an NVIDIA GPU is on the PCI bus, and no driver is here")
    assert "--gpus all" in found.line("gpu")


def test_a_gpu_that_was_hidden(machine, doctor, monkeypatch):
    machine("13.0", (), f"580.65.06, {A_T4}, 7.5\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = doctor()
    assert found.code == 0
    assert "hidden by CUDA_VISIBLE_DEVICES=''" in found.line("gpu")


@pytest.mark.parametrize(
    ("cause", "cure"),
    [
        ("a trial of them failed: RuntimeError: ptxas fatal: Value 'sm_75' is not defined", "unset TRITON_PTXAS_PATH"),
        ("Triton cannot be imported (No module named 'triton')", 'pip install "triton>=3.4"'),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there may be no Triton to mend")
def test_triton_fails(cause, cure, machine, doctor, monkeypatch):
    machine("13.0", (A_T4,), f"580.65.06, {A_T4}, 7.5\n")
    monkeypatch.setattr(backend, "obstacle_to_triton", lambda *of: cause)
    monkeypatch.setattr(doctor_kernels.shutil, "which", lambda name: name)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/usr/local/cuda-13.0/bin/ptxas")
    found = doctor()
    assert found.code == 1
    assert found.out.count(f"PyTorch's slower path, since {cause.split()[0]}") == len(backend.WITH_KERNEL)
    assert found.out.count(f"→ {cure}") == len(backend.WITH_KERNEL)
    assert found.out.splitlines()[-1] == "✗ to mend: kernels"


def test_kernels_that_compute_something_else(machine, doctor, monkeypatch):
    machine("13.0", (A_T4,), f"580.65.06, {A_T4}, 7.5\n")
    for difference in (3e-2, float("nan")):
        monkeypatch.setattr(doctor_kernels, "difference", lambda operation, device, value=difference: value)
        found = doctor()
        assert found.code == 1
        assert f"{difference:.0e} from PyTorch" in found.out
        assert "FASTDISTILL_IMPL=torch: more than 1e-04 is wrong" in found.out


def test_what_the_environment_asks_for(machine, doctor, monkeypatch):
    machine()
    monkeypatch.setenv("FASTDISTILL_IMPL", "triton")
    without = doctor()
    assert without.code == 1
    assert without.line("kernels").endswith("→ unset FASTDISTILL_IMPL")
    monkeypatch.setenv("FASTDISTILL_IMPL", "cuda")
    assert "must be one of 'torch', 'triton', got 'cuda'" in doctor().line("kernels")
    monkeypatch.setenv("FASTDISTILL_IMPL", "torch")
    machine("13.0", (A_T4,), f"580.65.06, {A_T4}, 7.5\n")
    left_out = doctor()
    assert left_out.code == 0
    assert " ".join(left_out.out.split()).count("FASTDISTILL_IMPL=torch leaves them out") == len(backend.WITH_KERNEL)


def test_too_little_memory_has_flags_that_help(machine, doctor):
    machine("12.6", (A_P100,), f"570.86.15, {A_P100}, 6.0\n", free=0.525)
    found = doctor("--measure")
    assert found.code == 1
    memory = found.line("memory")
    assert "525 MB are free: too little" in memory
    assert "are needed by the estimate, 525 MB are free" in found.line("measured")
    flags = memory.split("→ ")[1].split(":")[0].split()
    assert flags[::2] == ["--batch-size", "--grad-accum"]
    rows, batches = int(flags[1]), int(flags[3])
    assert rows * batches == 8
    assert doctor(*flags).code == 0
    assert doctor("--batch-size", str(2 * rows), "--grad-accum", str(batches // 2)).code == 1


def test_a_gpu_that_others_have_filled(machine, doctor, monkeypatch):
    def full(*of):
        raise torch.OutOfMemoryError("CUDA error: out of memory")

    machine("13.0", (A_T4,), f"580.65.06, {A_T4}, 7.5\n")
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    monkeypatch.setattr(doctor_preset, "_product_rate", full)
    found = doctor()
    assert found.code == 1
    assert "0.0 of 16.0 GB free" in found.line("gpu 0")
    assert "0 MB are free: too little" in found.line("memory")
    assert "no rate can be measured" in found.line("time")


def test_a_measured_step_that_fails_is_told(machine, doctor, monkeypatch):
    def fail(*of, **how):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\nGPU 0 has")

    machine()
    monkeypatch.setattr(doctor_preset, "measure_step", fail)
    found = doctor("--measure")
    assert found.code == 1
    assert "✗ measured      a step fails: OutOfMemoryError: Tried to allocate 2.00 GiB. GPU 0" in found.line("measured")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--precision", "bf16"), "--precision bf16 would be emulated on Tesla T4"),
    ],
)
def test_settings_that_cannot_be_are_wrong_usage(arguments, message, machine, doctor):
    machine("13.0", (A_T4,), f"580.65.06, {A_T4}, 7.5\n")
    found = doctor(*arguments)
    assert found.code == 2
    assert message in found.err


def test_an_unknown_preset_is_wrong_usage(doctor, capsys):
    with pytest.raises(SystemExit) as ended:
        doctor("--preset", "gpt9")
    assert ended.value.code == 2
    assert "invalid choice: 'gpt9'" in capsys.readouterr().err


def test_without_the_train_extra_the_machine_is_told(tmp_path):
    program = (
        "import sys; sys.modules |= dict.fromkeys(['transformers', 'accelerate', 'huggingface_hub', 'tokenizers']);"
        "from fastdistill.__main__ import main; codes = [];\n"
        "for preset in ([], ['--preset', 'demo']):\n"
        "    sys.argv = ['fastdistill', 'doctor', *preset]; codes.append(main())\n"
        "print(codes)"
    )
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    *_, codes = lines = done.stdout.splitlines()
    assert codes == "[0, 1]", done.stderr
    assert [line[0] for line in lines if "train.py cannot run" in line] == ["!", "✗"]
    assert done.stdout.count("→ pip install 'fastdistill[train]'") == 2
    assert done.stdout.count("✓ torch") == 2


def test_nvidia_smi_is_read(machine):
    machine(smi=f"580.65.06, {A_T4}, 7.5\n580.65.06, {AN_H200}, 9.0\n")
    smi = nvidia_smi()
    assert (smi.driver, smi.branch) == ("580.65.06", 580)
    assert [(gpu.name, gpu.capability) for gpu in smi.gpus] == [(A_T4, (7, 5)), (AN_H200, (9, 0))]


def test_an_old_nvidia_smi_knows_no_capability_and_a_slow_one_is_not_waited_for(monkeypatch):
    def old(command, **how):
        if "compute_cap" in command[1]:
            return subprocess.CompletedProcess(command, 2, 'Field "compute_cap" is not a valid field to query.\n', "")
        return subprocess.CompletedProcess(command, 0, f"470.82.01, {A_T4}\n", "")

    def slow(command, timeout, **how):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(hardware.subprocess, "run", old)
    assert nvidia_smi().gpus == (hardware.Gpu(A_T4, None),)
    monkeypatch.setattr(hardware.subprocess, "run", slow)
    assert "timed out after 20 seconds" in str(nvidia_smi().error)


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        (["sm_60"], (6, 0), True),
        (["sm_60"], (6, 1), True),
        (["sm_61"], (6, 0), False),
        (["sm_50"], (6, 0), False),
        (["sm_75", "sm_80", "sm_86"], (8, 9), True),
        (["sm_90"], (12, 0), False),
        (["sm_90", "compute_90"], (12, 0), True),
        (["compute_120"], (9, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["gfx942"], (9, 4), False),
    ],
)
def test_which_architectures_serve_which_gpu(architectures, capability, expected):
    assert is_served(architectures, capability) == expected


def test_the_line_that_installs_a_build():
    assert install_line((6, 0), 570) == CU126
    assert install_line((7, 0), 590) == CU126
    assert install_line((9, 0), 550) == CU126
    assert install_line((12, 0), 570) == CU130  # whose driver must be newer too: no build for CUDA 12 serves it
    assert install_line((7, 5), None) == CU130


def test_a_gpu_on_the_bus(tmp_path):
    for number, (vendor, kind) in enumerate([("0x8086", "0x030000"), ("0x10de", "0x040300")]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
        (tmp_path / str(number) / "class").write_text(f"{kind}\n")
    assert not hardware.nvidia_on_the_bus(tmp_path)
    (tmp_path / "1" / "class").write_text("0x030200\n")
    assert hardware.nvidia_on_the_bus(tmp_path)
    assert not hardware.nvidia_on_the_bus(tmp_path / "none")


@pytest.mark.parametrize("operation", backend.WITH_KERNEL)
def test_differences_are_those_of_loss_and_gradient(operation, monkeypatch):
    """Of the PyTorch path to itself, then to one whose loss and then whose gradient is scaled."""
    function, factors = getattr(doctor_kernels, operation), {"torch": (1.0, 1.0), "triton": (1.0, 1.0)}

    def scaled(*tensors, impl, **how):
        out = function(*tensors, impl="torch", **how)
        of_loss, of_gradient = factors[impl]
        value = out.loss.detach()
        return out._replace(loss=value * of_loss + (out.loss - value) * of_gradient)

    monkeypatch.setattr(doctor_kernels, operation, scaled)
    assert doctor_kernels.difference(operation, torch.device("cpu")) == 0
    for factors["triton"] in ((1.5, 1.0), (1.0, 1.5)):
        assert doctor_kernels.difference(operation, torch.device("cpu")) == pytest.approx(0.5, rel=1e-4)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is installed on Linux x86_64 alone")
def test_the_kernels_are_near_pytorch_in_tritons_interpreter():
    program = (
        "import torch; from fastdistill.backend import WITH_KERNEL; from fastdistill.training import doctor_kernels;"
        "print([doctor_kernels.difference(operation, torch.device('cpu')) for operation in WITH_KERNEL])"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    differences = json.loads(done.stdout)
    assert len(differences) == len(backend.WITH_KERNEL)
    assert 0 < max(differences) < doctor_kernels.LARGEST_DIFFERENCE
