"""The command line of the library: `fastdistill <command>`, or `python -m fastdistill <command>`."""

from __future__ import annotations

import argparse
import sys

import fastdistill
from fastdistill import compile_check


def main() -> int:
    parser = argparse.ArgumentParser(prog="fastdistill", description=fastdistill.__doc__)
    parser.add_argument("--version", action="version", version=fastdistill.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("verify", help="check that this installation behaves as it says; exit code 0 if it does")
    compile_check.add_arguments(
        commands.add_parser(
            "compile-check", help="compile every kernel for GPUs that are not here; exit code 0 if all pass"
        )
    )
    options = parser.parse_args()
    return compile_check.main(options) if options.command == "compile-check" else _verify()


def _verify() -> int:
    try:
        from fastdistill.training import verify
    except ImportError as error:
        print(
            f"fastdistill verify needs the [train] extra (pip install 'fastdistill[train]'): {error}", file=sys.stderr
        )
        return 2
    return verify.main()


if __name__ == "__main__":
    sys.exit(main())
