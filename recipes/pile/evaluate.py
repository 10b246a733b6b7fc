"""Zero-shot tasks by lm-eval-harness, perplexity of held-out text, and a check of what is generated.

    python recipes/pile/evaluate.py results/pile/model
    python recipes/pile/evaluate.py results/stdlib/teacher/model --tasks none --tokens data/stdlib/manifests/test.json

The default tasks are the paper's eight, which the hub has; --include_path is a folder of task files of your own.
"""

import json
from pathlib import Path

import click

from cald_speech.commands import options
from cald_speech.evaluation.language import PAPER_TASKS, evaluate_language, run_tasks
from cald_speech.evaluation.report import format_table
from cald_speech.files import whole_file


@options.command()
@click.argument("folder", type=options.ModelSource())
@click.option("--tasks", default=",".join(PAPER_TASKS), show_default=True, help="lm-eval's names, or none.")
@click.option("--include_path", type=Path, help="Folder with task files beside lm-eval's own.")
@click.option("--limit", type=int, help="Take so many documents of each task; the figures are then no benchmark's.")
@click.option("--tokens", type=Path, help="A token set's JSON file: its perplexity, and the check of generation.")
@click.option("--batch_size", default=8, show_default=True)
@options.device()
@options.evaluation_folder()
def main(folder: str, tasks: str, tokens: Path | None, device: str, output_folder: Path, **how) -> None:
    """Evaluate FOLDER, a language model's folder or hub id."""
    wanted = (tasks != "none", "--tasks")
    options.refuse_idle(include_path=wanted, limit=wanted, batch_size=wanted)
    summary: dict = {"model": folder}
    if tokens is not None:
        summary["language"] = evaluate_language(folder, tokens, device=device)
    if tasks != "none":
        summary["tasks"] = run_tasks(folder, tasks.split(","), device=device, **how)
    if "language" in summary:
        click.echo(format_table([{"set": tokens.stem, "perplexity": summary["language"]["value"]}]))
    if "tasks" in summary:
        click.echo(format_table(summary["tasks"]))
    with whole_file(output_folder / "language.json") as unfinished:
        unfinished.write_text(json.dumps(summary, indent=1) + "\n")
    click.echo(json.dumps(summary))


if __name__ == "__main__":
    main()
