"""Tasks of lm-evaluation-harness, which is no dependency: its prompts and scores, of a model that is loaded already."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastdistill.training.config import UsageError


def task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    folder: str | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Of each task its metrics and their standard errors, by the harness's names ("acc,none").

    Args:
        folder: with tasks of one's own as YAML files, beside the harness's.
        limit: examples of each task, for a trial; the scores are then of these alone.

    Raises:
        UsageError: the harness is not installed, or knows no such task.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-evaluation-harness ({error}): pip install lm_eval") from error
    if folder and not Path(folder).is_dir():
        raise UsageError(f"--tasks-folder {folder} is no folder")
    manager = TaskManager(include_path=folder)
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise UsageError(f"--tasks {','.join(tasks)}: lm-evaluation-harness knows no task {unknown[0]}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = simple_evaluate(
        wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False, bootstrap_iters=0
    )
    assert results is not None
    return {
        task: {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
        for task, found in results["results"].items()
    }
