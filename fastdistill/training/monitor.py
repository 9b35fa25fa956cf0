"""What a run says while it goes: progress bar, log lines in the founding format, JSONL, TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from accelerate import PartialState
from tqdm import tqdm

from fastdistill.training.evaluate import Evaluation, perplexity
from fastdistill.training.guard import Patience
from fastdistill.training.memory import peak_memory
from fastdistill.training.trajectory import Trajectory, held_out
from fastdistill.training.window import Losses

LOG = "log.jsonl"
DOMINANT_SHARE = 0.8
PLATEAU = 5
"""A warning after so many evaluations without a lower held-out loss."""
PROBE = 10
"""Steps after which a stage says how long it will take, and what memory."""

_FOUNDING = "layerwise_raw"
"""Of the numbers that are in no loss, the founding document's."""
_MEANS = ("raw", "weighted", "diagnostics")


class Mean(NamedTuple):
    """Of the steps that have a value."""

    sum: float = 0.0
    steps: int = 0

    def with_value(self, value: float) -> Mean:
        return Mean(self.sum + value, self.steps + 1)

    def value(self) -> float:
        return self.sum / self.steps


class Monitor:
    """Logs one stage. Every loss it shows is the mean over the optimizer steps since the line before."""

    def __init__(
        self,
        folder: Path,
        name: str,
        weights: dict[str, float],
        total_steps: int,
        step: int = 0,
        state: dict[str, Any] | None = None,
        *,
        teacher: Evaluation | None = None,
        tensorboard: bool = False,
    ):
        """`weights` are the components'; a resumed stage gives its step and `state()`; `teacher` is what a student is
        expected to come near to. Only the first process writes or says anything.
        """
        self.path, self.weights, self.total_steps = folder / LOG, weights, total_steps
        process: Any = PartialState()
        self.device, self.writes = process.device, process.is_main_process
        state = state or {}
        self.raw, self.weighted, self.diagnostics = (
            {name: Mean(*stored) for name, stored in state.get(kind, {}).items()} for kind in _MEANS
        )
        self.total: float = state.get("total", 0.0)
        self.seconds: dict[str, float] = state.get("seconds", {})
        self.steps, self.tokens = state.get("steps", 0), state.get("tokens", 0)
        self.teacher = teacher
        self.untrained = Evaluation(**state["untrained"]) if state.get("untrained") else None
        self.plateau = Patience(PLATEAU, **state.get("plateau", {}))
        self.warned = set(state.get("warned", []))
        self.elapsed_before, self.began = state.get("elapsed", 0.0), time.monotonic()
        self.times: list[float] = []
        # What was written after the state was saved will be written again.
        if self.writes and self.path.exists() and self.path.stat().st_size > state.get("log_bytes", 0):
            os.truncate(self.path, state.get("log_bytes", 0))
        # Into a file the bar writes a line each time: seldom is enough.
        often = 0.2 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(
            total=total_steps, initial=step, desc=name, unit="step", dynamic_ncols=True, mininterval=often,
            disable=not self.writes,
        )  # fmt: skip
        self.board = _board(folder / "tensorboard", step) if self.writes and tensorboard else None

    @property
    def elapsed(self) -> float:
        """Seconds of this stage, those before it was resumed included."""
        return self.elapsed_before + time.monotonic() - self.began

    def add(
        self,
        losses: Losses[float],
        *,
        tokens: int,
        learning_rate: float,
        gradient_norm: float,
    ) -> None:
        """One optimizer step, of the components that counted at it; and how many tokens were predicted."""
        self.learning_rate, self.gradient_norm = learning_rate, gradient_norm
        for kind in _MEANS:
            means = getattr(self, kind)
            for name, value in getattr(losses, kind).items():
                means[name] = means.get(name, Mean()).with_value(value)
        self.total += losses.total
        self.steps += 1
        self.tokens += tokens
        self.bar.set_postfix(loss=f"{losses.total:.3f}", refresh=False)
        self.bar.update()
        if len(self.times) <= PROBE:
            self.times.append(time.monotonic())
            if len(self.times) > PROBE:
                self.probe()

    def probe(self) -> None:
        """What the first steps say of the rest, by their median: the first is long, and evaluations may lie between."""
        each = median(after - before for before, after in pairwise(self.times))
        left = self.total_steps - self.bar.n
        self.say(
            f"[Probe] {1000 * each:.0f} ms a step: {tqdm.format_interval(each * left)} for the {left} steps left, "
            f"evaluations not counted; peak memory so far {peak_memory(self.device) / 1e9:.2f} GB"
        )

    def took(self, seconds: dict[str, float]) -> None:
        """Time of training by phase, evaluations and checkpoints left out."""
        for phase, value in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value

    def log(self, step: int, *, skipped: int, detailed: bool) -> None:
        """A line, or in detail the founding document's block, for the steps since the last one."""
        peak = peak_memory(self.device)
        total = self.total / self.steps
        # A component that came in since the last line counts with 0 in the steps before.
        weighted = {name: mean.sum / self.steps for name, mean in self.weighted.items()}
        raw, diagnostics = ({n: mean.value() for n, mean in of.items()} for of in (self.raw, self.diagnostics))
        weights = {name: self.weight(name, weighted[name], raw[name]) for name in raw}
        if abs(sum(weighted.values()) - total) > 1e-4 * max(1.0, abs(total)):
            raise AssertionError(f"components {weighted} sum to {sum(weighted.values())}, and the total is {total}")
        shares = {name: value / total if total else 0.0 for name, value in weighted.items()}
        rate = self.tokens / sum(self.seconds.values())
        self.write(
            "train",
            step,
            total=total,
            components={
                name: {
                    "raw": raw[name],
                    "weight": weights[name],
                    "weighted": weighted[name],
                    "share": shares[name],
                }
                for name in raw
            },
            diagnostics=diagnostics,
            learning_rate=self.learning_rate,
            gradient_norm=self.gradient_norm,
            skipped_steps=skipped,
            total_steps=self.total_steps,
            tokens_per_second=rate,
            seconds={phase: round(value, 4) for phase, value in self.seconds.items()},
            elapsed=round(self.elapsed, 2),
            peak_memory_bytes=peak,
        )
        if detailed:
            lines = [f"[Step {step}]", f"Total Loss: {total:.2f}"]
            by_size = sorted(weighted, key=lambda name: -weighted[name])
            lines += [f"  {name}_loss: {weighted[name]:.2f} ({shares[name]:.0%})" for name in by_size]
            if _FOUNDING in diagnostics:
                lines.append(f"[Raw] layerwise by sum/(B*S*D): {diagnostics[_FOUNDING]:.4g}, not in the loss")
            stats = [f"{name} {value:.4g}" for name, value in diagnostics.items() if name != _FOUNDING]
            lines += [f"[Stat] {', '.join(stats)}"] * bool(stats)
            whole = sum(self.seconds.values())
            split = ", ".join(f"{phase} {value / whole:.0%}" for phase, value in self.seconds.items())
            lines.append(f"[Time] {1000 * whole / self.steps:.0f} ms a step: {split}; peak {peak / 1e9:.2f} GB")
            self.say("\n".join(lines))
        else:
            listed = "  ".join(f"{name}_loss {weighted[name]:.3f} ({shares[name]:.0%})" for name in weighted)
            self.say(
                f"step {step}/{self.total_steps}  loss {total:.3f}  {listed}  lr {self.learning_rate:.2e}  "
                f"grad {self.gradient_norm:.2f}  {rate:,.0f} tokens/s"
            )
        scalars = {"loss/total": total, "learning_rate": self.learning_rate, "tokens_per_second": rate}
        scalars["gradient_norm"] = self.gradient_norm
        scalars |= {f"loss/{name}": value for name, value in weighted.items()}
        self.draw(step, scalars | {f"share/{name}": value for name, value in shares.items()})
        for name, share in shares.items():
            if len(shares) > 1 and share > DOMINANT_SHARE:
                self.warn_once(name, step, f"{name}_loss is {share:.0%} of the total, above {DOMINANT_SHARE:.0%}")
        self.raw, self.weighted, self.diagnostics, self.seconds = {}, {}, {}, {}
        self.steps, self.tokens, self.total = 0, 0, 0.0

    def weight(self, name: str, weighted: float, raw: float) -> float:
        """What a component was multiplied by in the mean: less than its weight if it came in since the last line, or
        another if it is balanced.
        """
        constant = self.weights[name]
        applied = weighted / raw if raw else constant
        return constant if math.isclose(applied, constant, rel_tol=1e-5) else applied

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Held-out loss; `ppl` is exp of the loss as printed."""
        loss = f"{result.loss:.3f}"
        known = {name: value for name, value in vars(result).items() if value is not None}
        self.write("eval", step, **known, perplexity=perplexity(result.loss))
        self.say(f"[Eval] loss: {loss}, ppl: {perplexity(float(loss)):.1f}")
        self.draw(step, {"eval/loss": result.loss, "eval/perplexity": perplexity(result.loss)})
        waited = self.plateau.waited
        self.plateau.observe(step, result.loss)
        if self.plateau.exhausted and waited < PLATEAU:
            self.warn(step, f"a plateau: {PLATEAU} evaluations without a held-out loss below {self.plateau.best:.3f}")
        if step == 0:
            self.untrained = result
        expected = Trajectory.of(self.untrained, self.teacher) if self.untrained and self.teacher else None
        if step == 0 and expected:
            self.say(f"[Expected] {expected.describe()}")
        elif expected and not held_out(result) <= (edge := expected.upper(step / self.total_steps)):
            self.warn_once(
                "trajectory",
                step,
                f"held-out {held_out(result):.3f} {expected.unit} is above {edge:.3f}, the most expected here",
            )
        if step > 0 and self.untrained and not result.loss <= self.untrained.loss:
            self.warn(step, f"held-out loss {loss} is above the untrained student's {self.untrained.loss:.3f}")

    def warn(self, step: int, message: str) -> None:
        self.write("warning", step, message=message)
        self.say(f"[Warning] step {step}: {message}")

    def warn_once(self, about: str, step: int, message: str) -> None:
        if about not in self.warned:
            self.warned.add(about)
            self.warn(step, message)

    def say(self, text: str) -> None:
        if self.writes:
            self.bar.write(text)

    def write(self, event: str, step: int, **record: Any) -> None:
        if self.writes:
            with self.path.open("a") as file:
                file.write(json.dumps({"event": event, "step": step, **record}) + "\n")

    def draw(self, step: int, scalars: dict[str, float]) -> None:
        if self.board:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.board:
            self.board.close()

    def state(self) -> dict[str, Any]:
        """What has gathered since the last line, so that a resumed run logs the same."""
        return {
            **{kind: getattr(self, kind) for kind in _MEANS},
            "total": self.total,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "untrained": self.untrained and dataclasses.asdict(self.untrained),
            "plateau": self.plateau.state(),
            "warned": sorted(self.warned),
            "elapsed": self.elapsed,
            "log_bytes": self.path.stat().st_size if self.writes else 0,
        }


def _board(folder: Path, step: int) -> Any:
    """A writer of TensorBoard's files that forgets what came after `step`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
