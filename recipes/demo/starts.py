"""The demo's teacher with each mixer in attention's place, before any training:

python recipes/demo/starts.py

For every mixer, as it starts from attention and after calibration on 64 utterances of the training audio: how near each
slot comes to attention's output on utterances that were not fitted to, and the WER on the demo's test set.
"""

import copy
from pathlib import Path

import click
import torch
from transformers import PreTrainedModel

import cald_speech
from cald_speech.commands import options
from cald_speech.conversion import save_processor
from cald_speech.evaluation.calibration import audio_in, calibrate
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.evaluation.report import format_table, read_result
from cald_speech.experiment_yaml import build
from cald_speech.families.hub import load_processor
from cald_speech.recipes.demo.run import RESULTS, TEACHER
from cald_speech.recipes.demo.synthesis import synthesise_corpus
from cald_speech.recipes.grid import MIXERS
from cald_speech.recipes.librispeech.prepare import prepare

STAGES = ("started", "calibrated")


@options.command()
@click.option("--mixer", type=click.Choice(list(MIXERS)), multiple=True, help="May be repeated; default: all.")
def main(mixer: tuple[str, ...]) -> None:
    """Convert the demo's teacher with every mixer, calibrate it, and test both."""
    synthesise_corpus(RESULTS / "data")
    teacher, processor = cald_speech.from_pretrained(TEACHER), load_processor(str(TEACHER))
    audio = audio_in(RESULTS / "data/LibriSpeech/train-few", processor.feature_extractor)
    manifest = prepare(RESULTS / "data", RESULTS / "starts", {"test": ["test"]})["test"]
    rows = []
    for name in mixer or MIXERS:
        torch.manual_seed(0)
        student, folder = copy.deepcopy(teacher), RESULTS / "starts" / name
        layer_map = build(f"layer_map: !new:cald_speech.conversion.LayerMap {{default: {written(name)}}}")["layer_map"]
        report = cald_speech.convert(student, layer_map)
        wers = [wer(student, processor, folder / STAGES[0], manifest)]
        report = calibrate(report, teacher, student, audio)
        wers.append(wer(student, processor, folder / STAGES[1], manifest))
        for number, stage in enumerate(STAGES):
            errors = " ".join(f"{slot.error[number]:.2f}" for slot in report.slots)
            norms = " ".join(f"{slot.norm[number]:.2f}" for slot in report.slots)
            rows.append({"mixer": name, "": stage, "slot errors": errors, "norms": norms, "WER %": wers[number]})
    click.echo(format_table(rows))


def written(name: str) -> str:
    """A mixer of :data:`MIXERS` as a yaml has it."""
    return f"!name:cald_speech.mixers.{MIXERS[name]}"


def wer(model: PreTrainedModel, processor, folder: Path, manifest: Path) -> float:
    """On the test set, of the model as it is saved."""
    model.save_pretrained(folder)
    save_processor(processor, model, folder)
    evaluate_folder(str(folder), manifest, folder / "report", split="test", progress=False)
    return read_result(folder / "report", "test").words.rate


if __name__ == "__main__":
    main()
