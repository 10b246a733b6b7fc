"""``cald-speech convert``: a pretrained model to a linear-time one, without training."""

from functools import partial
from pathlib import Path

import click
from safetensors import SafetensorError

import cald_speech
from cald_speech import conversion
from cald_speech.commands.options import ModelSource, command, refuse_idle, target_lang
from cald_speech.conversion.model_card import base_model_of, update_facts
from cald_speech.errors import UserError
from cald_speech.evaluation import calibration
from cald_speech.families import SpeechFamily, family_of
from cald_speech.families.hub import load_processor
from cald_speech.families.vocabulary import Vocabulary
from cald_speech.files import whole_folder
from cald_speech.mixers import DEFAULT
from cald_speech.output import held
from cald_speech.tasks.processors import feature_extractor


@command()
@click.argument("model", type=ModelSource())
@click.argument("folder", type=Path)
@click.option("--initialise", type=click.Choice(list(conversion.STARTS)), default="attention", show_default=True)
@click.option("--keep", type=int, multiple=True, help="A layer (from 0) that keeps its attention; may be repeated.")
@click.option("--share/--separate", default=True, show_default=True, help="One projection for both directions, or two.")
@click.option("--head", help="Which of its heads to keep; default: ctc for speech, masked_lm or lm for text.")
@click.option(
    "--calibrate",
    type=Path,
    metavar="FOLDER",
    help="Audio without labels, of which 64 files set the mixers' scales and output projections.",
)
@target_lang()
def convert(
    model: str,
    folder: Path,
    initialise: str,
    keep: tuple[int, ...],
    share: bool,
    head: str | None,
    calibrate: Path | None,
    target_lang: str | None,
) -> None:
    """Convert MODEL (a folder or hub id) to Mamba-2, untrained, into FOLDER.

    It goes both ways, unless the model is causal. Mixers of another kind are what a yaml's layer_map names.
    """
    family = family_of(conversion.load_config(model))
    refuse_idle(share=(not family.causal, "a model that is read in both directions"))
    head = head or family.default_head
    student = conversion.from_pretrained(model, head=head, target_lang=target_lang)
    if head == "classification" and isinstance(family, SpeechFamily):
        processor = feature_extractor([model], model)  # labels need no tokenizer, and a Whisper's need not have one
    else:
        processor = load_processor(model, target_lang)
    if head == "ctc" and hasattr(processor, "tokenizer"):
        # The padding of a batch is heard as this token: it is to be the blank.
        student.config.pad_token_id = Vocabulary.of(processor.tokenizer, student.config.vocab_size).blank
    num_layers = len(family.layers(student))
    if strange := [index for index in keep if not 0 <= index < num_layers]:
        raise UserError(f"--keep: expected layers from 0 to {num_layers - 1}, got {', '.join(map(str, strange))}")
    mixer = DEFAULT.keywords["mixer"] if family.causal else partial(DEFAULT, share_projections=share)
    layer_map = conversion.LayerMap(mixer, dict.fromkeys(keep))
    audio = None
    if calibrate is not None:
        if not isinstance(family, SpeechFamily):
            raise UserError(
                f"--calibrate: expected a model that hears audio, got {family.model_type}, which reads text. Leave it "
                "out, or train: calibrate: 64 in a yaml takes items of the training set"
            )
        audio = calibration.audio_in(calibrate, getattr(processor, "feature_extractor", processor))
    report = conversion.convert(student, layer_map, initialise=initialise)
    if audio is not None:
        original = conversion.from_pretrained(model, head=head, target_lang=target_lang)
        report = calibration.calibrate(report, original.eval(), student, audio)
    facts = {"model": type(student).__name__, "teacher": model, "pipeline": family.pipelines[head]} | report.facts()
    if (base := base_model_of(model)) is not None:
        facts["base_model"] = base
    place = folder.absolute()
    try:
        with held(place.parent, place.name), whole_folder(place, keep_others=True) as unfinished:
            student.save_pretrained(unfinished)
            conversion.save_processor(processor, student, unfinished)
            update_facts(unfinished, **facts, version=cald_speech.__version__, guidance="none: not trained yet")
    except (OSError, SafetensorError) as error:  # the second: what safetensors makes of a full disk
        raise UserError(
            f"cannot write {folder}: {error}. Nothing of it is left there: make room, or give another folder"
        ) from error
    click.echo(report)
