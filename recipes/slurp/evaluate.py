"""Intent accuracy of a model, converted or not, on a set of SLURP; with --joint of what a CTC model spells out:

python recipes/slurp/evaluate.py results/slurp/hybrid/model --data_folder data/slurp
python recipes/slurp/evaluate.py results/slurp/joint-target/model --data_folder data/slurp --joint

With --entities too, of a model that spells them out (corpus: {joint: True, entities: True}), SLU-F1 as SLURP scores it.

It writes <set>.json (each recording's labels and guess), with --joint <set>-joint.json and .jsonl (the words), prints a
table and, as its last line, the summary as JSON. An intent is right if scenario and action are; "mean %" is the mean of
the two accuracies, which the paper's published code prints. The 95 % intervals of intents draw whole sentences, since a
sentence's recordings (two microphones, several speakers) are not independent.
"""

import json
from pathlib import Path
from typing import Any

import click

from cald_speech.commands import options
from cald_speech.conversion import from_pretrained
from cald_speech.conversion.model_card import add_figure, add_result
from cald_speech.data.dataset import make_dataset
from cald_speech.data.manifests import manifest_hash, read_manifest
from cald_speech.evaluation.labels import classify_folder, group_names, summarise
from cald_speech.evaluation.recognition import evaluate
from cald_speech.evaluation.report import format_table, write_report
from cald_speech.families.hub import load_processor
from cald_speech.recipes.slurp.entities import entities_in, plain_words, slu_f1
from cald_speech.recipes.slurp.prepare import prepare
from cald_speech.tasks.wer import score


@options.command()
@click.argument("folder", type=options.ModelSource())
@click.option("--data_folder", type=Path, default="data/slurp", show_default=True)
@click.option("--split", type=click.Choice(["valid", "test"]), default="test", show_default=True)
@click.option("--joint", is_flag=True, help="FOLDER spells out intent and words, as of hparams/slurp/joint.yaml.")
@click.option("--entities", is_flag=True, help="With --joint: FOLDER spells out entities too, [TIME NINE AM].")
@options.evaluation_folder()
@options.normaliser()
@click.option("--drop_bad_audio", is_flag=True, help="Leave out recordings that cannot be read.")
@options.max_batch_s()
@options.device()
def main(
    folder: str,
    data_folder: Path,
    split: str,
    joint: bool,
    entities: bool,
    output_folder: Path,
    normaliser: str,
    drop_bad_audio: bool,
    **how,
) -> None:
    """Evaluate FOLDER, a model folder or a hub id."""
    options.refuse_idle(normaliser=(joint, "--joint: without words there is nothing to write"))
    corpus = {"joint": joint, "entities": entities, "drop_bad_audio": drop_bad_audio, "sets": [split]}
    manifest = prepare(data_folder, output_folder, **corpus)[split]
    how |= {"normaliser": normaliser, "entities": entities} if joint else {}
    summary = (read_out if joint else classify)(folder, manifest, output_folder, **how)
    intent = summary["intent"]
    low, high = intent["interval"] or (None, None)
    row = {"split": summary["split"], "intent %": intent["accuracy"], "low": low, "high": high}
    row |= {f"{name} %": accuracy for name, accuracy in intent.get("groups", {}).items()}
    row |= {"mean %": intent["mean_of_groups"]}
    row |= {"WER %": summary["wer"]} if joint else {}
    row |= {"SLU-F1 %": summary["entities"]["SLU-F1 %"]} if entities else {}
    click.echo(format_table([row]))
    click.echo(json.dumps(summary))


def classify(folder: str, manifest: Path, output_folder: Path, **how) -> dict[str, Any]:
    """The summary of a model with a classification head."""
    found = classify_folder(folder, manifest, output_folder / manifest.name, **how)
    summary = {"split": manifest.stem, "model": folder, "manifest_hash": manifest_hash(manifest)}
    return summary | {"intent": _intent(folder, manifest, found, group_names(folder))}


def read_out(
    folder: str,
    manifest: Path,
    output_folder: Path,
    *,
    normaliser: str,
    entities: bool,
    max_batch_s: float,
    device: str,
) -> dict[str, Any]:
    """The summary of a CTC model: the first two words are the intent, the WER is that of the others' words."""
    model, processor = from_pretrained(folder, head="ctc", device=device), load_processor(folder)
    dataset = make_dataset(manifest, processor, normaliser=normaliser, unknown="drop")
    how = {"normaliser": normaliser, "max_batch_s": max_batch_s, "progress": False}
    read = evaluate(model, processor, dataset, **how).utterances
    pairs = {u.id: (u.reference.split(), u.hypothesis.split()) for u in read}
    found = {key: tuple(" ".join(words[:2]) for words in pair) for key, pair in pairs.items()}
    said = [{key: " ".join(pair[i][2:]) for key, pair in pairs.items()} for i in range(2)]
    extra = {"intent": _intent(folder, manifest, found, ["scenario", "action"])}
    if entities:
        extra["entities"] = slu_f1({key: tuple(entities_in(texts[key]) for texts in said) for key in pairs})
    references, hypotheses = ({key: plain_words(text) for key, text in texts.items()} for texts in said)
    summary = write_report(
        output_folder,
        score(references, hypotheses, durations_s={u.id: u.duration_s for u in read}),
        manifest_hash=manifest_hash(manifest),
        normaliser=normaliser,
        model=folder,
        decoder="greedy",
        split=manifest.stem,
        extra=extra,
    )
    add_result(Path(folder), manifest.stem, summary)
    return summary


def _intent(folder: str, manifest: Path, found: dict[str, tuple[str, str]], names: list[str]) -> dict[str, Any]:
    """Accuracies in percent, noted in the model's card too."""
    entries = read_manifest(manifest)
    summary = summarise(found, names, drawn_by=[entries[key]["slurp_id"] for key in found])
    add_figure(
        Path(folder),
        f"SLURP intent, {manifest.stem}",
        metric="accuracy",
        value=summary["accuracy"],
        interval=summary["interval"],
        count=summary["of"],
        manifest_hash=manifest_hash(manifest),
    )
    return summary


if __name__ == "__main__":
    main()
