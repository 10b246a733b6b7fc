"""Ways of reading a recording of any length with a CTC model, behind one signature: samples in, text out."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutomaticSpeechRecognitionPipeline, PreTrainedModel, Wav2Vec2Processor

from cald_speech.data.audio import SAMPLE_RATE
from cald_speech.families.features import heard
from cald_speech.longform import AudioSource, transcribe
from cald_speech.tasks.decoding import greedy

Reader = Callable[[Tensor], str]
"""(N,) float32 samples at 16 kHz to the words that were read, greedily."""


def whole(model: PreTrainedModel, processor: Wav2Vec2Processor) -> Reader:
    """The whole recording in one forward pass of the model, as short utterances are read."""

    def read(samples: Tensor) -> str:
        values = heard(processor.feature_extractor, samples)[None]
        with torch.inference_mode():
            logits = model(values.to(model.device, model.dtype)).logits
        return greedy(logits, torch.tensor([logits.size(1)]), processor.tokenizer)[0]

    return read


def long_form(model: PreTrainedModel, processor: Wav2Vec2Processor) -> Reader:
    """The same result in bounded memory: :mod:`cald_speech.longform`."""

    def read(samples: Tensor) -> str:
        words = transcribe(model, AudioSource.from_samples(samples), processor=processor, force=True)
        return " ".join(word.text for word in words)

    return read


def chunk_and_stitch(
    model: PreTrainedModel, processor: Wav2Vec2Processor, *, chunk_s: float = 20.0, stride_s: float = 4.0
) -> Reader:
    """transformers' own chunked pipeline: overlapping pieces, each read alone, cut in the middle of the overlap."""
    pipeline = AutomaticSpeechRecognitionPipeline(
        model=model, tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor
    )

    def read(samples: Tensor) -> str:
        audio = {"raw": samples.numpy(), "sampling_rate": SAMPLE_RATE}
        return pipeline(audio, chunk_length_s=chunk_s, stride_length_s=stride_s)["text"]

    return read


READERS = {"whole": whole, "long-form": long_form, "chunks": chunk_and_stitch}
