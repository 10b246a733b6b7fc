"""Calibration of a converted model on audio or text without labels: what is read, and the report of what came of it.

The regression itself is in ``cald_speech/distillation/calibration.py``.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, SequenceFeatureExtractor

from cald_speech.conversion import ConversionReport
from cald_speech.data.audio import MIN_SAMPLES, SAMPLE_RATE, audio_info
from cald_speech.data.batching import Audio, Modality
from cald_speech.data.dataset import labelled_dataset
from cald_speech.data.readers.folders import audio_among, files_in
from cald_speech.distillation import captured_slots
from cald_speech.distillation.calibration import TURN, Slot
from cald_speech.errors import UserError
from cald_speech.evaluation.forward import batches, check_unconverted, chosen, naming
from cald_speech.families import family_of
from cald_speech.ops import valid_frames

logger = logging.getLogger(__name__)

UTTERANCES = 64
LEAST_UTTERANCES = 8  # of which two choose, and two are held out
LONGEST_S = 40.0
MAX_BATCH = {"max_batch_s": 20.0, "max_batch_tokens": 4096}
SILENT = 1e-4  # the deviation of a waveform that says nothing


def calibrate(
    report: ConversionReport,
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    dataset: Dataset,
    *,
    modality: Modality | None = None,
    utterances: int = UTTERANCES,
) -> ConversionReport:
    """Set scale and output projection of every mixer of ``student`` by what the attention of ``teacher`` puts out.

    Arguments
    ---------
    report : what :func:`cald_speech.conversion.convert` gave for the student.
    teacher : the model that the student was converted from, with its attention.
    dataset : items that the modality reads; labels do not matter.
    utterances : how many are read, evenly spread over the set.

    Returns
    -------
    The report, with an entry for each slot.

    Raises
    ------
    UserError
        for silence, values that are not finite, too few utterances, and a mixer that cannot be calibrated.
    """
    check_unconverted("teacher", teacher)
    family, modality = family_of(student), modality or Audio()
    mixers = {i: family.mixer(layer) for i, layer in enumerate(family.layers(student))}
    names = {id(module): name for name, module in student.named_modules()}
    slots = [
        Slot.of(i, mixer, any(name.startswith(f"{names[id(mixer)]}.") for name in report.copied))
        for i, mixer in mixers.items()
        if mixer is not None
    ]
    if not slots:
        raise UserError("calibrate: expected a layer_map that converts a layer, got one that keeps them all")
    places = _usable(dataset, modality, utterances)
    parts = {place: TURN[number % len(TURN)] for number, place in enumerate(places)}
    was_training = student.training, teacher.training
    student.eval(), teacher.eval()
    max_batch = MAX_BATCH[modality.batch_limit]
    ends = [family.slot_ends(family.layers(teacher)[slot.layer]) for slot in slots]
    for batch in batches(dataset, teacher, max_batch, modality=modality, places=places):
        with naming(batch.ids), torch.no_grad():
            with captured_slots(ends) as (entering, leaving):
                family.base(teacher)(**batch.arguments)
            for slot, x, y in zip(slots, entering, leaving, strict=True):
                valid = valid_frames(batch.layer_lengths, x.size(1))
                slot.see(x, y, valid, batch.layer_lengths, [parts[place] for place in batch.places])
    student.train(was_training[0]), teacher.train(was_training[1])
    return replace(report, slots=tuple(slot.fit() for slot in slots))


def audio_in(folder: Path, extractor: SequenceFeatureExtractor) -> Dataset:
    """The audio files in a folder, of up to 40 s, without labels. Raises UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"--calibrate: expected a folder of audio, and there is none at {folder}")
    entries = {}
    for path in audio_among(files_in(folder.absolute())):
        num_samples, rate = audio_info(path)
        if MIN_SAMPLES / SAMPLE_RATE <= num_samples / rate <= LONGEST_S:
            entries[str(path)] = {"audio": str(path), "duration_s": num_samples / rate, "text": ""}
    if not entries:
        raise UserError(f"--calibrate: expected audio files of up to {LONGEST_S:g} s in {folder}, and there are none")
    return labelled_dataset(entries, extractor, lambda utterance, text: torch.zeros(1).long())


def _usable(dataset: Dataset, modality: Modality, wanted: int) -> list[int]:
    """Places of items that say something. Raises UserError where there are too few."""
    places = chosen(len(dataset), wanted)
    silent = []
    if isinstance(modality, Audio):
        silent = [place for place in places if dataset[place]["wav"].float().std() < SILENT]
    left = [place for place in places if place not in silent]
    if len(left) < LEAST_UTTERANCES:
        raise UserError(
            f"calibrate: expected at least {LEAST_UTTERANCES} utterances that are not silent, got {len(left)} "
            f"({len(silent)} silent). Give more audio, or leave calibrate out"
        )
    if silent:
        logger.info("calibrate: %d of %d utterances are silent, and left out", len(silent), len(places))
    return left
