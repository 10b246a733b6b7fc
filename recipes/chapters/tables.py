"""The tables of compare.py: what each way of reading whole chapters came to, and each chapter."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cald_speech.data.audio import read_audio
from cald_speech.data.text import normalise
from cald_speech.families.features import heard
from cald_speech.families.hub import load_processor
from cald_speech.longform import AudioSource, stream_logits
from cald_speech.longform.recogniser import Recogniser
from cald_speech.recipes.digits.clip_bootstrap import errors_of_words
from cald_speech.tasks.bootstrap import bootstrap_interval, paired_bootstrap
from cald_speech.tasks.wer import Score, Utterance, score

TEACHER, ALONE = "teacher, whole", "teacher, utterance by utterance"
WHOLE, LONG = "student, whole", "student, long form"
NORMALISER = "librispeech"
Reading = Mapping[str, Any]  # of one chapter: its text, and where it was timed seconds and peak_bytes; or a fault
Chapters = Mapping[str, Mapping[str, Mapping[str, Any]]]  # {chapter: {utterance: entry}}


def reading_rows(readings: Mapping[str, Mapping[str, Reading]], chapters: Chapters) -> list[dict[str, Any]]:
    """A row for each way of reading, over all chapters; one that failed on a chapter says why.

    The intervals draw utterances, whose words a chapter's alignment keeps apart; the paired ones are against the
    teacher's reading of the whole. "CER to ..." takes what the teacher wrote for the reference.
    """
    spoken = {system for system, of in readings.items() if not any("fault" in reading for reading in of.values())}
    scored = {system: _scored(readings[system], chapters) for system in readings if system in spoken}
    places = [(chapter, key) for chapter, of in chapters.items() for key, entry in of.items() for _ in _words(entry)]
    ones, rows = [1] * len(places), []
    errors = {system: [e for u in of for e in errors_of_words(u)] for system, of in scored.items()}
    for system, of_system in readings.items():
        if system not in spoken:
            rows.append({"model": system, "fault": next(r["fault"] for r in of_system.values() if "fault" in r)})
            continue
        words, characters = (sum((getattr(u, of) for u in scored[system]), Score()) for of in ("words", "characters"))
        low, high = bootstrap_interval(errors[system], ones, groups=places)
        row = {"model": system, "words": words.count, "WER %": words.rate, "low": low, "high": high}
        if TEACHER in spoken:
            paired = paired_bootstrap(errors[system], errors[TEACHER], ones, groups=places)
            row |= dict(zip(("minus whole teacher", "diff low", "diff high"), paired, strict=True))
        written = sum(len(u.hypothesis) for u in scored[system])
        row |= {"CER %": characters.rate, "written %": 100 * written / characters.count}
        row |= {f"CER to {to} %": _likeness(readings, system, to) for to in (TEACHER, ALONE) if to in spoken}
        if all("seconds" in reading for reading in of_system.values()):
            row |= {"seconds": sum(reading["seconds"] for reading in of_system.values())}
            row |= {"peak GiB": max(reading["peak_bytes"] for reading in of_system.values()) / 2**30}
        rows.append(row)
    return rows


def chapter_rows(
    readings: Mapping[str, Mapping[str, Reading]], chapters: Chapters, unlike: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row for each chapter: ``unlike`` is the largest difference of the student's logits, whole and long form."""
    rows = []
    for chapter, of in chapters.items():
        long, whole, teacher = (readings[system][chapter] for system in (LONG, WHOLE, TEACHER))
        row = {"chapter": chapter, "minutes": sum(entry["duration_s"] for entry in of.values()) / 60}
        row |= {"whole - long form": f"{unlike[chapter]:.1e}", "same words": _split(long) == _split(whole)}
        for name, reading in (("long form", long), ("whole", whole), ("teacher, whole", teacher)):
            row |= {f"{name} s": reading.get("seconds"), f"{name} GiB": _gib(reading)}
        for to in (TEACHER, ALONE):
            row |= {f"CER to {to} %": _likeness(readings, LONG, to, chapter)}
        if "text" in teacher:
            reference = sum(len(" ".join(_words(entry))) + 1 for entry in of.values()) - 1
            row |= {"teacher wrote %": 100 * len(normalise(teacher["text"], NORMALISER)) / reference}
        rows.append(row)
    return rows


def unlikeness(recogniser: Recogniser, utterances: Mapping[str, Mapping[str, Any]]) -> float:
    """The largest difference of one forward pass's logits from long form's, as a fraction of the largest of them."""
    audio = next(iter(utterances.values()))["audio"]
    extractor = load_processor(recogniser.model.name_or_path).feature_extractor
    values = heard(extractor, read_audio(audio))[None]
    with torch.inference_mode():
        whole = recogniser.model(values.to(recogniser.model.device)).logits[0].float().cpu()
    parts = stream_logits(recogniser.model, AudioSource.open(audio), do_normalize=recogniser.do_normalize)
    return max(float((part - whole[first : first + len(part)]).abs().max()) for first, part in parts) / float(
        whole.abs().max()
    )


def _words(entry: Mapping[str, Any]) -> list[str]:
    return normalise(entry["text"], NORMALISER).split()


def _scored(readings: Mapping[str, Reading], chapters: Chapters) -> Sequence[Utterance]:
    """Each chapter's words and characters, in the order of ``chapters``."""
    references = {
        chapter: " ".join(word for e in of.values() for word in _words(e)) for chapter, of in chapters.items()
    }
    found = score(references, {chapter: normalise(readings[chapter]["text"], NORMALISER) for chapter in chapters})
    by_id = {utterance.id: utterance for utterance in found.utterances}
    return [by_id[chapter] for chapter in chapters]


def _likeness(
    readings: Mapping[str, Mapping[str, Reading]], system: str, to: str, chapter: str | None = None
) -> float | None:
    """The CER of what ``system`` wrote against what ``to`` wrote; None where that is nothing, or either failed."""
    names = list(readings[to]) if chapter is None else [chapter]
    if any("text" not in readings[one][name] for one in (to, system) for name in names):
        return None
    pair = [{name: normalise(readings[one][name]["text"], NORMALISER) for name in names} for one in (to, system)]
    return score(*pair).characters.rate


def _split(reading: Reading) -> list[str]:
    return reading.get("text", "").split()


def _gib(reading: Reading) -> float | None:
    return reading["peak_bytes"] / 2**30 if "peak_bytes" in reading else None
