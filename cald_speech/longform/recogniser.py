"""What long audio says: the encoder in one exact pass over all of it, then decoding as the logits come.

:func:`transcribe` gives the words with their times, :func:`align_text` the times of words that one knows. Both make a
:class:`Recogniser`, a CTC model ready for audio of any length, which can be kept for many files and for live audio.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Wav2Vec2Processor

from cald_speech.conversion import check_device, from_pretrained
from cald_speech.errors import UserError
from cald_speech.families import SpeechFamily, family_of
from cald_speech.families.hub import load_processor
from cald_speech.longform.alignment import DEFAULT_BAND, align, labels_of
from cald_speech.longform.ctc import LogitChunks, beam_search, greedy, numbered
from cald_speech.longform.encoder import stream_logits
from cald_speech.longform.live import stream
from cald_speech.longform.source import SAMPLE_RATE, AudioSource
from cald_speech.longform.words import DEFAULT_MARGINS, FrameTimes, Margins, TokenSpan, Vocabulary, Word, words

Source = str | Path | AudioSource | Tensor


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
        the ``fault`` of an AudioSource once all words have come.
    processor : the model's processor; None loads it from where the model came from.
    decoding : ``greedy``, or ``beam`` for a prefix beam search of ``beam_width`` prefixes.
    margins : how far words reach beyond their tokens.
    chunk_s, dtype, storage, progress : as in :func:`~cald_speech.longform.stream_logits`.
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
    >>> from cald_speech import transcribe
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
    band : characters that are looked at in any one frame; see :func:`~cald_speech.longform.alignment.align`.
    others : as in :func:`transcribe`, with its warnings and errors, and those of ``align``.

    Example
    -------
    >>> from cald_speech.longform import align_text
    >>> for word in align_text("results/digits/target-seed0/model", "talk.flac", "ONE TWO"):  # doctest: +SKIP
    ...     print(f"{word.start_s:8.2f} {word.text}")
    """
    recogniser = Recogniser.of(model, processor, dtype=dtype, device=device, force=force)
    options = {"chunk_s": chunk_s, "dtype": dtype, "storage": storage, "progress": progress}
    return recogniser.align(source, text, unknown=unknown, band=band, margins=margins, **options)


@dataclass(frozen=True)
class Recogniser:
    """A CTC model, what its outputs mean, and how it is run over long audio.

    ``options`` are those of :func:`~cald_speech.longform.stream_logits`: chunk_s, dtype, storage, progress.
    """

    model: PreTrainedModel
    vocabulary: Vocabulary
    do_normalize: bool

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | str | Path,
        processor: Wav2Vec2Processor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        force: bool = False,
        target_lang: str | None = None,
    ) -> "Recogniser":
        """Load what is given as a folder or hub id; arguments and errors as in :func:`transcribe`."""
        if device is not None:
            check_device(device)
        folder = model.name_or_path if isinstance(model, PreTrainedModel) else str(model)
        if not isinstance(model, PreTrainedModel):
            model = from_pretrained(folder, dtype=dtype, target_lang=target_lang, new_head=False)
        family = family_of(model)
        if not force and not any(family.mixer(layer) for layer in family.layers(model)):
            raise UserError(
                "every layer of this model kept its attention, so memory and time will grow with the square of the "
                "length: an hour has 32 thousand million scores for each head and layer. Convert the model, cut the "
                "audio into parts, or go ahead with force=True (--force)"
            )
        if processor is None and not folder:
            raise UserError("the model came from no folder: expected a processor with it (processor=...)")
        processor = processor or load_processor(folder, target_lang)
        if not (hasattr(processor, "tokenizer") and hasattr(processor, "feature_extractor")):
            raise UserError(
                f"{folder or 'the processor'}: expected a processor with a tokenizer and a feature extractor, got a "
                f"{type(processor).__name__}"
            )
        rate = processor.feature_extractor.sampling_rate
        if rate != SAMPLE_RATE:
            raise UserError(
                f"{folder or 'the processor'}: expected a processor for {SAMPLE_RATE} Hz, got one for {rate} Hz"
            )
        try:
            vocabulary = Vocabulary.of(processor.tokenizer, model.config.vocab_size)
        except UserError as error:
            raise UserError(f"{folder or 'the processor'}: {error}") from error
        if model.config.vocab_size > len(vocabulary.tokens):
            raise UserError(
                f"the model has {model.config.vocab_size} outputs, but the tokenizer {len(vocabulary.tokens)} tokens: "
                "expected the processor that the model was trained with"
            )
        log_mel = family_of(model, SpeechFamily).front_end(model).log_mel
        if log_mel is not None and (unlike := log_mel.unlike(processor.feature_extractor)):
            raise UserError(
                f"{folder or 'the processor'}: expected the features that {family.model_type} models are trained on, "
                f"got a {type(processor.feature_extractor).__name__} with {', '.join(unlike)}. Long audio is heard "
                "with these alone: give the model's own processor"
            )
        model = model if device is None else model.to(device)
        return cls(model, vocabulary, getattr(processor.feature_extractor, "do_normalize", True))

    def transcribe(
        self,
        source: Source,
        *,
        decoding: str = "greedy",
        beam_width: int = 16,
        margins: Margins = DEFAULT_MARGINS,
        **options,
    ) -> Iterator[Word]:
        """The words of the audio, as they come; see :func:`transcribe`."""
        decode = self._decoder(decoding, beam_width)
        return self._words(open_source(source), _name(source), decode, margins, options)

    def live(
        self,
        chunks: Iterable[Tensor],
        *,
        decoding: str = "greedy",
        beam_width: int = 16,
        margins: Margins = DEFAULT_MARGINS,
        **options,
    ) -> Iterator[Word]:
        """The words of audio that arrives piece by piece, each as soon as it is over; ``options`` as in ``stream``."""
        decode = self._decoder(decoding, beam_width)
        logits = stream(self.model, chunks, do_normalize=self.do_normalize, **options)
        return words(decode(numbered(logits)), self.vocabulary, FrameTimes.of(self.model), margins)

    def align(
        self,
        source: Source,
        text: str,
        *,
        unknown: str = "error",
        band: int = DEFAULT_BAND,
        margins: Margins = DEFAULT_MARGINS,
        **options,
    ) -> Iterator[Word]:
        """The words of a known text and when they are spoken; see :func:`align_text`."""
        labels, spelled = labels_of(text, self.vocabulary, unknown=unknown)
        if len(spelled) < len(text.split()):
            warnings.warn(
                f"{len(text.split()) - len(spelled)} words have no letter that the model writes", stacklevel=2
            )
        find = partial(align, labels=labels, blank=self.vocabulary.blank, band=band, storage=options.get("storage"))
        sizes = [len(self.vocabulary.spell(word, any_case=True)[0]) for word in spelled]
        found = self._words(open_source(source), _name(source), find, margins, options, sizes)
        return (replace(word, text=as_given) for word, as_given in zip(found, spelled, strict=False))

    def _decoder(self, decoding: str, beam_width: int) -> Callable[[LogitChunks], Iterator[TokenSpan]]:
        decoders = {"greedy": greedy, "beam": partial(beam_search, beam_width=beam_width)}
        if decoding not in decoders:
            raise UserError(f"decoding: expected one of {', '.join(decoders)}, got {decoding!r}")
        return partial(decoders[decoding], blank=self.vocabulary.blank)

    def _words(
        self,
        audio: AudioSource,
        name: str,
        decode: Callable[[LogitChunks], Iterator[TokenSpan]],
        margins: Margins,
        options: dict,
        sizes: Sequence[int] | None = None,
    ) -> Iterator[Word]:
        count = 0
        front = family_of(self.model, SpeechFamily).front_end(self.model)
        if front.num_frames(audio.num_samples) >= front.squeeze:
            logits = stream_logits(self.model, audio, do_normalize=self.do_normalize, **options)
            for word in words(decode(logits), self.vocabulary, FrameTimes.of(self.model), margins, sizes):
                count += 1
                yield replace(word, end_s=min(word.end_s, audio.duration_s))
        if audio.fault is not None:
            warnings.warn(f"{name}: only the first {audio.fault.time_s:.2f} s: {audio.fault.message}", stacklevel=2)
        if not count:
            warnings.warn(f"{name}: no speech was found in {audio.duration_s:.2f} s of audio", stacklevel=2)


def open_source(source: Source) -> AudioSource:
    """The audio that a path, samples at 16 kHz or an AudioSource stand for."""
    if isinstance(source, AudioSource):
        return source
    return AudioSource.from_samples(source) if isinstance(source, Tensor) else AudioSource.open(source)


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the audio"
