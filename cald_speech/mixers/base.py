"""What fills a layer's slot: a mixer maps (B, T, D) to (B, T, D), adds no residual and knows no Hugging Face."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cald_speech.ops import mask_padding

MixerFactory = Callable[[int, int], "Mixer"]
"""(d_model, num_heads) -> Mixer; in yaml ``!name:cald_speech.mixers.Mamba2`` with any keyword arguments."""

# The scans' decay rates, step sizes and skip weights, by name. They stay in float32 whatever the model's dtype (decays
# and steps are exponentiated: rounding changes how far a layer remembers) and have no weight decay (which would too).
SCAN_PARAMETERS = ("A_log", "dt_bias", "D")

# Frames that a CPU's inference handles at once, over all sequences: what a layer makes of them stays in the caches.
FRAMES_PER_BLOCK = 512


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one self-attention, after whatever fusing its architecture does is undone.

    q : (H, d, D) query projection, for each of H heads of size d and model width D; k, v : (G, d, D) with G dividing H
    (G < H: grouped-query attention); o : (D, H, d) output projection. The biases q_bias (H, d), k_bias, v_bias (G, d)
    and o_bias (D,) are None where the attention has none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None

    def with_output_scaled(self, factor: float) -> "AttentionWeights":
        """The same attention with its output multiplied by ``factor``: for mixers whose outputs are summed."""
        return replace(self, o=self.o * factor, o_bias=None if self.o_bias is None else self.o_bias * factor)

    def expanded(self) -> "AttentionWeights":
        """Keys and values repeated, so that every head has its own."""
        repeats = self.q.size(0) // self.k.size(0)
        names = ("k", "v", "k_bias", "v_bias")
        grown = {name: getattr(self, name) for name in names}
        grown = {name: None if w is None else w.repeat_interleave(repeats, dim=0) for name, w in grown.items()}
        return replace(self, **grown)


class Mixer(nn.Module):
    """Base of every token mixer. Subclasses are built as ``Mixer(d_model, num_heads, **options)``."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, D) and the (B,) numbers of valid frames to (B, T, D); padded frames come out as zeros."""
        raise NotImplementedError(f"{type(self).__name__} has no forward()")

    @torch.no_grad()
    def init_from_attention(self, weights: AttentionWeights) -> frozenset[str]:
        """Copy what can be copied from the attention that stood in the slot; the default keeps the own initialisation.

        Returns the names of this mixer's parameters that now hold attention weights, for the conversion report.
        Raises ValueError, with the option to change, where the geometry of mixer and attention does not fit.
        """
        return frozenset()


class Streams(NamedTuple):
    """What a causal mixer's input projection hands on: ``scanned`` for the scan, ``gate`` for the end."""

    scanned: tuple[Tensor, ...]
    gate: Tensor | None


class Scan(nn.Module):
    """The part of a causal mixer that looks across time, over the streams of its projection."""

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
        run = self._in_blocks if _fits_no_cache(x) else self._at_once
        out, state = run(x, lengths, state, reverse)
        return (out, state) if return_state else out

    def _at_once(self, x: Tensor, lengths: Tensor | None, state: Any, reverse: bool) -> tuple[Tensor, Any]:
        streams = self.project(x)
        y, state = self.scan(streams.scanned, lengths, state=state, reverse=reverse)
        return mask_padding(self.finish(y, streams.gate), lengths), state

    def _in_blocks(self, x: Tensor, lengths: Tensor | None, state: Any, reverse: bool) -> tuple[Tensor, Any]:
        num_frames, out = x.size(1), None
        size = max(64, FRAMES_PER_BLOCK // x.size(0))
        starts = range(0, num_frames, size)
        for start in reversed(starts) if reverse else starts:
            frames = slice(start, min(start + size, num_frames))
            valid = None if lengths is None else (lengths - start).clamp(0, frames.stop - start)
            piece, state = self._at_once(x[:, frames], valid, state, reverse)
            if out is None:
                out = piece.new_empty(*x.shape[:2], piece.size(2))
            out[:, frames] = piece
        return out, state


def _fits_no_cache(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.size(0) * x.size(1) > 2 * FRAMES_PER_BLOCK
