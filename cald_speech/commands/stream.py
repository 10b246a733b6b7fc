"""``cald-speech stream``: words while the audio arrives."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import click
import numpy as np
import torch
from torch import Tensor

from cald_speech.audio_files.resampling import resampled
from cald_speech.commands import options
from cald_speech.commands.transcribe import DECODING, FORMAT, MARGINS, MODEL
from cald_speech.families import family_of
from cald_speech.longform import AudioSource, Recogniser, latency_s
from cald_speech.longform.formats import FORMATS
from cald_speech.longform.front_end import AudioStatistics, measure
from cald_speech.longform.source import SAMPLE_RATE
from cald_speech.longform.words import Margins

BYTES = 2  # of a sample
STATISTICS = click.option(
    "--statistics",
    type=Path,
    help="A recording of the same kind, by which the input is normalised. Default: what was heard so far. Models with "
    "GroupNorm (wav2vec2-base) need one.",
)


@options.command()
@click.argument("source", metavar="FILE|-")
@MODEL
@click.option(
    "--lookahead_s",
    type=click.FloatRange(min=0),
    help="Seconds that a bidirectional model hears beyond a frame; a causal model needs none.",
)
@click.option(
    "--chunk_s", type=click.FloatRange(min=0.01), default=0.5, show_default=True, help="Seconds read at once."
)
@click.option(
    "--rate",
    type=click.IntRange(min=1_000),
    default=SAMPLE_RATE,
    show_default=True,
    help="Of audio on the standard input, in Hz.",
)
@STATISTICS
@FORMAT
@DECODING
@MARGINS
@options.target_lang()
@options.device()
@options.dtype()
def stream(
    source: str,
    model: str,
    lookahead_s: float | None,
    chunk_s: float,
    rate: int,
    statistics: Path | None,
    form: str,
    decoding: str,
    beam_width: int,
    lead_s: float,
    tail_s: float,
    device: str,
    dtype: torch.dtype,
    target_lang: str | None,
) -> int:
    """Write the words of FILE, or of audio that arrives on the standard input (-), each as soon as it is over.

    What arrives on the standard input is raw: 16 bits a sample, little-endian, one channel. From a microphone:

    \b
        arecord -q -f S16_LE -r 16000 -c 1 -t raw | cald-speech stream - --model FOLDER

    All layers of the model must be converted. Ctrl-C ends it, with status 130; what was written stays.
    """
    options.refuse_idle(
        beam_width=(decoding == "beam", "--decoding beam"), rate=(source == "-", "audio on the standard input")
    )
    recogniser = Recogniser.of(model, dtype=dtype, device=device, force=True, target_lang=target_lang)
    behind_s = latency_s(recogniser.model, lookahead_s)
    audio = None if source == "-" else AudioSource.open(source)
    if audio is None:
        chunks = resampled(_raw(click.get_binary_stream("stdin"), round(chunk_s * rate)), rate, SAMPLE_RATE)
    else:
        chunks = audio.blocks(round(chunk_s * SAMPLE_RATE))
    words = recogniser.live(
        chunks,
        lookahead_s=lookahead_s,
        statistics=measured(recogniser, statistics),
        decoding=decoding,
        beam_width=beam_width,
        margins=Margins(lead_s, tail_s),
    )
    click.echo(f"frames come {behind_s:.2f} s after they are heard, in chunks of {chunk_s:g} s", err=True)
    for piece in FORMATS[form].write(words, recording="stdin" if audio is None else Path(source).stem):
        click.echo(piece, nl=False)
    if audio is None or audio.fault is None:
        return 0
    click.echo(f"warning: {source}: only the first {audio.fault.time_s:.2f} s: {audio.fault.message}", err=True)
    return 1


def measured(recogniser: Recogniser, recording: Path | None) -> AudioStatistics | None:
    """What --statistics stands for."""
    if recording is None:
        return None
    front = family_of(recogniser.model).front_end(recogniser.model)
    return measure(AudioSource.open(recording), front, normalise=recogniser.do_normalize)


def _raw(file: BinaryIO, samples: int) -> Iterator[Tensor]:
    """(n,) samples in [-1, 1), as they come, ``samples`` at once but for the last ones; half a sample is none."""
    while data := file.read(BYTES * samples):
        whole = np.frombuffer(data, dtype="<i2", count=len(data) // BYTES)
        yield torch.from_numpy(whole.astype(np.float32) / 2**15)
