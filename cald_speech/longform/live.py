"""Live: logits while the audio arrives; exact from a causal student, with a bounded lookahead from a bidirectional one.

What keeps a frame waiting is the architecture's own: the positional convolution sees 64 frames (1.28 s) ahead in the
pretrained models. A bidirectional student waits for N seconds more. Its forward scans go on from where they stood; its
backward scans start anew at the last frame that has arrived, N seconds ahead of the frames that are given out, and what
lies beyond is missing from their state. Since all layers do so over the same frames, the wait is N and not N a layer.

Two statistics of the whole utterance cannot be had live. The mean and variance of the input are those of what was heard
so far, or given ones; the moments of a GroupNorm front end (wav2vec2-base and its kin) must be given.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families import FrontEnd, Opened, SpeechFamily, family_of
from cald_speech.longform.front_end import AudioStatistics, convolve
from cald_speech.longform.source import SAMPLE_RATE
from cald_speech.mixers import Sweep


def stream(
    model: PreTrainedModel,
    chunks: Iterable[Tensor],
    *,
    lookahead_s: float | None = None,
    statistics: AudioStatistics | None = None,
    do_normalize: bool = True,
) -> Iterator[Tensor]:
    """Logits of audio that arrives piece by piece, each frame as soon as it can be had.

    Arguments
    ---------
    model : a converted model with a head, in evaluation mode, without any attention left.
    chunks : (n,) float samples at 16 kHz each, of any sizes. Where lookahead_s is set, every chunk costs the work of
        its own frames and of the lookahead's: chunks of about lookahead_s keep that in bounds.
    lookahead_s : how far ahead of a frame the backward scans start. A causal student needs none and takes no notice.
    statistics : of other audio of the same kind (or of this one), from :func:`cald_speech.longform.front_end.measure`.
        They then normalise the input, and the first convolution of GroupNorm models. None: the input is normalised by
        what was heard so far, the present chunk included.
    do_normalize : as in the model's feature extractor; with ``statistics`` it is theirs that counts.

    Yields
    ------
    (t, V) float32 logits, on the CPU: all frames in order, none twice. Frames come :func:`latency_s` after their audio,
    the last ones when the chunks end. With ``statistics`` of the whole audio, a causal student's are those of its
    whole-utterance forward pass, and a bidirectional one's are once lookahead_s reaches the end of the audio.

    Raises
    ------
    UserError
        for a model with attention or without a head, a bidirectional one without lookahead_s, and a GroupNorm one
        without statistics.
    ValueError
        for a model in training mode and a negative lookahead_s.

    Example
    -------
    >>> import torch
    >>> from transformers import Wav2Vec2Config
    >>> from cald_speech import LayerMap, convert
    >>> from cald_speech.families import families
    >>> from cald_speech.mixers import Mamba2
    >>> config = Wav2Vec2Config(
    ...     hidden_size=32, num_hidden_layers=2, num_attention_heads=2, feat_extract_norm="layer"
    ... )
    >>> model = families()["wav2vec2"].load(config)
    >>> _ = convert(model, LayerMap(Mamba2))
    >>> seconds = torch.randn(4 * 16_000).split(16_000)
    >>> [logits.size(0) for logits in stream(model.eval(), seconds)]  # 1.28 s behind, and all of it at the end
    [35, 50, 50, 64]
    """
    if model.training:
        raise ValueError("model: expected one in evaluation mode, got one in training mode. Call model.eval()")
    lookahead = lookahead_frames(model, lookahead_s)
    return _stream(Streamer(model, lookahead, statistics, do_normalize), chunks)


def latency_s(model: PreTrainedModel, lookahead_s: float | None = None) -> float:
    """Seconds from the end of a frame's audio to the earliest moment at which :func:`stream` can give its logits.

    The size of the chunks and the time to compute come on top. Same errors as :func:`stream`.

    Example
    -------
    >>> from transformers import Wav2Vec2Config
    >>> from cald_speech import LayerMap, convert
    >>> from cald_speech.families import families
    >>> from cald_speech.mixers import Bidirectional
    >>> model = families()["wav2vec2"].load(Wav2Vec2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    >>> _ = convert(model, LayerMap(Bidirectional))
    >>> latency_s(model, lookahead_s=2.0)
    3.28
    """
    front = family_of(model, SpeechFamily).front_end(model)
    return (front.positions_reach + lookahead_frames(model, lookahead_s)) * front.stride / SAMPLE_RATE


def lookahead_frames(model: PreTrainedModel, lookahead_s: float | None) -> int:
    """Frames that a frame's layers wait for. Raises as :func:`stream` does where the layers cannot run live."""
    family = family_of(model, SpeechFamily)
    mixers = [family.mixer(layer) for layer in family.layers(model)]
    sweeps = [() if mixer is None else mixer.sweeps() for mixer in mixers]
    stuck = [i for i, runs in enumerate(sweeps) if not runs or any(sweep.whole for sweep in runs)]
    if stuck:
        names = ", ".join(f"{i} ({'attention' if mixers[i] is None else type(mixers[i]).__name__})" for i in stuck)
        raise UserError(
            "a model can run live where all its layers have mixers that scan, but these need the whole audio: "
            f"{names}. Convert them too, or transcribe recorded audio"
        )
    if family.front_end(model).squeeze > 1:
        raise UserError(
            f"{family.model_type} models cannot run live: their layers run at a lower rate than their output. "
            "Transcribe recorded audio"
        )
    if any(family.open(layer).reach for layer in family.layers(model)):
        raise UserError(
            f"{family.model_type} models cannot run live: each of their layers has a convolution that hears frames to "
            "come. Transcribe recorded audio"
        )
    if not any(sweep.reverse for runs in sweeps for sweep in runs):
        return 0
    if lookahead_s is None:
        raise UserError(
            "the model's mixers scan backwards too: give lookahead_s, the seconds of audio that they are to hear first "
            "(--lookahead_s). More is slower to answer and nearer to the whole"
        )
    if lookahead_s < 0:
        raise ValueError(f"lookahead_s: expected at least 0, got {lookahead_s}")
    return math.ceil(lookahead_s * SAMPLE_RATE / family.front_end(model).stride)


def _stream(streamer: "Streamer", chunks: Iterable[Tensor]) -> Iterator[Tensor]:
    for chunk in chunks:
        logits = streamer.push(chunk)
        if logits.size(0):
            yield logits
    logits = streamer.finish()
    if logits.size(0):
        yield logits


class Streamer:
    """All that is remembered between two chunks: samples, frames and states, none of which grow with the audio.

    ``push`` takes samples and gives the logits that have become possible, ``finish`` the rest. ``lookahead`` counts
    frames; :func:`stream` documents the other arguments.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lookahead: int,
        statistics: AudioStatistics | None,
        do_normalize: bool,
    ):
        family = family_of(model, SpeechFamily)
        self.context = family.context(model)
        front = family.front_end(model)
        if front.normed is not None and statistics is None:
            raise UserError(
                "the model normalises its first convolution over the whole audio (feat_extract_norm: group), which "
                "cannot be known live: give the statistics of a recording of the same kind"
            )
        self.lookahead = lookahead
        self.audio = LiveFrontEnd(front, statistics, do_normalize, model)
        self.layers = [LiveLayer(family.open(e), family.mixer(e).sweeps()) for e in family.layers(model)]
        self.head, self.norm = family.head(model), front.output_norm
        self.waiting = torch.zeros(1, 0, model.config.hidden_size, dtype=model.dtype, device=model.device)

    @torch.inference_mode()
    def push(self, samples: Tensor) -> Tensor:
        self.context.forget()
        return self._emit(self.audio.push(samples), is_last=False)

    @torch.inference_mode()
    def finish(self) -> Tensor:
        self.context.forget()
        return self._emit(self.audio.finish(), is_last=True)

    def _emit(self, x: Tensor, *, is_last: bool) -> Tensor:
        x = torch.cat([self.waiting, x], dim=1)
        count = x.size(1) if is_last else max(0, x.size(1) - self.lookahead)
        self.waiting = x[:, count:].clone()
        if count:
            for layer in self.layers:
                x = layer(x, count)
        return self.head(self.norm(x[:, :count]))[0].float().cpu()


class LiveFrontEnd:
    """Samples to the first layer's input, each frame as soon as the positional convolution has seen all it sees."""

    def __init__(self, front: FrontEnd, statistics: AudioStatistics | None, do_normalize: bool, model: PreTrainedModel):
        self.front, self.given = front, statistics is not None
        self.statistics = statistics or AudioStatistics.for_model(front, normalise=do_normalize)
        self.like = torch.zeros(1, 0, model.config.hidden_size, dtype=model.dtype, device=model.device)
        self.samples = torch.zeros(0)  # from the first one that the next frame is made of
        self.projected = self.like  # from the first frame that the next position's convolution sees
        self.seen = 0  # frames of ``projected`` that have been given out already

    def push(self, samples: Tensor) -> Tensor:
        """(n,) samples to the frames (1, t, D) that they complete."""
        front = self.front
        if not self.given:
            self.statistics.add(samples)
        self.samples = torch.cat([self.samples, samples.float().cpu()])
        count = front.num_frames(self.samples.numel())
        if count:
            audio = self.samples[: (count - 1) * front.stride + front.receptive_field]
            audio = self.statistics.normalised(audio).to(self.like)
            self.samples = self.samples[count * front.stride :].clone()
            new = convolve(front, audio, self.statistics.moments(front))
            self.projected = torch.cat([self.projected, new], dim=1)
        return self._with_positions(self.projected.size(1) - self.seen - front.positions_reach)

    def finish(self) -> Tensor:
        """The frames that were waiting for audio that does not come."""
        return self._with_positions(self.projected.size(1) - self.seen)

    def _with_positions(self, count: int) -> Tensor:
        """The next ``count`` frames."""
        if count <= 0:
            return self.like
        front, own = self.front, slice(self.seen, self.seen + count)
        x = front.input_norm(self.projected[:, own] + front.positions(self.projected)[:, own])
        drop = max(0, own.stop - front.positions_reach)
        self.projected, self.seen = self.projected[:, drop:].clone(), own.stop - drop
        return x


class LiveLayer:
    """One layer and the states of its forward scans, which stand behind the last frame that was given out."""

    def __init__(self, opened: Opened, sweeps: tuple[Sweep, ...]):
        self.opened, self.sweeps = opened, sweeps
        self.states: list[Any] = [None] * len(sweeps)

    def __call__(self, x: Tensor, count: int) -> Tensor:
        """The next frames (1, t, D), of which ``count`` are given out; the others only inform the backward scans."""
        h, partial = self.opened.before(x), None
        for number, sweep in enumerate(self.sweeps):
            if sweep.reverse:
                partial, _ = sweep.step(h, partial, None)
            else:
                partial = self._forward(number, h, partial, count)
        return self.opened.after(x, partial)

    def _forward(self, number: int, h: Tensor, partial: Tensor | None, count: int) -> Tensor:
        step = self.sweeps[number].step
        left, ahead = (None, None) if partial is None else (partial[:, :count], partial[:, count:])
        out, self.states[number] = step(h[:, :count], left, self.states[number])
        if count == h.size(1):
            return out
        return torch.cat([out, step(h[:, count:], ahead, self.states[number])[0]], dim=1)
