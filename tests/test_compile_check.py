"""`fastdistill compile-check`: the reading of PTX and SASS on short texts, the sweep on kernels written here."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastdistill.__main__
from fastdistill import compile_check, machine_code
from fastdistill.compile_check import Code, Job, KernelFile, Loop, Result
from fastdistill.machine_code import Body, Instruction

pytest.importorskip("triton", reason="no Triton for this platform")

from fastdistill.absent_gpu import SMS

ROOT = Path(__file__).resolve().parents[1]

# Two pairs of loops: a plain one around a masked one, and one with a slow side that lies behind the end.
SASS = """
	.section	.text.toy_kernel,"ax",@progbits
.text.toy_kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_8) ;
.L_x_0:
        /*0020*/                   LDG.E.64.SYS R2, [R4] ;
.L_x_1:
        /*0030*/               @P1 LDG.E.U16 R8, desc[UR4][R4.64+0x2]          &req={4} &wr=0x2   ?trans1;
        /*0040*/              @!P1 LDG.E.S8.SYS R9, [R4+0x4] ;
        /*0050*/                   STL [R1], R8 ;
        /*0060*/                   NOP ;
        /*0070*/              @!P2 BRA `(.L_x_1) ;
        /*0080*/                   STG.E.128 [R6], R8 ;
        /*0090*/                   BRA.U !UP0, `(.L_x_0)                       ?trans5;
.L_x_3:
        /*00a0*/                   LDL R8, [R1] ;
.L_x_4:
        /*00b0*/                   LDG.E.128.CONSTANT R8, [R4] ;
        /*00c0*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R7], [R4.64] ;
        /*00d0*/                   LDG.E R8, [R4] ;
        /*00e0*/                   BRA.DIV UR4, `(.L_x_6) ;
.L_x_5:
        /*00f0*/                   STG.E.U16 [R6], R8 ;
        /*0100*/               @P0 BRA `(.L_x_4) ;
        /*0110*/               @P3 EXIT ;
        /*0120*/                   EXIT ;
.L_x_6:
        /*0130*/                   SHFL.BFLY PT, R2, R3, 0x1, 0x1f ;
        /*0140*/                   BRA `(.L_x_5) ;
.L_x_8:
        /*0148*/                   EXIT ;
.L_x_7:
        /*0150*/                   BRA `(.L_x_7);
        /*0160*/                   NOP;
"""

PTX = """
.version 8.7
.target sm_60
.extern .shared .align 16 .b8 global_smem[];
.func helper(
)
{
	ret;
}
.visible .entry toy_kernel(
	.param .u64 .ptr .global .align 1 toy_kernel_param_0
)
.reqntid 256
{
	.reg .pred 	%p<58>;
$L__func_begin0:
	.loc	1 5 0                           // toys.py:5:0
// %bb.0:
	ld.param.b64 	%rd8, [toy_kernel_param_0];
	@%p1 bra 	$L__BB0_4;
$L__BB0_1:                              // =>This Loop Header: Depth=1
	add.s32 	%r1, %r1, 1;
$L__BB0_2:                              // =>  This Inner Loop Header: Depth=2
$L__tmp0:
	.loc	1 9 24                          // toys.py:9:24
	// begin inline asm
	mov.u32 %r1, 0;
	@%p2 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd8 + 0 ];
	// end inline asm
	// begin inline asm
	{ .reg .b32 t; shl.b32 t, %r1, 16; mov.b32 %r2, t; }
	// end inline asm
	ld.global.L1::evict_last.v2.b16 { %rs1, %rs2 }, [ %rd8 + 0 ];
	st.global.v2.f64 [ %rd9 ], { %fd1, %fd2 };
	@!%p3 bra.uni 	$L__BB0_2;
	st.local.b32 	[%rd1], %r1;
	bra.uni 	$L__BB0_1;
$L__BB0_4:
	ld.global.nc.b8 	%rs1, [%rd8];
$L__BB0_5:
	call.uni (retval0),
	vprintf,
	(
	param0
	);
	ld.local.b32 	%r1, [%rd1];
	@%p4 bra 	$L__BB0_5;
	bra.uni 	$L__BB0_8;
$L__BB0_7:
	ld.global.b32 	%r1, [%rd8];
	bra.uni 	$L__BB0_7;
$L__BB0_8:
	ret;
$L__BB0_6:
	bra.uni 	$L__BB0_6;
}
"""


def body(instructions=1, load=0, wide=0, unmasked=0, store=0, local=0) -> Body:
    return Body(instructions, load, wide, unmasked, store, local)


# Reading PTX and SASS -------------------------------------------------------------------------------------------------


def test_sass_loops_are_found_and_counted():
    innermost, together = machine_code.find_loops(machine_code.parse_sass(SASS))
    assert innermost == [
        body(instructions=4, load=3, local=1),
        body(instructions=8, load=36, wide=32, unmasked=16, store=2),
    ]
    assert together == body(instructions=7 + 8, load=8 + 3 + 36, wide=32, unmasked=16, store=18, local=1)


def test_ptx_loops_are_found_and_counted():
    innermost, together = machine_code.find_loops(machine_code.parse_ptx(PTX))
    assert innermost == [
        body(instructions=7, load=20, wide=16, store=16),
        body(instructions=3, local=1),
    ]
    assert together == body(instructions=10 + 3, load=20, wide=16, store=16, local=2)


def test_ptx_without_predicate_is_unmasked():
    program = machine_code.parse_ptx(PTX.replace("@%p2 ", ""))
    assert machine_code.find_loops(program).innermost[0].unmasked_wide_load_bytes == 16


def test_a_program_without_loops():
    program = machine_code.parse_sass("        /*0000*/                   EXIT ;")
    assert program.instructions == [Instruction(falls_through=False)]
    assert machine_code.find_loops(program) == ([], body(instructions=0))


def test_a_jump_to_a_label_that_is_not_there_is_no_silent_end():
    with pytest.raises(KeyError, match=r"L_x_9"):
        machine_code.find_loops(machine_code.parse_sass("  /*0000*/  @P0 BRA `(.L_x_9) ;\n  /*0010*/  EXIT ;"))


def test_loops_that_share_their_first_block_are_one():
    text = """
.L_x_0:
        /*0000*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0010*/               @P0 BRA `(.L_x_0) ;
        /*0020*/               @P1 BRA `(.L_x_0) ;
        /*0030*/                   EXIT ;
"""
    assert machine_code.find_loops(machine_code.parse_sass(text)).innermost == [body(instructions=3)]


# Main loops -----------------------------------------------------------------------------------------------------------

UNROLLED = body(100, load=64, wide=64, unmasked=64)
REST = body(60, load=32, wide=32, unmasked=32)
GRADIENT = body(40, load=32, wide=32, unmasked=32, store=16)


@pytest.mark.parametrize(
    ("loops", "mains"),
    {
        "none": ([], []),
        "nothing that loads": ([body(9), body(9, store=4)], []),
        "the rest that unrolling leaves": ([UNROLLED, REST, GRADIENT], [UNROLLED, GRADIENT]),
        "a rest that comes first, and is long": ([body(150, 32, 32, 32), UNROLLED], [UNROLLED]),
        "a masked loop": ([body(200, load=128, wide=128), UNROLLED], [UNROLLED]),
        "an element-wise loop": ([body(200, load=128, wide=32), body(9, load=256)], [body(200, load=128, wide=32)]),
        "element-wise loops alone": ([body(99, load=8), body(80, load=4)], [body(99, load=8)]),
        "two that load alike": ([REST, body(90, load=32, wide=32, unmasked=32)], [body(90, 32, 32, 32)]),
        "a masked pass that stores": ([UNROLLED, body(9, load=8, store=4)], [UNROLLED, body(9, load=8, store=4)]),
    }.values(),
)
def test_main_loops(loops, mains):
    assert machine_code.main_loops(loops) == mains


# Occupancy ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared_memory", "expected"),
    [
        (60, 48, 8, 0, (5, 40 / 64, "registers")),  # 1536 a warp, 21 warps in each of 2 parts
        (60, 63, 8, 32, (4, 32 / 64, "registers")),  # taken as 64
        (60, 40, 2, 0, (25, 50 / 64, "registers")),  # 25 warps in each of 2 parts
        (61, 40, 2, 0, (24, 48 / 64, "registers")),  # 12 in each of 4
        (75, 64, 8, 0, (4, 1.0, "warps")),
        (75, 16, 1, 0, (16, 16 / 32, "blocks")),
        (90, 64, 32, 1024, (1, 32 / 64, "registers")),
        (70, 32, 4, 13900, (6, 24 / 64, "shared memory")),  # 14080 bytes in units of 256; 7 by those of 128
        (86, 32, 4, 16000, (6, 24 / 48, "shared memory")),  # 17024 in units of 128; 5 by those of 256
        (90, 32, 4, 45696, (4, 16 / 64, "shared memory")),  # with 1024 that the system reserves; 5 without
    ],
)
def test_occupancy_is_that_of_nvidias_calculator(arch, registers, warps, shared_memory, expected):
    assert machine_code.occupancy(arch, SMS[arch], registers, warps, shared_memory) == expected


# Disassembling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def nvdisasm(tmp_path, monkeypatch):
    """Makes a program that prints a text for any cubin the one that NVDISASM names; Triton's cache is empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NVDISASM", str(tmp_path / "nvdisasm"))

    def make(text: str, returncode: int = 0) -> None:
        tool = tmp_path / "nvdisasm"
        tool.write_text(
            f"#!/bin/sh\nif [ $1 = --version ]; then echo V1.2; else printf '{text}'; exit {returncode}; fi\n"
        )
        tool.chmod(0o755)

    return make


def test_sass_is_kept_by_cubin(nvdisasm):
    nvdisasm("first")
    assert machine_code.disassemble(b"one cubin") == "first"
    nvdisasm("second")
    assert machine_code.disassemble(b"one cubin") == "first"
    assert machine_code.disassemble(b"another") == "second"


@pytest.mark.parametrize(("text", "returncode"), [("half of it", 1), ("", 0)])
def test_an_nvdisasm_that_does_not_know_the_architecture(nvdisasm, text, returncode):
    nvdisasm(text, returncode)
    assert machine_code.disassemble(b"no cubin, so Triton's own does not know it either") is None
    nvdisasm("known")
    assert machine_code.disassemble(b"no cubin, so Triton's own does not know it either") == "known"


# Judging --------------------------------------------------------------------------------------------------------------


def code(*passes: float, **changes) -> Code:
    loops = [Loop(True, 8, int(8 * each), each, 32, 32, 0, 0) for each in passes]
    plain = Code(40, 0, 32, 8, 6, 0.75, "registers", "sass", 1.0, 0, loops)
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("made", "budget", "failures"),
    [
        (code(17.0, 10.0), None, []),
        (code(17.0, 10.0), 27, []),
        (code(17.0, 10.0), 26.9, ["17.0+10.0 sass instructions a pair, the budget is 26.9"]),
        (code(), 20, ["no loop reads global memory, and the budget is 20 instructions a pair"]),
        (code(), None, []),
        (code(17.0, local_memory=8), 20, []),
        (code(17.0, local_memory=8, source="ptx"), 20, []),
        (code(17.0, local_memory=8, local_accesses=3), 20, ["3 accesses to local memory inside loops (8 bytes)"]),
        (
            code(17.0, local_memory=12, source="ptx"),
            20,
            [
                "12 bytes of local memory, and no nvdisasm here can tell whether inside a loop: "
                "NVDISASM can name one of CUDA 12"
            ],
        ),
    ],
)
def test_judge(made, budget, failures):
    assert compile_check.judge(made, budget) == failures


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (
            ("PTXAS error: Internal\nptxas a.ptx, line 9; error   : no .acq_rel\nptxas fatal   : aborted",),
            "no .acq_rel",
        ),
        (("ptxas fatal   : no such target",), "no such target"),
        (("PassManager::run failed", "toys.py:3:1: error: operand has no layout\n"), "operand has no layout"),
        (("", "LLVM ERROR: Cannot select: t1\nPLEASE submit a bug report"), "Cannot select: t1"),
        (("at 2:4:\n  x\n  ^\nNameError('nothing')\n\n", "a log"), "NameError('nothing')"),
        (("", ""), "no reason given"),
    ],
)
def test_the_telling_line_of_a_compiler(texts, line):
    assert compile_check._telling_line(*texts) == line


# What is compiled -----------------------------------------------------------------------------------------------------


def test_short_set_has_every_case_on_three_architectures_and_one_on_the_others():
    names = [f"case {i}" for i in range(6)]
    jobs = compile_check.plan([KernelFile("toys", ["a_kernel"], names), KernelFile("more", [], ["one"])])
    own = [job for job in jobs if job.file == "toys"]
    for arch in (60, 75, 90):
        assert [job.case for job in own if job.arch == arch] == names
        assert {job.dtype for job in own if job.arch == arch} == set(compile_check.DTYPES)
    for name in names:
        assert {job.dtype for job in own if job.case == name} == set(compile_check.DTYPES)
    assert {job.arch for job in own} == set(SMS) == set(compile_check.ARCHITECTURES)
    assert [job for job in own if job.arch == 120] == [Job("toys", "case 0", 120, "float16")]
    assert len(own) == 3 * 6 + 7
    assert len(jobs) - len(own) == 3 + 7


def test_narrowed_and_whole_sets():
    files = [KernelFile("toys", ["a_kernel"], ["one", "two"])]
    assert compile_check.plan(files, archs=[75], dtypes=["float16"]) == [
        Job("toys", "one", 75, "float16"),
        Job("toys", "two", 75, "float16"),
    ]
    assert len(compile_check.plan(files, archs=[75])) == 2 * 3
    assert len(compile_check.plan(files, dtypes=["float16"])) == 2 * 10
    assert len(compile_check.plan(files, everything=True)) == 2 * 10 * 3


# Kernels written here -------------------------------------------------------------------------------------------------

HEAD = """
import os, signal, sys, time
from pathlib import Path

import torch, triton
import triton.language as tl

from fastdistill.kernels.compile_case import CompileCase

def empty(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")
"""

GOOD = """
@triton.jit
def _tile(x_ptr, i, NT: tl.constexpr, VEC: tl.constexpr):
    return tl.load(x_ptr + i + tl.arange(0, NT)[:, None] * VEC + tl.arange(0, VEC)[None, :]).to(tl.float32)

@triton.jit
def good_kernel(x_ptr, y_ptr, n, NT: tl.constexpr, VEC: tl.constexpr):
    sums = tl.zeros([NT], tl.float32)
    for i in tl.range(0, n, NT * VEC, loop_unroll_factor=2):
        sums += tl.sum(_tile(x_ptr, i, NT, VEC), 1)
    tl.store(y_ptr + tl.arange(0, NT), sums)

def good(dtype):
    vec = 16 // dtype.itemsize
    for _ in range(2):
        good_kernel[(8,)](empty(1 << 20, dtype=dtype), empty(1 << 20), 1 << 20, NT=128, VEC=vec)

COMPILE_CASES = [
    CompileCase("good", good, streams=1, budget={"good_kernel": 20}),
    CompileCase("dear", good, streams=1, budget={"good_kernel": 1.5, "god_kernel": 9}),
]
"""

NARROW = """
@triton.jit
def narrow_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    for i in range(0, n, N):
        at = i + tl.arange(0, N)
        tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n, other=0.0), mask=at < n)

COMPILE_CASES = [
    CompileCase("narrow", lambda dtype: narrow_kernel[(8,)](*[empty(999, dtype=dtype) for _ in "xy"], 999, N=256))
]
"""

SPILL = """
@triton.jit
def spill_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.zeros([N], tl.float32), tl.zeros([N], tl.float32)
    for i in range(0, n, N):
        x = tl.load(x_ptr + i + at).to(tl.float32)
        b = b * tl.sum(x, 0) + a
        a += x
    tl.store(y_ptr + at, a * b)

COMPILE_CASES = [
    CompileCase("spill", lambda dtype: spill_kernel[(8,)](
        empty(81920, dtype=dtype), empty(81920), 81920, N=1024, num_warps=1, maxnreg=64))
]
"""

YOUNG = """
@triton.jit
def young_kernel(x_ptr, N: tl.constexpr):
    tl.atomic_add(x_ptr + tl.arange(0, N), 1.0)

@triton.jit
def after_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

def launch(dtype):
    young_kernel[(8,)](empty(64), N=64)
    after_kernel[(8,)](empty(64))

COMPILE_CASES = [CompileCase("young", launch)]
"""

LARGE = """
@triton.jit
def large_kernel(x_ptr, y_ptr, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(y_ptr + at, tl.trans(tl.load(x_ptr + at)))

COMPILE_CASES = [CompileCase("large", lambda dtype: large_kernel[(8,)](empty(1 << 14), empty(1 << 14), N=128))]
"""

CRASHES = """
@triton.jit
def calm_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

def abort(dtype):
    print("LLVM ERROR: Cannot select: t1", file=sys.stderr)
    os.abort()

def fail(dtype):
    os.write(2, b"toys.py:3:1: error: operand has no layout")
    raise RuntimeError("PassManager::run failed")

def be_wrong(dtype):
    raise TypeError("what came of it") from ValueError("the cause")

def be_calm(dtype):
    print("error: this is of another case")
    calm_kernel[(8,)](empty(64))

COMPILE_CASES = [
    CompileCase("1 leaves", lambda dtype: sys.exit(0)),
    CompileCase("2 aborts", abort),
    CompileCase("3 fails", fail),
    CompileCase("4 is calm", be_calm),
    CompileCase("5 aborts", abort),
    CompileCase("6 is wrong", be_wrong),
]
"""

IDLE = """
@triton.jit
def busy_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

@triton.jit
def idle_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

COMPILE_CASES = [CompileCase("busy", lambda dtype: busy_kernel[(8,)](empty(64)))]
"""

CASELESS = """
@triton.jit
def caseless_kernel(x_ptr):
    tl.store(x_ptr, 1.0)
"""

IMPORTS_ONLY = """
from toys_with_faults.caseless import caseless_kernel

@triton.jit
def helper(x_ptr):
    tl.store(x_ptr, 1.0)
"""

SLOW = """
@triton.jit
def slow_kernel(x_ptr):
    tl.store(x_ptr, 1.0)

def launch(dtype):
    os.write(1, b"a whole PTX file")
    os.write(2, b"another")
    Path(os.environ["STARTED"]).write_text(f"{os.getpid()} {type(slow_kernel).__name__}.")
    time.sleep(60)

COMPILE_CASES = [CompileCase("slow", launch)]
"""

PACKAGES = {
    "toys": {"good": GOOD, "narrow": NARROW, "spill": SPILL, "young": YOUNG, "large": LARGE, "crashes": CRASHES},
    "toys_with_faults": {
        "idle": IDLE,
        "caseless": CASELESS,
        "imports_only": IMPORTS_ONLY,
        "broken": "raise OSError('no such thing')",
    },
    "toys_slow": {"slow": SLOW},
    "toys_none": {"nothing": ""},
}


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory):
    """The folder of the packages above, from which they can be imported; nothing in the environment has a say."""
    folder = tmp_path_factory.mktemp("toys")
    for package, files in PACKAGES.items():
        (folder / package).mkdir()
        for name, text in files.items():
            (folder / package / f"{name}.py").write_text(HEAD + text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.delenv("NVDISASM", raising=False)
        patch.delenv("TRITON_INTERPRET", raising=False)
        yield folder


@pytest.fixture(scope="module")
def swept() -> compile_check.Report:
    """All toys on the architectures 60 and 90 in float16."""
    return compile_check.check("toys", archs=[60, 90], dtypes=["float16"])


@pytest.fixture
def result(swept):
    def find(case: str, arch: int, kernel: str = "_kernel") -> Result:
        (found,) = [each for each in swept.results if each.job[1:3] == (case, arch) and each.kernel.endswith(kernel)]
        return found

    return find


@pytest.mark.parametrize(("arch", "source"), [(60, "ptx"), (90, "sass")])
def test_a_good_kernel(result, arch, source):
    found = result("good", arch)
    assert found.failures == []
    made = found.code
    assert made.source == source
    assert made.warps == 4
    assert made.shared_memory == 0
    assert made.local_memory == 0
    assert 16 <= made.registers <= 64
    assert made.blocks * 4 / SMS[arch].warps == made.occupancy
    assert made.wide_share == 1
    assert len(made.loops) > 1  # unrolling leaves a rest
    (main,) = [loop for loop in made.loops if loop.is_main]
    assert main.load_bytes % 16 == 0
    assert main.pairs == main.load_bytes / 2
    assert main.instructions_per_pair == main.instructions / main.pairs
    assert made.passes == [main.instructions_per_pair]
    assert 1.5 < made.passes[0] < 6  # a conversion, an addition, and a share of the loop


@pytest.mark.parametrize("arch", [60, 90])
def test_a_kernel_over_its_budget(result, arch):
    (failure,) = result("dear", arch, "good_kernel").failures
    assert failure.endswith("instructions a pair, the budget is 1.5")


@pytest.mark.parametrize("budget", [17.5, {"float32": 12, "float16": 17.5}])
def test_a_budget_is_one_number_or_one_a_dtype(budget):
    assert compile_check._in_dtype(budget, "float16") == 17.5
    assert compile_check._in_dtype(None, "float16") is None


def test_a_budget_for_a_kernel_that_is_not_launched(result):
    assert result("dear", 60, "god_kernel").failures == ["has a budget, but the case never launches it"]


def test_a_masked_loop_of_two_byte_loads(result):
    found = result("narrow", 90)
    assert found.failures == []
    assert found.code.wide_share == 0
    (loop,) = found.code.loops
    assert loop.is_main
    assert loop.wide_load_bytes == 0
    assert loop.load_bytes == loop.store_bytes > 0
    assert loop.pairs == loop.load_bytes / 4


@pytest.mark.parametrize(("arch", "reason"), [(60, "no nvdisasm"), (90, "local memory inside loops")])
def test_a_kernel_that_spills(result, arch, reason):
    found = result("spill", arch)
    assert found.code.registers == 64
    assert found.code.local_memory > 100
    assert (found.code.local_accesses > 100) == (arch == 90)
    (failure,) = found.failures
    assert reason in failure


def test_a_kernel_that_an_old_architecture_cannot_run(result, swept):
    assert result("young", 60).failures == ["PTXASError: Feature '.acq_rel' requires .target sm_70 or higher"]
    assert result("young", 60).kernel == "young_kernel"
    assert result("young", 60).code is None
    assert result("young", 90, "young_kernel").failures == []
    assert result("young", 90, "after_kernel").failures == []


def test_a_kernel_that_asks_for_too_much_shared_memory(result):
    (failure,) = result("large", 60).failures
    assert failure.startswith("OutOfResources: out of resource: shared memory, Required: 65536, Hardware limit: 49152")
    assert result("large", 60).kernel == "large_kernel"
    assert result("large", 90).failures == []
    assert result("large", 90).code.shared_memory == 65536
    assert result("large", 90).code.blocks == 3


@pytest.mark.parametrize("arch", [60, 90])
def test_a_case_that_crashes_takes_no_other_with_it(result, arch):
    assert result("1 leaves", arch, "(compiler)").failures == ["exit code 0: no reason given"]
    for case in ("2 aborts", "5 aborts"):
        assert result(case, arch, "(compiler)").failures == ["exit code -6: Cannot select: t1"]
    assert result("3 fails", arch, "(launcher)").failures == ["RuntimeError: operand has no layout"]
    assert result("6 is wrong", arch, "(launcher)").failures == ["TypeError: the cause"]
    assert result("4 is calm", arch).failures == []


def test_every_kernel_is_there_once_and_in_order(swept):
    keys = [(each.job.file, each.kernel, each.job) for each in swept.results]
    assert keys == sorted(set(keys))
    assert swept.errors == []
    assert swept.compiled == sum(each.code is not None for each in swept.results)
    assert swept.failed == sum(bool(each.failures) for each in swept.results) > 0


def test_an_exception_ends_what_still_runs():
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_check.check("toys", archs=[60, 90], dtypes=["float16"], kernel="calm", progress=interrupt)
    assert multiprocessing.active_children() == []


def test_faults_of_whole_files_are_errors(tmp_path, capsys):
    file = tmp_path / "report.json"
    assert compile_check.main(options("--json", str(file)), "toys_with_faults") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-4:] == [
        "FAILED toys_with_faults.broken cannot be imported: exit code 1: OSError: no such thing",
        "FAILED toys_with_faults.caseless has caseless_kernel, and no COMPILE_CASES",
        "FAILED toys_with_faults.idle: idle_kernel is launched by no case",
        "10 compiled, 3 failed",
    ]
    assert [f"FAILED {error}" for error in json.loads(file.read_text())["errors"]] == out[-4:-1]


def test_only_the_short_set_and_the_whole_one_miss_launches():
    report = compile_check.check("toys_with_faults", archs=[90], dtypes=["float16"])
    assert [error.split()[0] for error in report.errors] == ["toys_with_faults.broken", "toys_with_faults.caseless"]


def test_a_case_that_broke_accuses_no_kernel_of_being_idle():
    files = [KernelFile("toys", ["a_kernel", "b_kernel"], ["one"])]
    job = Job("toys", "one", 60, "float16")
    broken = Result("a_kernel", job, ["reason"])
    assert compile_check._never_launched(files, [broken]) == []
    assert compile_check._never_launched(files, [Result("a_kernel", job, ["reason"], code(17.0))]) == [
        "toys: b_kernel is launched by no case"
    ]


def test_narrowed_to_a_kernel_what_keeps_it_from_being_launched_is_told():
    report = compile_check.check("toys", archs=[60, 90], dtypes=["float16"], kernel="after")
    assert [(each.kernel, each.job.arch) for each in report.results] == [("after_kernel", 90), ("young_kernel", 60)]


def test_progress_counts_all_cases_to_the_last():
    seen = []
    compile_check.check("toys", archs=[90], dtypes=["float16"], kernel="calm", progress=lambda *at: seen.append(at))
    assert seen == [(i, 6) for i in range(1, 7)]


def test_the_kernels_of_the_project_pass_the_short_set():
    report = compile_check.check()
    assert report.errors == []
    assert [f"{each.kernel}, {each.job}: {each.failures}" for each in report.results if each.failures] == []
    defined = {
        node.name
        for file in (ROOT / "kernels").glob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list
    }
    assert {each.kernel for each in report.results} == defined


# The report -----------------------------------------------------------------------------------------------------------


def row(kernel: str, arch: int, *failures: str, **changes) -> Result:
    return Result(kernel, Job("toys", "one", arch, "float16"), list(failures), code(17.0, 9.96, **changes))


def test_the_table_has_a_row_a_kernel_and_architecture_with_the_worst_values():
    results = [
        row("b_kernel", 60),
        row("a_kernel", 90, "slow", "large"),
        row("a_kernel", 90, registers=99, occupancy=0.25, blocks=2, local_memory=8, loops=[], wide_share=None),
        row("a_kernel", 90, warps=16, shared_memory=4096, wide_share=0.5, registers=7),
        Result("a_kernel", Job("toys", "two", 90, "float16"), ["no"]),
        Result("c_kernel", Job("toys", "two", 90, "float16"), ["no"]),
    ]
    assert words(compile_check.table(results)) == [
        "kernel arch forms regs spill smem warps occupancy 16-byte instr/pair verdict",
        "a_kernel 90 4 99 8 4096 16 25% 2 by registers 50% 17.0+10.0 sass 2 failed",
        "b_kernel 60 1 40 0 32 8 75% 6 by registers 100% 17.0+10.0 sass ok",
        "c_kernel 90 1 - - - - - - - 1 failed",
    ]


def test_the_long_table_has_a_row_a_form():
    results = [row("a_kernel", 60), row("a_kernel", 90, "slow", "large", wide_share=None, loops=[])]
    table = compile_check.table(results, verbose=True)
    assert words(table) == [
        "kernel case arch dtype regs spill smem warps occupancy 16-byte instr/pair verdict",
        "a_kernel one 60 float16 40 0 32 8 75% 6 by registers 100% 17.0+10.0 sass ok",
        "a_kernel one 90 float16 40 0 32 8 75% 6 by registers - - slow; large",
    ]
    head, first, second = table.splitlines()
    assert head.index("16-byte") == first.index("100%") == second.index("- ")


def words(table: str) -> list[str]:
    return [" ".join(line.split()) for line in table.splitlines()]


# The command ----------------------------------------------------------------------------------------------------------


def options(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    compile_check.add_arguments(parser)
    return parser.parse_args(given)


def test_the_command_on_a_kernel_that_passes(tmp_path, capsys):
    file = tmp_path / "report.json"
    given = options("--arch", "90,61", "--dtype", "float16", "--kernel", "narrow", "--json", str(file), "--verbose")
    assert compile_check.main(given, "toys") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:4] for line in out[1:-1]] == [
        ["narrow_kernel", "narrow", "61", "float16"],
        ["narrow_kernel", "narrow", "90", "float16"],
    ]
    assert out[-1] == "2 compiled, 0 failed"
    content = json.loads(file.read_text())
    assert content["versions"].keys() == {"triton", "torch", "ptxas", "nvdisasm"}
    assert all(version[0].isdigit() for version in content["versions"]["ptxas"] + content["versions"]["nvdisasm"])
    assert content["errors"] == []
    first, second = content["results"]
    assert {key: first[key] for key in ("file", "case", "arch", "dtype", "kernel", "failures")} == {
        "file": "toys.narrow",
        "case": "narrow",
        "arch": 61,
        "dtype": "float16",
        "kernel": "narrow_kernel",
        "failures": [],
    }
    assert first["code"]["source"] == "ptx"
    assert second["code"].keys() == {field.name for field in dataclasses.fields(Code)}
    assert second["code"]["loops"][0].keys() == {field.name for field in dataclasses.fields(Loop)}


def test_the_command_on_a_kernel_that_fails(tmp_path, capsys):
    file = tmp_path / "report.json"
    given = options("--arch", "60", "--dtype", "float16", "--kernel", "young", "--json", str(file))
    assert compile_check.main(given, "toys") == 1
    out = capsys.readouterr().out.splitlines()
    assert out[-2:] == [
        "FAILED young_kernel, young, sm_60, float16: PTXASError: Feature '.acq_rel' requires .target sm_70 or higher",
        "0 compiled, 1 failed",
    ]
    (only,) = json.loads(file.read_text())["results"]
    assert only["code"] is None
    assert only["failures"] == ["PTXASError: Feature '.acq_rel' requires .target sm_70 or higher"]


def test_the_command_where_there_is_no_kernel(capsys):
    assert compile_check.main(options(), "toys_none") == 0
    assert capsys.readouterr().out == "0 compiled, 0 failed\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--arch", "60,65"], "--arch must be some of 60, 61, 70, 75, 80, 86, 89, 90, 100, 120, separated by commas"),
        (["--arch", ""], "--arch must be some of 60, 61, 70, 75, 80, 86, 89, 90, 100, 120, separated by commas"),
        (["--dtype", "half"], "--dtype must be some of float32, float16, bfloat16, separated by commas, got 'half'"),
        (["--json", "nowhere/report.json"], "--json must be a file in a folder that exists, got nowhere/report.json"),
        (["--kernel", "nothing"], "--kernel must be part of a kernel's name, got 'nothing'"),
    ],
)
def test_wrong_options_are_named_in_one_line(given, message, capsys):
    assert compile_check.main(options(*given), "toys_slow") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"fastdistill compile-check: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("tool", "reason"), [("/nowhere/nvdisasm", "No such file"), (sys.executable, "'Python 3")])
def test_an_nvdisasm_that_is_none(tool, reason, monkeypatch, capsys):
    monkeypatch.setenv("NVDISASM", tool)
    assert compile_check.main(options(), "toys_slow") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"fastdistill compile-check: {tool} must be a program of the CUDA toolkit: ")
    assert reason in err


def test_without_triton_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert compile_check.main(options(), "toys_slow") == 2
    assert capsys.readouterr().err == (
        "fastdistill compile-check: Triton is needed: pip install triton (on Linux x86_64)\n"
    )


def test_it_is_a_command_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastdistill", "compile-check", "--arch", "65"])
    assert fastdistill.__main__.main() == 2
    assert capsys.readouterr().err.startswith("fastdistill compile-check: --arch must be some of 60, ")


def start(toys: Path, started: Path) -> subprocess.Popen:
    """The command on the slow toy, in an interpreter and a process group of its own, under Triton's interpreter."""
    program = """if __name__ == "__main__":
        import argparse, sys
        from fastdistill import compile_check
        parser = argparse.ArgumentParser()
        compile_check.add_arguments(parser)
        sys.exit(compile_check.main(parser.parse_args(), "toys_slow"))
    """
    (toys / "run.py").write_text(program)
    path = os.pathsep.join([str(ROOT), str(toys)])
    return subprocess.Popen(
        [sys.executable, toys / "run.py", "--arch", "90", "--dtype", "float16"],
        preexec_fn=heed_ctrl_c,
        env=os.environ | {"PYTHONPATH": path, "STARTED": str(started), "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def heed_ctrl_c() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so does what that starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_the_command_and_what_it_started(toys, tmp_path):
    """Sent to the whole group, as a terminal does, or to the command alone. And nothing else is on the terminal."""
    files = [tmp_path / "group", tmp_path / "alone"]
    commands = [start(toys, file) for file in files]
    for file in files:
        wait_until(lambda file=file: file.exists() and file.read_text().endswith("."), 60)
    os.killpg(commands[0].pid, signal.SIGINT)
    commands[1].send_signal(signal.SIGINT)
    for command, file in zip(commands, files, strict=True):
        out, err = command.communicate(timeout=20)
        assert (out, err, command.returncode) == ("", "interrupted\n", 130)
        pid, kind = file.read_text().rstrip(".").split()
        assert kind == "JITFunction", "the interpreter in the environment has replaced the compiler"
        wait_until(lambda pid=pid: not alive(int(pid)), 10)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)
