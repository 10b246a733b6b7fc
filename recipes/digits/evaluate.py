"""WER of models on the 1,000 fixed digit strings (or a held-out speaker's 300, or 300 cued ones), side by side.

    python recipes/digits/evaluate.py results/digits/teacher/model results/digits/target-seed0/model

Of cued strings the share of wrong digits behind the cue is told too: a model that reads digits and does not know the
cue has some half of them wrong.
Each model is compared with the first by a paired bootstrap over the test clips, which the strings share. The last line
is one JSON list.
"""

import json
from pathlib import Path

import click

from cald_speech.commands import options
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.recipes.digits.clip_bootstrap import compare_over_clips, errors_of_words
from cald_speech.recipes.digits.prepare import cued_test_strings, prepare, speakers_of, test_strings

CUED = {"num_train": 2000, "num_valid": 100, "cue_pause_s": (0.2, 20.0)}  # as hparams/digits/cue.yaml


@options.command()
@click.argument("folders", nargs=-1, required=True, type=options.ModelSource())
@click.option("--data_folder", type=Path, default="data/fsdd", show_default=True)
@click.option("--prepare_folder", type=Path, help="[default: results/digits/data, or results/digits_cue/data]")
@click.option("--held_out_speaker", help="Evaluate on this speaker's strings instead of the fixed 1,000.")
@click.option("--cue", is_flag=True, help="Evaluate on the cued strings of hparams/digits/cue.yaml.")
@options.normaliser()
def main(
    folders: tuple[str, ...],
    data_folder: Path,
    prepare_folder: Path | None,
    held_out_speaker: str | None,
    cue: bool,
    normaliser: str,
) -> None:
    """Evaluate FOLDERS, model folders."""
    if cue and held_out_speaker is not None:
        raise click.UsageError("cued strings have no held-out speaker: expected --cue or --held_out_speaker, got both")
    split = "test" if held_out_speaker is None else f"test-{held_out_speaker}"
    rows = []
    corpus = CUED if cue else {"held_out_speaker": held_out_speaker}
    folder = prepare_folder or Path("results/digits_cue/data" if cue else "results/digits/data")
    manifest = prepare(data_folder, folder, **corpus)[split]
    strings = cued_test_strings(speakers_of(data_folder)) if cue else test_strings(held_out_speaker)
    reports = [options.reports_of(folder) for folder in folders]
    for folder, report in zip(folders, reports, strict=True):
        summary = evaluate_folder(folder, manifest, report, split=split, normaliser=normaliser)
        results = [read_result(folder, split) for folder in (report, reports[0])]
        difference, *interval = compare_over_clips(*results, strings)
        rows.append({"model": folder, "WER %": summary["wer"]})
        rows[-1] |= dict(zip(("low", "high"), summary["wer_interval"] or (None, None), strict=True))
        rows[-1] |= {"words": summary["words"]["count"], "minus first": difference}
        rows[-1] |= dict(zip(("diff low", "diff high"), interval, strict=True))
        if cue:
            behind = [error for utterance in results[0].utterances for error in errors_of_words(utterance)[1:]]
            rows[-1] |= {"behind the cue %": 100 * sum(behind) / len(behind)}
        rows[-1] |= {"manifest": summary["manifest_hash"][:12]}
    click.echo(format_table(rows))
    click.echo(json.dumps(rows))


if __name__ == "__main__":
    main()
