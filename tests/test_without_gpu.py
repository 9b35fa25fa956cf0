"""The kernels' tests on a machine without a GPU: in Triton's interpreter, and as compiled for three generations of GPU.

Each way needs a process of its own. They start together, as many at a time as there are cores, and each is a test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is installed on Linux x86_64 alone")

ROOT = Path(__file__).resolve().parents[1]
LOSSES = [
    "tests/test_softmax_kl.py",
    "tests/test_linear_softmax_kl.py",
    "tests/test_cross_vocab.py",
    "tests/test_linear_half.py",
    "tests/test_linear_ops.py",
    "tests/test_layer_loss.py",
]
PARITY = [f"{LOSSES[0]}::test_every_{what}_matches_the_definition" for what in ("keyword", "vocabulary_size_and_dtype")]
LINEAR_PARITY = [
    f"{LOSSES[1]}::test_every_keyword_matches_the_definition",
    f"{LOSSES[2]}::test_shared_matches_the_definition",
    f"{LOSSES[3]}::test_every_keyword_matches_the_definition",
]
LINEAR_OPERATIONS = [
    f"{LOSSES[4]}::test_{what}"
    for what in (
        "operations_are_registered_as_pytorch_wants_them[False-(True, True, True)-torch.float32-triton]",
        "compiled_without_a_graph_break_and_to_the_same_bits",
        "a_schedule_of_tensors_compiles_nothing_anew",
    )
]
LAYER_PARITY = f"{LOSSES[5]}::test_every_keyword_matches_the_definition"
LAYER_SIZES = [
    f"{LOSSES[5]}::test_any_number_of_layers_matches_the_definition",
    f"{LOSSES[5]}::test_a_width_beyond_one_tile_matches_the_definition",
]
LAYER_EDGES = [
    f"{LOSSES[5]}::test_no_token_gives_loss_0_and_gradient_0",
    f"{LOSSES[5]}::test_what_does_not_count_may_hold_anything",
    f"{LOSSES[5]}::test_loss_is_the_same_at_any_length",
]
LAYER_DTYPES = f"{LOSSES[5]}::test_incoming_gradient_scales_the_gradient"
NEAR_THE_TEACHER = f"{LOSSES[3]}::test_near_the_teacher_the_gradient_is_that_of_unrounded_logits"
KERNELS = ["tests/kernels", "bench/test_gpu.py"]
LAYER_KERNELS = [f"tests/kernels/test_{what}.py" for what in ("layer_loss_kernel", "layer_loss_ops", "softmax_kl_ops")]
COMPILED = [f"tests/ptx/test_{what}.py" for what in ("triton_kernels", "softmax_kl_traffic", "layer_loss_traffic")]
ATTENTION = ["tests/test_attention_kl.py", "tests/kernels/test_attention_kl_kernel.py"]
COMPILED_ATTENTION = ["tests/ptx/test_attention_kl_traffic.py", *ATTENTION]
"""Not for sm_90: of half precision its code multiplies in tensor cores, which the interpreter of PTX lacks."""

WAYS = {
    "sm_60": {"FASTDISTILL_PTX": "60"},
    "interpreter": {"TRITON_INTERPRET": "1"},
    "sm_75": {"FASTDISTILL_PTX": "75"},
    "sm_90": {"FASTDISTILL_PTX": "90"},
}
SOME_TESTS = {
    "sm_60": [*COMPILED, *COMPILED_ATTENTION, "tests/kernels/test_softmax_kl_kernel.py", PARITY[1], LAYER_PARITY],
    "interpreter": [
        *(*ATTENTION, *LAYER_KERNELS, "bench/test_gpu.py"),
        *(PARITY[0], *LINEAR_OPERATIONS, LAYER_PARITY, *LAYER_EDGES),
    ],
    "sm_75": [*COMPILED, *LINEAR_PARITY, *LAYER_SIZES, *LAYER_EDGES],
    "sm_90": [*COMPILED, *PARITY, NEAR_THE_TEACHER, LAYER_DTYPES],
}
ALL_TESTS = {
    "sm_60": [*KERNELS, *LOSSES, *COMPILED, *COMPILED_ATTENTION],
    "interpreter": [*KERNELS, *LOSSES, ATTENTION[0]],
    "sm_75": [*KERNELS, *LOSSES, *COMPILED, *COMPILED_ATTENTION],
    "sm_90": [*KERNELS, *LOSSES, *COMPILED, f"--ignore={ATTENTION[1]}"],
}


def run(environment: dict[str, str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *("-W", "ignore::RuntimeWarning"),  # NumPy's, of -inf - -inf in Triton's interpreter
            *("-k", "(triton or kernels) and not unread"),  # a kernel does not know whether the host may read values
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module", params=["some", pytest.param("all", marks=pytest.mark.slow)])
def processes(request) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    tests = SOME_TESTS if request.param == "some" else ALL_TESTS
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {way: pool.submit(run, environment, tests[way]) for way, environment in WAYS.items()}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("way", WAYS)
def test_kernels_pass_their_tests(processes, way):
    process = processes[way].result()
    summary = process.stdout.splitlines()[-1] if process.stdout else ""
    assert process.returncode == 0, process.stdout[-20000:] + process.stderr[-5000:]
    assert int(re.findall(r"(\d+) passed", summary)[0]) > 75
