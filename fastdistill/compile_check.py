"""`fastdistill compile-check`: every kernel compiled for GPUs that are not here, and what came out.

Each file of kernels/ exports `COMPILE_CASES` (see kernels/compile_case.py), which call the real launchers: what is
compiled is what a GPU of that architecture would be given, its launch table's choice included. A kernel fails that

- does not compile, or asks for more shared memory than a block can have on the architecture;
- accesses local memory inside a loop (spilled registers), or has more than `UNSEEN_SPILL` bytes of it where only PTX
  can be counted, since ptxas spills later than that;
- takes more instructions a pair than its budget: the sum over its main loops (`machine_code.main_loops`) of the
  instructions of one trip over the pairs that a thread reads in it. A launch that goes over its tensors twice has two
  main loops, and one budget for both. Counted from SASS if an nvdisasm knows the architecture, else from PTX;
- is launched by no case, or has no case at all.

A kernel is a `@triton.jit` function whose name ends in `_kernel`; others are parts of kernels. Every architecture has a
process of its own, so that a launcher may keep what it has found out about its GPU; a compiler that crashes takes one
case with it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastdistill import machine_code

if TYPE_CHECKING:
    from fastdistill.absent_gpu import Launch

ARCHITECTURES = (60, 61, 70, 75, 80, 86, 89, 90, 100, 120)
DTYPES = ("float32", "float16", "bfloat16")
SHORT_ARCHITECTURES = (60, 75, 90)
"""Emulated bfloat16 and 48 KB of shared memory; the least threads a multiprocessor; what most clouds have."""


UNSEEN_SPILL = 8
"""Bytes of local memory that pass where no SASS tells where they are used: ptxas keeps a value or two of a kernel's
beginning there until its end, if that lets one more block into the multiprocessor."""


class Job(NamedTuple):
    """One case to compile."""

    file: str
    """The module, dotted."""
    case: str
    arch: int
    dtype: str


@dataclass(frozen=True)
class Loop:
    """An innermost loop that loads from global memory; counts are those of one trip of one thread."""

    is_main: bool
    pairs: float
    instructions: int
    instructions_per_pair: float
    load_bytes: int
    wide_load_bytes: int
    store_bytes: int
    local_accesses: int


@dataclass(frozen=True)
class Code:
    """What the compiler made of one kernel."""

    registers: int
    local_memory: int
    """Bytes of a thread: spilled registers."""
    shared_memory: int
    """Bytes of a block."""
    warps: int
    """Of a block."""
    blocks: int
    """That a multiprocessor holds."""
    occupancy: float
    """Share of a multiprocessor's warps that they fill."""
    limit: str
    """What keeps it from holding more."""
    source: str
    """What loops were counted from: "sass" or "ptx"."""
    wide_share: float | None
    """Of the bytes that loops load from global memory, the share loaded 16 bytes at a time; None if they load none."""
    local_accesses: int
    """Instructions inside loops that access local memory."""
    loops: list[Loop]
    """In the order of the program."""

    @property
    def passes(self) -> list[float]:
        """Instructions a pair of each main loop, in the order of the program."""
        return [loop.instructions_per_pair for loop in self.loops if loop.is_main]


@dataclass(frozen=True)
class Result:
    """One kernel of one case; or a case that broke, where `code` is None."""

    kernel: str
    job: Job
    failures: list[str]
    code: Code | None = None


@dataclass(frozen=True)
class KernelFile:
    """A module of kernels/ by what it exports."""

    module: str
    kernels: list[str]
    cases: list[str]


@dataclass(frozen=True)
class Report:
    """All that was compiled, and what is wrong with whole files."""

    results: list[Result]
    errors: list[str]

    @property
    def compiled(self) -> int:
        return sum(result.code is not None for result in self.results)

    @property
    def failed(self) -> int:
        return sum(bool(result.failures) for result in self.results) + len(self.errors)


# In a worker ----------------------------------------------------------------------------------------------------------


def measure(launch: Launch, arch: int, pair_bytes: int) -> Code:
    """Read the machine code of a launch; a pair takes `pair_bytes` bytes of loads."""
    from fastdistill.absent_gpu import SMS

    registers, local_memory = machine_code.resource_usage(launch.cubin)
    fits = machine_code.occupancy(arch, SMS[arch], registers, launch.num_warps, launch.shared_memory)
    sass = machine_code.disassemble(launch.cubin)
    program = machine_code.parse_ptx(launch.ptx) if sass is None else machine_code.parse_sass(sass)
    innermost, together = machine_code.find_loops(program)
    mains = machine_code.main_loops(innermost)
    return Code(
        registers=registers,
        local_memory=local_memory,
        shared_memory=launch.shared_memory,
        warps=launch.num_warps,
        blocks=fits.blocks,
        occupancy=fits.share,
        limit=fits.limit,
        source="ptx" if sass is None else "sass",
        wide_share=together.wide_load_bytes / together.load_bytes if together.load_bytes else None,
        local_accesses=together.local_accesses,
        loops=[
            Loop(
                is_main=any(loop is main for main in mains),
                pairs=loop.load_bytes / pair_bytes,
                instructions=loop.instructions,
                instructions_per_pair=loop.instructions * pair_bytes / loop.load_bytes,
                load_bytes=loop.load_bytes,
                wide_load_bytes=loop.wide_load_bytes,
                store_bytes=loop.store_bytes,
                local_accesses=loop.local_accesses,
            )
            for loop in innermost
            if loop.load_bytes
        ],
    )


def judge(code: Code, budget: float | None) -> list[str]:
    """What is wrong with it, a line each."""
    failures = []
    if code.local_accesses:
        failures.append(f"{code.local_accesses} accesses to local memory inside loops ({code.local_memory} bytes)")
    elif code.source == "ptx" and code.local_memory > UNSEEN_SPILL:
        failures.append(
            f"{code.local_memory} bytes of local memory, and no nvdisasm here can tell whether inside a loop: "
            "NVDISASM can name one of CUDA 12"
        )
    if budget is not None and not code.passes:
        failures.append(f"no loop reads global memory, and the budget is {budget:g} instructions a pair")
    elif budget is not None and sum(code.passes) > budget:
        failures.append(f"{_instructions(code)} instructions a pair, the budget is {budget:g}")
    return failures


def _compile(log: Path, jobs: Sequence[Job]) -> Iterator[list[Result]]:
    for job in jobs:
        sys.stdout.flush()
        os.truncate(log, 0)
        yield _compile_case(log, job)


def _compile_case(log: Path, job: Job) -> list[Result]:
    from fastdistill import absent_gpu

    launches: dict[tuple[str, bytes], Launch] = {}
    absent_gpu.activate(job.arch, lambda launch: launches.update({(launch.name, launch.cubin): launch}))
    case = next(case for case in importlib.import_module(job.file).COMPILE_CASES if case.name == job.case)
    dtype = getattr(torch, job.dtype)
    broken = []
    try:
        case.launch(dtype)
    except Exception as error:  # whatever breaks a case is a finding
        reason = f"{type(error).__name__}: {_telling_line(_root_of(error), log.read_text())}"
        broken.append(Result(_kernel_that_raised(error), job, [reason]))
    results = []
    for launch in launches.values():
        code = measure(launch, job.arch, case.streams * (case.stream_dtype or dtype).itemsize)
        results.append(Result(launch.name, job, judge(code, _in_dtype(case.budget.get(launch.name), job.dtype)), code))
    if not broken:
        strangers = sorted(case.budget.keys() - {result.kernel for result in results})
        broken = [Result(name, job, ["has a budget, but the case never launches it"]) for name in strangers]
    return results + broken


def _in_dtype(budget: float | Mapping[str, float] | None, dtype: str) -> float | None:
    return budget[dtype] if isinstance(budget, Mapping) else budget


def _kernel_that_raised(error: BaseException) -> str:
    from triton.runtime.jit import JITFunction

    owners = (frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__))
    return next((owner.__name__ for owner in owners if isinstance(owner, JITFunction)), "(launcher)")


def _describe(_: Path, module: str) -> Iterator[KernelFile]:
    contents = vars(importlib.import_module(module))
    kernels = [
        name
        for name, value in contents.items()
        if name.endswith("_kernel") and getattr(getattr(value, "fn", None), "__module__", None) == module
    ]
    yield KernelFile(module, kernels, [case.name for case in contents.get("COMPILE_CASES", [])])


def _versions(_: Path) -> Iterator[dict[str, str | list[str]]]:
    import triton
    from triton import knobs

    version = machine_code.tool_version
    assemblers = sorted(Path(knobs.nvidia.ptxas.path).parent.glob("ptxas*"))  # newer ones have one for Blackwell too
    yield {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "ptxas": [version(str(tool)) for tool in assemblers],
        "nvdisasm": [version(tool) for tool in machine_code.disassemblers()],
    }


def _root_of(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _telling_line(*texts: str) -> str:
    """What follows the first "error:" or "fatal:" of a compiler; else the last line of the first text that has any."""
    lines = [line.strip() for text in texts for line in text.splitlines()]
    if called := next(
        filter(None, (re.search(r"(?:(?<!PTXAS )\berror|fatal|LLVM ERROR)\s*:\s*(.+)", line) for line in lines)), None
    ):
        return called[1]
    return next((text.strip().splitlines()[-1].strip() for text in texts if text.strip()), "no reason given")


# The sweep ------------------------------------------------------------------------------------------------------------


class WorkerDied(Exception):
    """A worker ended without a result; the message says why."""


class _Worker:
    """A fresh process that sends what `function(log, *arguments)` yields to `receiver`, which ends with it.

    Its output, and that of the programs that it starts, goes to the file `log` instead of the terminal.
    """

    def __init__(self, function: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["triton.runtime.jit", "fastdistill.compile_check"])
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "log"
        self.log.touch()
        self.receiver, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=_send_all, args=(sender, self.log, function, arguments), daemon=True)
        self.process.start()
        sender.close()

    def end(self) -> str:
        """Wait for the end of a worker whose receiver has ended; how it ended."""
        self.process.join()
        reason = _telling_line(self.log.read_text())
        self.folder.cleanup()
        return f"exit code {self.process.exitcode}: {reason}"

    def kill(self) -> None:
        self.process.kill()
        self.end()


def _send_all(sender: Any, log: Path, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    with log.open("ab") as file:  # Triton and LLVM write to the descriptors, whole PTX files among the rest
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for result in function(log, *arguments):
        sender.send(result)


def _in_a_process(function: Callable[..., Iterator[Any]], *arguments: Any) -> Any:
    """The one thing that `function` yields in a worker."""
    worker = _Worker(function, *arguments)
    try:
        result = worker.receiver.recv()
    except EOFError:
        raise WorkerDied(worker.end()) from None
    except BaseException:
        worker.kill()
        raise
    worker.end()
    return result


def plan(
    files: Iterable[KernelFile],
    archs: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    everything: bool = False,
) -> list[Job]:
    """Every case on every architecture in every dtype if `everything`, or on and in those given if any are.

    Else the short set: every case on sm_60, 75 and 90, in another dtype on each, by turns; and each file's first case
    on the other architectures in float16.
    """
    jobs = []
    for file in files:
        if everything or archs or dtypes:
            forms = list(product(file.cases, archs or ARCHITECTURES, dtypes or DTYPES))
        else:
            others = [arch for arch in ARCHITECTURES if arch not in SHORT_ARCHITECTURES]
            forms = list(product(file.cases[:1], others, ["float16"]))
            for i, case in enumerate(file.cases):
                forms += [(case, arch, DTYPES[(i + j) % 3]) for j, arch in enumerate(SHORT_ARCHITECTURES)]
        jobs += [Job(file.module, *form) for form in forms]
    return jobs


def check(
    package: str = "fastdistill.kernels",
    archs: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    kernel: str = "",
    everything: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compile the kernels of a package whose names contain `kernel`; see `plan` for which forms.

    `progress` is called with the number of cases done and of all. That every kernel is launched is checked where none
    was left out.
    """
    errors: list[str] = []
    files: list[KernelFile] = []
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    for module in sorted(f"{package}.{each.name}" for each in found):
        try:
            file = _in_a_process(_describe, module)
        except WorkerDied as died:
            errors.append(f"{module} cannot be imported: {died}")
            continue
        if any(kernel in name for name in file.kernels):
            files.append(file)
    errors += [f"{file.module} has {', '.join(file.kernels)}, and no COMPILE_CASES" for file in files if not file.cases]
    jobs = plan(files, archs, dtypes, everything)
    results = [result for result in _compile_all(jobs, progress) if kernel in result.kernel or not result.code]
    if not (archs or dtypes or kernel):
        errors += _never_launched(files, results)
    return Report(sorted(results, key=lambda result: (result.job.file, result.kernel, result.job)), errors)


def _compile_all(jobs: Sequence[Job], progress: Callable[[int, int], None]) -> list[Result]:
    """The results of all jobs, in parallel; a process has the cases of one file and architecture."""
    by_process = groupby(sorted(jobs, key=_process_of), key=_process_of)
    waiting = sorted((list(group) for _, group in by_process), key=len)
    running: dict[_Worker, list[Job]] = {}
    results: list[Result] = []
    finished = 0
    try:
        while waiting or running:
            while waiting and len(running) < len(os.sched_getaffinity(0)):
                group = waiting.pop()
                running[_Worker(_compile, group)] = group
            ready = multiprocessing.connection.wait([worker.receiver for worker in running])
            for worker in [each for each in running if each.receiver in ready]:
                left = running[worker]
                try:
                    results += worker.receiver.recv()
                except EOFError:
                    del running[worker]
                    how = worker.end()
                    if not left:
                        continue
                    results.append(Result("(compiler)", left[0], [how]))
                    waiting.append(left[1:])
                del left[0]
                finished += 1
                progress(finished, len(jobs))
    finally:
        for worker in running:
            worker.kill()
    return results


def _process_of(job: Job) -> tuple[str, int]:
    return job.file, job.arch


def _never_launched(files: Iterable[KernelFile], results: Sequence[Result]) -> list[str]:
    """Kernels that no case launches, of files whose cases all ran to their end."""
    errors = []
    for file in files:
        own = [result for result in results if result.job.file == file.module]
        if file.cases and all(result.code for result in own):
            missing = [name for name in file.kernels if name not in {result.kernel for result in own}]
            errors += [f"{file.module}: {name} is launched by no case" for name in missing]
    return errors


# The report -----------------------------------------------------------------------------------------------------------


MEASURES = ["regs", "spill", "smem", "warps", "occupancy", "16-byte", "instr/pair"]


def _instructions(code: Code) -> str:
    return f"{'+'.join(f'{each:.1f}' for each in code.passes)} {code.source}" if code.passes else "-"


def _occupancy(code: Code) -> str:
    return f"{code.occupancy:.0%} {code.blocks} by {code.limit}"


def _measures(codes: Sequence[Code]) -> list[str]:
    """Cells of a row: the worst of some forms of a kernel."""
    if not codes:
        return ["-"] * len(MEASURES)
    shares = [code.wide_share for code in codes if code.wide_share is not None]
    return [
        str(max(code.registers for code in codes)),
        str(max(code.local_memory for code in codes)),
        str(max(code.shared_memory for code in codes)),
        str(max(code.warps for code in codes)),
        _occupancy(min(codes, key=lambda code: code.occupancy)),
        f"{min(shares):.0%}" if shares else "-",
        _instructions(max(codes, key=lambda code: sum(code.passes))),
    ]


def table(results: Sequence[Result], verbose: bool = False) -> str:
    """A row a result if `verbose`, else a row a kernel and architecture with the worst values of its forms."""

    def codes(some: Iterable[Result]) -> list[Code]:
        return [result.code for result in some if result.code]

    if verbose:
        rows = [["kernel", "case", "arch", "dtype", *MEASURES, "verdict"]]
        for result in results:
            verdict = "; ".join(result.failures) or "ok"
            job = result.job
            rows.append([result.kernel, job.case, str(job.arch), job.dtype, *_measures(codes([result])), verdict])
    else:
        rows = [["kernel", "arch", "forms", *MEASURES, "verdict"]]
        for (_, kernel, arch), group in groupby(sorted(results, key=_kernel_and_arch), key=_kernel_and_arch):
            forms = list(group)
            failed = sum(bool(result.failures) for result in forms)
            verdict = f"{failed} failed" if failed else "ok"
            rows.append([kernel, str(arch), str(len(forms)), *_measures(codes(forms)), verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _kernel_and_arch(result: Result) -> tuple[str, str, int]:
    return result.job.file, result.kernel, result.job.arch


def _print_report(report: Report, verbose: bool) -> None:
    if report.results:
        print(table(report.results, verbose))
    for result in report.results:
        for failure in result.failures:
            print(f"FAILED {result.kernel}, {result.job.case}, sm_{result.job.arch}, {result.job.dtype}: {failure}")
    for error in report.errors:
        print(f"FAILED {error}")
    print(f"{report.compiled} compiled, {report.failed} failed")


def _write_json(file: Path, report: Report) -> None:
    results = [
        result.job._asdict()
        | {"kernel": result.kernel, "failures": result.failures, "code": result.code and asdict(result.code)}
        for result in report.results
    ]
    content = {"versions": _in_a_process(_versions), "results": results, "errors": report.errors}
    file.write_text(json.dumps(content, indent=1) + "\n")


# The command ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastdistill compile-check`; `main` checks their values."""
    parser.add_argument("--all", action="store_true", help="every case on every architecture in every dtype")
    parser.add_argument("--arch", metavar="60,75", help=f"every case on these alone, of {_listed(ARCHITECTURES)}")
    parser.add_argument("--dtype", metavar="float16", help=f"every case in these alone, of {_listed(DTYPES)}")
    parser.add_argument("--kernel", metavar="PART", default="", help="only kernels whose names contain this")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything there: loops and versions too")
    parser.add_argument("--verbose", action="store_true", help="a row a case and dtype, not a kernel and architecture")


def main(options: argparse.Namespace, package: str = "fastdistill.kernels") -> int:
    """0 if every kernel compiles as it should, 1 if any does not, 2 if the options make no sense, 130 on Ctrl-C."""
    os.environ.pop("TRITON_INTERPRET", None)  # it would replace the compiler in the workers
    try:
        archs = _chosen("--arch", options.arch, ARCHITECTURES)
        dtypes = _chosen("--dtype", options.dtype, DTYPES)
        if options.json and not options.json.resolve().parent.is_dir():
            raise ValueError(f"--json must be a file in a folder that exists, got {options.json}")
        if importlib.util.find_spec("triton") is None:
            raise ValueError("Triton is needed: pip install triton (on Linux x86_64)")
        if named := os.environ.get("NVDISASM"):
            machine_code.tool_version(named)
        report = check(package, archs, dtypes, options.kernel, options.all, _show_progress)
        if options.kernel and not (report.results or report.errors):
            raise ValueError(f"--kernel must be part of a kernel's name, got {options.kernel!r}")
        if options.json:
            _write_json(options.json, report)
    except ValueError as error:
        print(f"fastdistill compile-check: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    _print_report(report, options.verbose)
    return 1 if report.failed else 0


def _chosen(option: str, given: str | None, allowed: Sequence[Any]) -> list[Any] | None:
    if given is None:
        return None
    names = given.split(",")
    if not set(names) <= set(map(str, allowed)):
        raise ValueError(f"{option} must be some of {_listed(allowed)}, separated by commas, got {given!r}")
    return [value for value in allowed if str(value) in names]


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done} of {total} cases", end="\n" if done == total else "", file=sys.stderr, flush=True)
