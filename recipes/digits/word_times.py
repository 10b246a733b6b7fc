"""How far forced alignment's word times are off, on digits joined with known pauses.

    cald-speech word-times results/digits/target-seed0/model

Clips of the Free Spoken Digit Dataset are joined with random pauses over low noise, and the digit words aligned to the
recording. A word's true extent is taken in two ways: ``clip``, the clip's borders, which may hold some silence; and
``speech``, the first to the last 10 ms within the clip whose power is no more than 30 dB below the loudest 10 ms.

Each model is measured with words as long as their tokens, with the default margins, and with margins fitted (medians of
the differences to ``speech``) on the validation clips; the data set's own test clips are measured.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from cald_speech.commands import options
from cald_speech.data.audio import SAMPLE_RATE, read_audio
from cald_speech.data.joining import join_recording
from cald_speech.errors import UserError
from cald_speech.evaluation.report import format_table
from cald_speech.longform import AudioSource, stream_logits
from cald_speech.longform.alignment import align, labels_of
from cald_speech.longform.recogniser import Recogniser
from cald_speech.longform.words import DEFAULT_MARGINS, FrameTimes, Margins, TokenSpan, words
from cald_speech.recipes.digits.digit_strings import TEST_INDICES, VALID_INDICES, WORDS

STEP = SAMPLE_RATE // 100
BELOW_PEAK_DB = 30.0
TRUTHS = ("clip", "speech")


@dataclass(frozen=True)
class Measured:
    """An aligned recording: its tokens, and the true (start, end) of each word in seconds, (words, 2), by truth."""

    spans: list[TokenSpan]
    truths: dict[str, np.ndarray]


def speech_extent(clip: Tensor) -> tuple[int, int]:
    """Samples [start, stop) of the speech in (N,) audio: from the first loud 10 ms to the end of the last one.

    Example
    -------
    >>> clip = torch.zeros(1_600)
    >>> clip[320:800] = 0.5
    >>> speech_extent(clip)
    (320, 800)
    """
    pieces = clip[: len(clip) // STEP * STEP].view(-1, STEP)
    power = pieces.double().square().mean(-1)
    loud = (power >= power.max() * 10 ** (-BELOW_PEAK_DB / 10)).nonzero().flatten()
    return int(loud[0]) * STEP, (int(loud[-1]) + 1) * STEP


def measure(
    recogniser: Recogniser, folder: Path, indices: Sequence[int], *, num_words: int, words_each: int, pause_s: tuple
) -> list[Measured]:
    """Align recordings of ``words_each`` clips of one speaker, speakers in turn, until there are ``num_words``.

    Raises: UserError, where there are no clips of these indices.
    """
    clips = sorted(path for i in indices for path in folder.glob(f"?_*_{i}.*"))
    if not clips:
        raise UserError(
            f"expected the Free Spoken Digit Dataset as {folder}/<digit>_<speaker>_<index>.wav (or .flac), "
            "but there is nothing of the kind: give its folder as --data_folder"
        )
    speakers, measured = sorted({clip.name.split("_")[1] for clip in clips}), []
    generator = torch.Generator().manual_seed(0)
    for turn in range(max(1, num_words // words_each)):
        own = [clip for clip in clips if clip.name.split("_")[1] == speakers[turn % len(speakers)]]
        picked = [own[i] for i in torch.randint(len(own), (words_each,), generator=generator).tolist()]
        entries = [{"audio": clip, "text": WORDS[int(clip.name[0])]} for clip in picked]
        recording = join_recording(entries, pause_s, generator)
        truths = {truth: np.empty((len(picked), 2)) for truth in TRUTHS}
        for place, (clip, start) in enumerate(zip(picked, recording.starts, strict=True)):
            audio = read_audio(clip)
            for truth, extent in (("clip", (0, len(audio))), ("speech", speech_extent(audio))):
                truths[truth][place] = [(start + sample) / SAMPLE_RATE for sample in extent]
        source = AudioSource.from_samples(recording.samples)
        labels, _ = labels_of(recording.text, recogniser.vocabulary)
        logits = stream_logits(recogniser.model, source, do_normalize=recogniser.do_normalize)
        measured.append(Measured(list(align(logits, labels, recogniser.vocabulary.blank)), truths))
    return measured


def errors_s(recogniser: Recogniser, measured: Sequence[Measured], margins: Margins, truth: str) -> np.ndarray:
    """Start and end of every word minus the true ones, (words, 2) in seconds."""
    times = FrameTimes.of(recogniser.model)
    rows = []
    for recording in measured:
        found = words(recording.spans, recogniser.vocabulary, times, margins)
        rows.append(np.array([(word.start_s, word.end_s) for word in found]) - recording.truths[truth])
    return np.concatenate(rows)


def fit(recogniser: Recogniser, measured: Sequence[Measured]) -> Margins:
    """The margins that bring the median errors against ``speech`` to nought, to the millisecond."""
    start, end = np.median(errors_s(recogniser, measured, Margins(0.0, 0.0), "speech"), axis=0)
    return Margins(lead_s=round(float(start), 3), tail_s=round(-float(end), 3))


def rows_of(name: str, recogniser: Recogniser, test: Sequence[Measured], fitted: Margins) -> list[dict]:
    """A row for each choice of margins and each truth; errors in milliseconds."""
    choices = {"tokens alone": Margins(0.0, 0.0), "default": DEFAULT_MARGINS, "fitted": fitted}
    rows = []
    for choice, margins in choices.items():
        for truth in TRUTHS:
            errors_ms = 1_000 * errors_s(recogniser, test, margins, truth)
            row = {"model": name, "margins": choice, "lead ms": round(1_000 * margins.lead_s)}
            row |= {"tail ms": round(1_000 * margins.tail_s), "truth": truth, "words": len(errors_ms)}
            row |= zip(("start ms", "end ms"), np.median(np.abs(errors_ms), axis=0).tolist(), strict=True)
            row |= zip(("start late ms", "end late ms"), np.median(errors_ms, axis=0).tolist(), strict=True)
            rows.append(row)
    return rows


@options.command("word-times")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True, type=options.ModelSource())
@click.option("--data_folder", type=Path, default="data/fsdd", show_default=True, help="The Free Spoken Digit Dataset.")
@click.option("--num_words", default=1_000, show_default=True)
@click.option("--words_each", default=50, show_default=True, help="Words in each recording.")
@click.option("--pause_s", type=(float, float), default=(0.05, 0.5), show_default=True, help="Shortest and longest.")
@options.device()
def main(models: tuple[str, ...], data_folder: Path, device: str, pause_s: tuple[float, float], **how: int) -> None:
    """How far the word times of each MODEL that writes digits are off, on digits joined with known pauses.

    Prints medians of the absolute errors, medians of the errors (positive: late), and one JSON line.
    """
    how |= {"pause_s": pause_s}
    folder, rows = data_folder / "recordings", []
    for name in models:
        # Recordings are short: attention can be measured too.
        recogniser = Recogniser.of(name, device=device, force=True)
        fitted = fit(recogniser, measure(recogniser, folder, VALID_INDICES, **how))
        rows += rows_of(name, recogniser, measure(recogniser, folder, TEST_INDICES, **how), fitted)
    click.echo(format_table(rows))
    click.echo(json.dumps({"pause_s": pause_s, "below_peak_db": BELOW_PEAK_DB, "rows": rows}))


if __name__ == "__main__":
    main()
