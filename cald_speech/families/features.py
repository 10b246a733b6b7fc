"""From samples to what a model hears, by its own feature extractor: samples, or the features that are made of them."""

import torch
from torch import Tensor
from transformers import SequenceFeatureExtractor, WhisperFeatureExtractor

from cald_speech.errors import UserError


def heard(extractor: SequenceFeatureExtractor, samples: Tensor) -> Tensor:
    """(N,) samples, at the extractor's rate, as the model takes them, in float32: (N,) samples or (T, C) features.

    No frame is padding, but where the model hears one window, of which the silence behind the audio is a part.

    Raises
    ------
    UserError
        for audio beyond that window, which the extractor would cut off, and for so little that there is no variance of
        its features to divide by.

    Example
    -------
    >>> heard(WhisperFeatureExtractor(), torch.zeros(16_000)).shape
    torch.Size([3000, 80])
    """
    window_s = window_of(extractor)
    if window_s is not None and len(samples) > window_s * extractor.sampling_rate:
        raise UserError(beyond_window(window_s, len(samples) / extractor.sampling_rate))
    features = extractor(samples.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")
    values = features[extractor.model_input_names[0]][0].to(torch.float32)
    if values.dim() == 1:
        return values
    if window_s is not None:
        return values.t()
    # Of an odd number of feature frames the extractor makes a last one that it masks.
    values = values[: features.attention_mask[0].sum()]
    if len(values) == 0 or (len(values) == 1 and values.isnan().any()):
        raise UserError(
            f"expected audio of at least two frames of features, got {len(samples)} samples, which are {len(values)}. "
            "Leave it out, or put silence behind it"
        )
    return values


def window_of(extractor: SequenceFeatureExtractor) -> float | None:
    """Seconds of the window that an extractor pads all audio to; None where audio may have any length.

    Example
    -------
    >>> window_of(WhisperFeatureExtractor())
    30.0
    """
    if not isinstance(extractor, WhisperFeatureExtractor):
        return None
    return extractor.n_samples / extractor.sampling_rate


def beyond_window(window_s: float, duration_s: float) -> str:
    """What a user is told whose audio is longer than the window."""
    return (
        f"expected up to {window_s:g} s, the window that this model hears, got {duration_s:.1f} s. Leave it out, or "
        'cut it: "start_s" and "duration_s" of a manifest name a segment'
    )
