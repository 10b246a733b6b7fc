"""WER of models on the 1,000 fixed digit strings (or a held-out speaker's 300), side by side.

    python recipes/digits/evaluate.py results/digits/teacher/model results/digits/target-seed0/model

Each model is compared with the first by a paired bootstrap over the test clips, which the strings share. The last line
is one JSON list.
"""

import json
from pathlib import Path

import click

from cald_speech.commands import options
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.recipes.digits.clip_bootstrap import compare_over_clips
from cald_speech.recipes.digits.prepare import prepare, test_strings


@options.command()
@click.argument("folders", nargs=-1, required=True)
@click.option("--data_folder", type=Path, default="data/fsdd", show_default=True)
@click.option("--prepare_folder", type=Path, default="results/digits/data", show_default=True)
@click.option("--held_out_speaker", help="Evaluate on this speaker's strings instead of the fixed 1,000.")
@options.normaliser()
def main(
    folders: tuple[str, ...], data_folder: Path, prepare_folder: Path, held_out_speaker: str | None, normaliser: str
) -> None:
    """Evaluate FOLDERS, model folders."""
    split = "test" if held_out_speaker is None else f"test-{held_out_speaker}"
    rows = []
    manifest = prepare(data_folder, prepare_folder, held_out_speaker=held_out_speaker)[split]
    reports = [options.reports_of(folder) for folder in folders]
    for folder, report in zip(folders, reports, strict=True):
        summary = evaluate_folder(folder, manifest, report, split=split, normaliser=normaliser)
        results = [read_result(folder, split) for folder in (report, reports[0])]
        difference, *interval = compare_over_clips(*results, test_strings(held_out_speaker))
        rows.append({"model": folder, "WER %": summary["wer"]})
        rows[-1] |= dict(zip(("low", "high"), summary["wer_interval"] or (None, None), strict=True))
        rows[-1] |= {"words": summary["words"]["count"], "minus first": difference}
        rows[-1] |= dict(zip(("diff low", "diff high"), interval, strict=True))
        rows[-1] |= {"manifest": summary["manifest_hash"][:12]}
    click.echo(format_table(rows))
    click.echo(json.dumps(rows))


if __name__ == "__main__":
    main()
