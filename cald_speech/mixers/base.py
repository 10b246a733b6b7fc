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

# Frames that a CPU's inference handles at once, over all sequences: enough for full-speed projections (each product
# packs its weights anew), and little enough that what a layer makes of them stays near the caches.
FRAMES_PER_BLOCK = 1024


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


class Sweep(NamedTuple):
    """One run of a mixer over a sequence of any length, block by block: see :meth:`Mixer.sweeps`.

    ``step(x, partial, state)`` gives ``(out, state)``. x (B, t, D) is the next block of the mixer's input in the order
    of the sweep, partial (B, t, W) what the sweep before put out for these frames (None in the first sweep), and state
    whatever this sweep's last step left (None in its first). The last sweep's out is the mixer's own, (B, t, D).
    """

    step: Callable[[Tensor, Tensor | None, Any], tuple[Tensor, Any]]
    reverse: bool = False  # True runs from the last block to the first
    whole: bool = False  # True takes no blocks: one step sees all frames


class Mixer(nn.Module):
    """Base of every token mixer. Subclasses are built as ``Mixer(d_model, num_heads, **options)``."""

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, T, D) and the (B,) numbers of valid frames to (B, T, D); padded frames come out as zeros."""
        raise NotImplementedError(f"{type(self).__name__} has no forward()")

    def sweeps(self) -> tuple[Sweep, ...]:
        """The runs over the frames that together give ``forward(x)``, for one sequence that memory may not hold twice.

        Any blocks give the same result. A mixer that cannot be cut keeps this default, one step over the whole.

        Example
        -------
        >>> from cald_speech.mixers import Bidirectional
        >>> [sweep.reverse for sweep in Bidirectional(64, 4).sweeps()]
        [False, True]
        """
        return (Sweep(lambda x, partial, state: (self(x), None), whole=True),)

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
