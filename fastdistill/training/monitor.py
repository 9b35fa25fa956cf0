"""What a run says while it goes: progress bar, log lines in the founding format, and the same as JSONL."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastdistill.training.evaluate import Evaluation, perplexity

DOMINANT_SHARE = 0.8

_DIAGNOSTICS = {"layerwise_raw": "layerwise by sum/(B*S*D)"}
"""What a number that is in no loss is called in the log."""


class Monitor:
    """Logs one stage. Every loss it shows is the mean over the optimizer steps since the line before."""

    def __init__(
        self,
        path: Path,
        name: str,
        weights: dict[str, float],
        total_steps: int,
        step: int = 0,
        state: dict[str, Any] | None = None,
    ):
        """`path` is the JSONL file, `weights` the components'; a resumed stage gives its step and `state()`."""
        self.path, self.weights, self.total_steps = path, weights, total_steps
        state = state or {"sums": dict.fromkeys((*weights, "total"), 0.0), "steps": 0, "tokens": 0, "seconds": 0.0}
        self.sums, self.steps = state["sums"], state["steps"]
        self.diagnostics: dict[str, float] = state.get("diagnostics", {})
        self.tokens, self.seconds = state["tokens"], state["seconds"]
        self.untrained_loss: float | None = state.get("untrained_loss")
        # What was written after the state was saved will be written again.
        if path.exists() and path.stat().st_size > state.get("log_bytes", 0):
            os.truncate(path, state.get("log_bytes", 0))
        self.step_started = time.perf_counter()
        self.warned = set(state.get("warned", []))
        # Into a file the bar writes a line each time: seldom is enough.
        often = 0.2 if sys.stderr.isatty() else 30.0
        self.bar = tqdm(total=total_steps, initial=step, desc=name, unit="step", dynamic_ncols=True, mininterval=often)

    def start_step(self) -> None:
        """Speeds are of training steps alone: what passes between `add` and this is not counted."""
        self.step_started = time.perf_counter()

    def add(self, raw: dict[str, float], total: float, diagnostics: dict[str, float], tokens: int) -> None:
        """One optimizer step: each component unweighted, the weighted total, what is in neither, and how many tokens
        were predicted.
        """
        for name, value in (raw | {"total": total}).items():
            self.sums[name] += value
        for name, value in diagnostics.items():
            self.diagnostics[name] = self.diagnostics.get(name, 0.0) + value
        self.steps += 1
        self.tokens += tokens
        self.seconds += time.perf_counter() - self.step_started
        self.bar.set_postfix(loss=f"{total:.3f}", refresh=False)
        self.bar.update()

    def log(self, step: int, *, learning_rate: float, gradient_norm: float, skipped: int, detailed: bool) -> None:
        """A line, or in detail the founding document's block, for the steps since the last one."""
        raw = {name: value / self.steps for name, value in self.sums.items()}
        total = raw.pop("total")
        weighted = {name: self.weights[name] * value for name, value in raw.items()}
        if abs(sum(weighted.values()) - total) > 1e-4 * max(1.0, abs(total)):
            raise AssertionError(f"components {weighted} sum to {sum(weighted.values())}, and the total is {total}")
        diagnostics = {name: value / self.steps for name, value in self.diagnostics.items()}
        shares = {name: value / total if total else 0.0 for name, value in weighted.items()}
        rate = self.tokens / self.seconds
        self.write(
            "train",
            step,
            total=total,
            components={
                name: {
                    "raw": raw[name],
                    "weight": self.weights[name],
                    "weighted": weighted[name],
                    "share": shares[name],
                }
                for name in raw
            },
            diagnostics=diagnostics,
            learning_rate=learning_rate,
            gradient_norm=gradient_norm,
            skipped_steps=skipped,
            tokens_per_second=rate,
        )
        if detailed:
            lines = [f"[Step {step}]", f"Total Loss: {total:.2f}"]
            by_size = sorted(weighted, key=lambda name: -weighted[name])
            lines += [f"  {name}_loss: {weighted[name]:.2f} ({shares[name]:.0%})" for name in by_size]
            lines += [
                f"[Raw] {_DIAGNOSTICS[name]}: {value:.4g}, not in the loss" for name, value in diagnostics.items()
            ]
            self.say("\n".join(lines))
        else:
            listed = "  ".join(f"{name}_loss {weighted[name]:.3f} ({shares[name]:.0%})" for name in weighted)
            self.say(
                f"step {step}/{self.total_steps}  loss {total:.3f}  {listed}  lr {learning_rate:.2e}  "
                f"grad {gradient_norm:.2f}  {rate:,.0f} tokens/s"
            )
        for name, share in shares.items():
            if len(shares) > 1 and share > DOMINANT_SHARE and name not in self.warned:
                self.warned.add(name)
                self.warn(step, f"{name}_loss is {share:.0%} of the total, above {DOMINANT_SHARE:.0%}")
        self.sums, self.diagnostics = dict.fromkeys(self.sums, 0.0), {}
        self.steps = self.tokens = 0
        self.seconds = 0.0

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Held-out loss; `ppl` is exp of the loss as printed."""
        loss = f"{result.loss:.3f}"
        known = {name: value for name, value in vars(result).items() if value is not None}
        self.write("eval", step, **known, perplexity=perplexity(result.loss))
        self.say(f"[Eval] loss: {loss}, ppl: {perplexity(float(loss)):.1f}")
        if step == 0:
            self.untrained_loss = result.loss
        elif self.untrained_loss is not None and result.loss > self.untrained_loss:
            self.warn(step, f"held-out loss {loss} is above the untrained student's {self.untrained_loss:.3f}")

    def warn(self, step: int, message: str) -> None:
        self.write("warning", step, message=message)
        self.say(f"[Warning] step {step}: {message}")

    def say(self, text: str) -> None:
        self.bar.write(text)

    def write(self, event: str, step: int, **record: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"event": event, "step": step, **record}) + "\n")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def state(self) -> dict[str, Any]:
        """What has gathered since the last line, so that a resumed run logs the same."""
        return {
            "sums": self.sums,
            "diagnostics": self.diagnostics,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "untrained_loss": self.untrained_loss,
            "warned": sorted(self.warned),
            "log_bytes": self.path.stat().st_size,
        }
