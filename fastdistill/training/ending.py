"""How a run ends that does not come to its end: its exit code, and a last line that says what to do."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from fastdistill.training.config import UsageError
from fastdistill.training.guard import TrainingFault
from fastdistill.training.stop import Stopped
from fastdistill.training.whole import is_disk_full


def ending(error: BaseException, output: Path | None) -> tuple[int, str]:
    """Exit code and message for what ended the run in the folder `output`; what is a fault of the program is raised.

    2 for what was asked wrongly, 1 where training could not go on, 0 for a stop that a setting asked for, 130 for an
    interruption.
    """
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, Stopped | KeyboardInterrupt):
        code = 0 if isinstance(error, Stopped) and error.asked else 130
        return code, (str(error) or "interrupted") + how_to_go_on(output, [])
    if isinstance(error, TrainingFault):
        return 1, f"stopped: {error}" + how_to_go_on(output, error.go_on)
    if is_disk_full(error):
        return 1, f"stopped: cannot write: {error}" + how_to_go_on(output, [])
    raise error


def how_to_go_on(output: Path | None, flags: list[str] | None) -> str:
    """The command that goes on with the run in `output`; nothing where it would end as before."""
    if output is None or flags is None:
        return ""
    command = shlex.join(["train.py", "--resume", "--output-dir", str(output), *flags])
    launcher = "(launched as before)" if "WORLD_SIZE" in os.environ else shlex.quote(os.path.relpath(sys.executable))
    return f". To go on:\n  {launcher} {command}"
