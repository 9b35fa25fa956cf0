"""One model to train, and what it is known by when it is trained."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fastdistill.training.blocks import Blocks
from fastdistill.training.config import Config
from fastdistill.training.data import TrainingText
from fastdistill.training.evaluate import Evaluation
from fastdistill.training.whole import is_whole, write_file


@dataclass(frozen=True)
class Stage:
    """Where, how, and on what one model is trained."""

    name: str
    folder: Path
    recipe: Config
    seed: int
    text: TrainingText
    held_out: Blocks
    tokenizer: PreTrainedTokenizerBase
    deadline: float | None = None
    """On the clock of `time.monotonic`: when the run is to end."""
    teacher: Evaluation | None = None
    """On the held-out text, of a student's teacher."""

    def window(self, processes: int) -> int:
        """Sequences in an optimizer step."""
        return self.recipe.batch_size * self.recipe.grad_accum * processes

    def total_steps(self, processes: int) -> int:
        """Optimizer steps."""
        return self.recipe.max_steps or math.ceil(self.recipe.epochs * self.text.num_blocks() / self.window(processes))

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether something is to be logged, evaluated or saved after `step`."""
        recipe = self.recipe
        every = (recipe.log_steps, recipe.eval_steps, recipe.save_steps)
        return step in (recipe.stop_at, total_steps) or any(step % steps == 0 for steps in every)

    def best_folder(self, step: int) -> Path:
        """Where the model with the lowest held-out loss so far is, which it had after `step`."""
        return self.folder / f"best-{step:08d}"

    def check_best(self, progress: Progress) -> list[str]:
        """What is to be said of the best model that `progress` knows: if it is not whole, it is forgotten."""
        if progress.best is None or is_whole(self.best_folder(progress.best_step)):
            return []
        progress.best = None
        return [f"the best model before, of step {progress.best_step}, is damaged: the best from here on is kept"]

    def keep_best(self, steps: set[int]) -> None:
        """Delete the best models of other steps than these."""
        for path in set(self.folder.glob("best-*")) - {self.best_folder(step) for step in steps}:
            shutil.rmtree(path)


@dataclass(frozen=True)
class Result:
    """What a finished stage is known by; kept as result.json."""

    untrained: Evaluation
    best: Evaluation
    best_step: int
    last: Evaluation
    steps: int

    @classmethod
    def read(cls, folder: Path) -> Result | None:
        """That of a stage's folder; None where the stage has not finished."""
        path = folder / "result.json"
        if not path.exists():
            return None
        fields = json.loads(path.read_text())
        for name in ("untrained", "best", "last"):
            fields[name] = Evaluation(**fields[name])
        return cls(**fields)

    def write(self, folder: Path) -> None:
        write_file(folder / "result.json", json.dumps(dataclasses.asdict(self), indent=2))


@dataclass
class Progress:
    """Where a stage stands. `step` counts optimizer steps, `samples` the sequences read, those of skipped steps too."""

    step: int = 0
    samples: int = 0
    untrained: Evaluation | None = None
    best: Evaluation | None = None
    best_step: int = 0
    last: Evaluation | None = None

    def state(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def result(self) -> Result:
        """Of a stage that has come to its end, and so has been evaluated."""
        assert self.untrained
        assert self.best
        assert self.last
        return Result(self.untrained, self.best, self.best_step, self.last, self.step)

    @classmethod
    def of(cls, state: dict[str, Any]) -> Progress:
        progress = cls(**{field.name: state[field.name] for field in dataclasses.fields(cls)})
        for name in ("untrained", "best", "last"):
            if getattr(progress, name) is not None:
                setattr(progress, name, Evaluation(**getattr(progress, name)))
        return progress
