"""Zero-shot tasks by lm-eval-harness (Gao et al., 10.5281/zenodo.12608602), through its own Hugging Face interface."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cald_speech.conversion import from_pretrained
from cald_speech.errors import UserError
from cald_speech.tasks.processors import tokenizer_of

# Of He & Garner (arXiv 2410.06846), by lm-eval's names.
PAPER_TASKS = (
    "lambada_openai",
    "piqa",
    "winogrande",
    "wsc273",
    "arc_easy",
    "arc_challenge",
    "sciq",
    "logiqa",
)


def run_tasks(
    source: str,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "cpu",
) -> list[dict[str, Any]]:
    """A row {task, metric, value, stderr, version} for each metric of each task, and the mean accuracy last.

    Arguments
    ---------
    source : folder or hub id of a causal model, converted or not.
    tasks : lm-eval's names.
    include_path : a folder with task files beside lm-eval's own.
    limit : documents of each task; the figures are then no benchmark's.

    Raises
    ------
    UserError
        where lm-eval is not installed, or a task is not known or cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"the tasks need lm-eval, which cannot be imported ({error}): install it with `pip install "
            "'cald-speech[text]'`, or leave them out with --tasks none"
        ) from error
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"include_path: expected a folder of task files, but there is no {include_path}")
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"tasks: lm-eval knows no {', '.join(unknown)}: expected names from `lm-eval ls tasks`, or files in "
            "--include_path"
        )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    model = from_pretrained(source, head="lm").to(device)
    harness = HFLM(
        pretrained=model,
        backend="causal",
        tokenizer=tokenizer_of([source], None),
        batch_size=batch_size,
        device=device,
    )
    try:
        found = lm_eval.simple_evaluate(
            harness, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"tasks: the data of {', '.join(tasks)} cannot be had: {error}. They come from the hub: without a network, "
            "give files of your own with --include_path"
        ) from error
    return _rows(found)


def _rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                stderr = metrics.get(f"{metric}_stderr,{kind}")
                version = found["versions"].get(task)
                rows.append({"task": task, "metric": metric, "value": value, "stderr": stderr, "version": version})
    accuracies = [row["value"] for row in rows if row["metric"] == "acc"]
    if len(accuracies) > 1:
        mean = sum(accuracies) / len(accuracies)
        rows.append({"task": "mean", "metric": "acc", "value": mean, "stderr": None, "version": None})
    return rows
