"""The command line of the library: `fastdistill <command>`, or `python -m fastdistill <command>`."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import fastdistill
from fastdistill import compile_check
from fastdistill.training import doctor


def main() -> int:
    parser = make_parser()
    options, rest = parser.parse_known_args()
    if options.command == "evaluate":  # its flags derive from a dataclass that needs the extra
        return _training("evaluate", "panel_report").main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    match options.command:
        case "compile-check":
            return compile_check.main(options)
        case "doctor":
            return doctor.main(options)
        case "report":
            return _training("report").main(options.run)
        case _:
            return _training("verify").main()


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastdistill", description=fastdistill.__doc__)
    parser.add_argument("--version", action="version", version=fastdistill.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_arguments(
        commands.add_parser(
            "doctor", help="what this machine has, and what a preset takes on it; exit code 0 if it is ready"
        )
    )
    commands.add_parser("verify", help="check that this installation behaves as it says; exit code 0 if it does")
    commands.add_parser(
        "evaluate",
        add_help=False,
        help="measure a student on held-out text, beside its teacher: perplexity and retention",
    )
    report = commands.add_parser("report", help="write the report of a run anew, from the files in its folder")
    report.add_argument("run", type=Path, metavar="RUN", help="the folder of a run of train.py, finished or not")
    compile_check.add_arguments(
        commands.add_parser(
            "compile-check", help="compile every kernel for GPUs that are not here; exit code 0 if all pass"
        )
    )
    return parser


def _training(command: str, module: str | None = None) -> ModuleType:
    """The module of a command that needs the [train] extra; without it the program ends with a line that says so."""
    try:
        return importlib.import_module(f"fastdistill.training.{module or command}")
    except ImportError as error:
        needs = f"fastdistill {command} needs the [train] extra (pip install 'fastdistill[train]')"
        print(f"{needs}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    sys.exit(main())
