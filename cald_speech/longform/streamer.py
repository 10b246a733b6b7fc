"""What live inference remembers between two pieces of audio: samples, frames, and the states of the forward scans."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families import FrontEnd, Opened, SpeechFamily, family_of
from cald_speech.longform.front import convolve
from cald_speech.longform.statistics import AudioStatistics
from cald_speech.mixers import Sweep


class Streamer:
    """All that is remembered between two chunks: samples, frames and states, none of which grow with the audio.

    ``push`` takes samples and gives the logits that have become possible, ``finish`` the rest. ``lookahead`` counts
    frames; :func:`~cald_speech.longform.live.stream` documents the other arguments.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lookahead: int,
        statistics: AudioStatistics | None,
        do_normalize: bool,
    ):
        family = family_of(model, SpeechFamily)
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
        return self._emit(self.audio.push(samples), is_last=False)

    @torch.inference_mode()
    def finish(self) -> Tensor:
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
