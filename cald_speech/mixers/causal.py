"""Mixers that scan: every frame sees what the scan has passed, and a state goes from piece to piece."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cald_speech.mixers.base import Mixer, Sweep
from cald_speech.mixers.float32 import Float32Parameters
from cald_speech.ops import mask_padding

# Frames that a CPU's inference handles at once, over all sequences: enough for full-speed projections (each product
# packs its weights anew), and little enough that what a layer makes of them stays near the caches.
FRAMES_PER_BLOCK = 1024


class Streams(NamedTuple):
    """What a causal mixer's input projection hands on: ``scanned`` for the scan, ``gate`` for the end."""

    scanned: tuple[Tensor, ...]
    gate: Tensor | None


class Scan(Float32Parameters):
    """The part of a causal mixer that looks across time, over the streams of its projection.

    Its own parameters (A_log, dt_bias, D) stay in float32.
    """

    def forward(
        self, streams: tuple[Tensor, ...], lengths: Tensor | None, *, state: Any, reverse: bool
    ) -> tuple[Tensor, Any]:
        """The streams to (B, T, ...), and the state after the scan's last frame."""
        raise NotImplementedError(f"{type(self).__name__} has no forward()")

    def with_reverse(self, other: "Scan", streams: tuple[Tensor, ...], lengths: Tensor | None) -> Tensor:
        """This scan forwards plus ``other`` in reverse, over the same streams: a scan that can reads them once."""
        past, _ = self(streams, lengths, state=None, reverse=False)
        future, _ = other(streams, lengths, state=None, reverse=True)
        return past + future

    def beside(
        self, other: "Scan", streams: tuple[Tensor, ...], others: tuple[Tensor, ...], lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """This scan forwards over ``streams``, ``other`` in reverse over ``others``: a scan that can runs both at once.

        Both have the same options, and their streams the same shapes.
        """
        past, _ = self(streams, lengths, state=None, reverse=False)
        future, _ = other(others, lengths, state=None, reverse=True)
        return past, future

    def pass_through(self) -> None:
        """Let the scan see what the projection put out: for a start from attention weights."""


class CausalMixer(Mixer):
    """A mixer whose frame t sees frames <= t only (>= t with ``reverse``), in three parts that can be shared.

    ``project`` and ``finish`` work on each frame alone; only ``scan`` looks across time and carries a state. Any
    chunking of the input, in either direction, gives the same result when the state is handed on.
    """

    scan: Scan

    def project(self, x: Tensor) -> Streams:
        """(B, T, D) to the streams that the scan and the gate need."""
        raise NotImplementedError(f"{type(self).__name__} has no project()")

    def finish(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """The scan's output (B, T, ...) and the gate to (B, T, D)."""
        raise NotImplementedError(f"{type(self).__name__} has no finish()")

    def new_scan(self) -> Scan:
        """Another, freshly initialised scan over the same streams: for the second direction."""
        raise NotImplementedError(f"{type(self).__name__} has no new_scan()")

    def sweeps(self) -> tuple[Sweep, ...]:
        return (Sweep(lambda x, partial, state: self(x, state=state, return_state=True)),)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        state: Any = None,
        return_state: bool = False,
        reverse: bool = False,
    ) -> Tensor | tuple[Tensor, Any]:
        """(B, T, D) to (B, T, D); with ``return_state`` also what the next piece needs as ``state``.

        Inference on a CPU runs block by block in its caches, and makes nothing of full length but the output.
        """
        if in_blocks(x):
            out, state = self.infer(x, lengths, state=state, reverse=reverse)
        else:
            streams = self.project(x)
            y, state = self.scan(streams.scanned, lengths, state=state, reverse=reverse)
            out = mask_padding(self.finish(y, streams.gate), lengths)
        return (out, state) if return_state else out

    def infer(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        *,
        state: Any = None,
        reverse: bool = False,
        add_to: Tensor | None = None,
    ) -> tuple[Tensor, Any]:
        """What :meth:`forward` gives and the state, block by block without gradients; added to ``add_to`` in place."""
        num_frames, out, held = x.size(1), add_to, None
        size = max(64, FRAMES_PER_BLOCK // max(1, x.size(0)))
        starts = range(0, num_frames, size)
        for start in reversed(starts) if reverse else starts:
            frames = slice(start, min(start + size, num_frames))
            valid = None if lengths is None else (lengths - start).clamp(0, frames.stop - start)
            streams = self.project(x[:, frames])
            y, state = self.scan(streams.scanned, valid, state=state, reverse=reverse)
            piece = mask_padding(self.finish(y, streams.gate), valid)
            if out is None:
                out = piece.new_empty(*x.shape[:2], piece.size(2))
            # The streams live until the next block has its own: memory that is handed back and asked for again with
            # every block would cost its page faults.
            held = (streams, y)
            out[:, frames].copy_(piece) if add_to is None else out[:, frames].add_(piece)
        del held
        return out, state


def in_blocks(x: Tensor) -> bool:
    """Whether ``x`` (B, T, D) is more than one block of inference on a CPU."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.size(0) * x.size(1) > FRAMES_PER_BLOCK
