"""What long audio says: `transcribe` for its words with their times, `align_text` for the times of words one knows."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, Wav2Vec2Processor

from cald_speech.longform.alignment import DEFAULT_BAND
from cald_speech.longform.recogniser import Recogniser, Source
from cald_speech.longform.words import DEFAULT_MARGINS, Margins, Word


def transcribe(
    model: PreTrainedModel | str | Path,
    source: Source,
    *,
    processor: Wav2Vec2Processor | None = None,
    decoding: str = "greedy",
    beam_width: int = 16,
    margins: Margins = DEFAULT_MARGINS,
    chunk_s: float = 10.0,
    dtype: torch.dtype = torch.float32,
    storage: str | Path | None = None,
    device: str | torch.device | None = None,
    force: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Word]:
    """Transcribe audio of any length: an iterator over its words, each as soon as it is complete.

    The text is that of the model's forward pass over the whole. With a bidirectional model the first word comes when
    all of the audio has been encoded.

    Arguments
    ---------
    model : a ...ForCTC model, or its folder or hub id.
    source : the path of an audio file, an AudioSource, or (N,) float samples at 16 kHz. What was wrong with a file is
        the `fault` of an AudioSource once all words have come.
    processor : the model's processor; None loads it from where the model came from.
    decoding : ``greedy``, or ``beam`` for a prefix beam search of ``beam_width`` prefixes.
    margins : how far words reach beyond their tokens.
    chunk_s, dtype, storage, progress : as in `stream_logits`.
    device : where the model runs; None leaves it where it is.
    force : True runs a model too whose every layer kept attention.

    Warns
    -----
    UserWarning
        where there is no speech, and where a file could be read in part, with the time.

    Raises
    ------
    UserError
        for a model with attention in every layer, files and folders that cannot be used, a processor that does not fit.

    Example
    -------
    >>> from cald_speech.longform.transcribe import transcribe
    >>> for word in transcribe("results/digits/target-seed0/model", "talk.flac"):  # doctest: +SKIP
    ...     print(f"{word.start_s:8.2f} {word.text}")
    """
    recogniser = Recogniser.of(model, processor, dtype=dtype, device=device, force=force)
    options = {"chunk_s": chunk_s, "dtype": dtype, "storage": storage, "progress": progress}
    return recogniser.transcribe(source, decoding=decoding, beam_width=beam_width, margins=margins, **options)


def align_text(
    model: PreTrainedModel | str | Path,
    source: Source,
    text: str,
    *,
    processor: Wav2Vec2Processor | None = None,
    unknown: str = "error",
    band: int = DEFAULT_BAND,
    margins: Margins = DEFAULT_MARGINS,
    chunk_s: float = 10.0,
    dtype: torch.dtype = torch.float32,
    storage: str | Path | None = None,
    device: str | torch.device | None = None,
    force: bool = False,
    progress: Callable[[float], None] | None = None,
) -> Iterator[Word]:
    """When each word of a known text is spoken, for audio and text of any length: an iterator over the words.

    Arguments
    ---------
    text : all that is said, in order. Words come back spelled as here.
    unknown : ``error`` refuses characters that the model does not write, ``drop`` aligns the rest of their words.
    band : characters that are looked at in any one frame; see `align`.
    others : as in `transcribe`, with its warnings and errors, and those of `align`.

    Example
    -------
    >>> from cald_speech.longform.transcribe import align_text
    >>> for word in align_text("results/digits/target-seed0/model", "talk.flac", "ONE TWO"):  # doctest: +SKIP
    ...     print(f"{word.start_s:8.2f} {word.text}")
    """
    recogniser = Recogniser.of(model, processor, dtype=dtype, device=device, force=force)
    options = {"chunk_s": chunk_s, "dtype": dtype, "storage": storage, "progress": progress}
    return recogniser.align(source, text, unknown=unknown, band=band, margins=margins, **options)
