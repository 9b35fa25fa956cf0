"""From a command line to a configuration: defaults, then a preset or a file of settings, then flags."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastdistill.training.config import MAY_CHANGE_ON_RESUME, Config, UsageError, dashed, nearest, scalar_type
from fastdistill.training.presets import PRESETS
from fastdistill.training.settings_file import read_settings


class Parser(argparse.ArgumentParser):
    """A parser of flags that derive from a dataclass; what it cannot read is a `UsageError`."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def add_fields(self, of: type) -> None:
        """A flag for each field of a dataclass that is a `flag`; what is not given is left out."""
        hints = typing.get_type_hints(of)
        for f in (f for f in dataclasses.fields(of) if f.metadata):
            text = f.metadata["help"].replace("%", "%%") + f" (default: {f.default})"
            kind = scalar_type(hints[f.name])
            how: dict[str, Any] = {"type": kind, "metavar": kind.__name__}
            if kind is bool:
                how = {"action": argparse.BooleanOptionalAction}
            self.add_argument(f"--{dashed(f.name)}", default=argparse.SUPPRESS, help=text, **how)

    def flags(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """Those that are given, by name."""
        given, unknown = self.parse_known_args(argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            raise UsageError(f"unknown argument {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
        return vars(given)


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration of a command line, all checked."""
    parser = Parser(description="Distil a causal language model into a smaller one.")
    parser.add_argument(
        "--config",
        metavar="str",
        default=argparse.SUPPRESS,
        help="file of base settings, JSON or YAML, named like the flags with _ for -; a run's config.json is one, and\n"
        "starts the run anew in a folder of its own",
    )
    parser.add_fields(Config)
    flags = parser.flags(argv)
    if "preset" in flags and "config" in flags:
        raise UsageError("--preset and --config are both given: each is the base that flags change, choose one")
    if flags.get("resume"):
        return _resumed(flags)
    if "config" in flags:
        flags = _of_file(Path(flags.pop("config"))) | flags
    elif "teacher" not in flags:  # one's own is not to be distilled as the demo's is, on a tenth of the text
        flags.setdefault("preset", "demo")
    preset = PRESETS.get(flags.get("preset", ""))
    return Config(**(preset.settings if preset else {}) | flags)


def introduction(config: Config) -> str:
    """What the run's preset is and is expected to need, as lines of the log; nothing without a preset."""
    if config.preset is None:
        return ""
    preset = PRESETS[config.preset]
    as_it_stands = Config(preset=config.preset, **preset.settings)
    fields = [f.name for f in dataclasses.fields(Config) if f.name not in ("output_dir", "resume", "seed")]
    changed = [f"--{dashed(name)}" for name in fields if getattr(config, name) != getattr(as_it_stands, name)]
    unlike = f"\n(of the preset as it stands; changed here: {', '.join(changed)})" if changed else ""
    return f"\npreset {config.preset}: {preset.about}{unlike}"


def _of_file(path: Path) -> dict[str, Any]:
    """The settings of a `--config` file, for a new run: a saved one's own folder is not theirs."""
    settings = read_settings(path, called=f"--config {path}")
    if settings.pop("resume", False):
        raise UsageError(f"--config {path}: resume is a flag alone: --resume --output-dir, the run to go on with")
    output = settings.get("output_dir")
    if output is not None and Path(output).resolve() == path.resolve().parent:
        del settings["output_dir"]
    return settings


def _resumed(flags: dict[str, Any]) -> Config:
    """The saved configuration of the run, with the flags that may change it."""
    if "config" in flags:
        raise UsageError("--resume goes on with the settings that its run has: leave --config out")
    if "output_dir" not in flags:
        raise UsageError("--resume needs --output-dir, the run to go on with")
    path = Path(flags["output_dir"]) / "config.json"
    if not path.is_file():
        raise UsageError(f"--resume: there is no run in {flags['output_dir']} ({path.name} is missing)")
    saved = read_settings(path, called=f"--resume: {path}")
    began, goes_on = (
        each.get("batch_size", Config.batch_size) * each.get("grad_accum", Config.grad_accum)
        for each in (saved, saved | flags)
    )
    same_step = {"batch_size", "grad_accum"} if began == goes_on else set()
    for key, value in flags.items():
        if key not in MAY_CHANGE_ON_RESUME | same_step and value != saved.get(key):
            raise UsageError(
                f"--{dashed(key)} {value} differs from the {saved.get(key)} that the run in {flags['output_dir']} "
                "began with: leave it out, or start a new run in another --output-dir"
            )
    return Config(**{**saved, "stop_at": None, "max_hours": None, **flags})
