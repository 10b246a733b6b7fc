"""Mixers that scan: what Mamba-2, Mamba, gated linear attention, gated DeltaNet and Hydra are made of.

A causal mixer is three parts. ``project`` and ``finish`` work on each frame alone; between them ``scan`` looks across
time, and carries a state from frame to frame:

    streams, gate = project(x)                      (B, T, D) to what the scan and the gate need
    y, state      = scan(streams, state)            every frame sees what the scan has passed
    out           = finish(y, gate)                 (B, T, D)

So two directions can share one projection, and a sequence can come in pieces. One layer from top to bottom is
``mamba2.py``; the recurrence itself, frame by frame, is ``ops/ssd/naive.py``.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cald_speech.mixers.base import Mixer, Sweep
from cald_speech.ops import mask_padding, short_conv

# By name, the parameters of scans: decay rates, step sizes and skip weights. They keep float32 whatever the model's
# dtype, since decays and steps are exponentiated: rounding them changes how far a layer remembers. They have no weight
# decay, which would too.
SCAN_PARAMETERS = ("A_log", "dt_bias", "D")

# Frames that a CPU's inference handles at once, over all sequences: enough for full-speed projections (each product
# packs its weights anew), and little enough that what a layer makes of them stays near the caches.
FRAMES_AT_ONCE = 1024

# A start from attention counts every frame once, and forgets it after some hundred: attention forgets nothing.
STEP_OF_ONE = 0.541325  # softplus of it is 1
START_RATES = (0.002, 0.01)

# silu(GATE_OPEN) = 1: a gate of this bias and zero weights lets everything through.
GATE_OPEN = 1.27846


class Streams(NamedTuple):
    """What a causal mixer's input projection hands on: ``scanned`` for the scan, ``gate`` for the end."""

    scanned: tuple[Tensor, ...]
    gate: Tensor | None


class Scan(nn.Module):
    """The part of a causal mixer that looks across time, over the streams of its projection.

    Its own parameters (A_log, dt_bias, D) stay in float32 and only change device; its children's are cast as usual.

    Example
    -------
    >>> scan = Scan()
    >>> scan.A_log, scan.conv1d = nn.Parameter(torch.zeros(2)), ShortConvolution(2, d_conv=4)
    >>> scan = scan.to(torch.bfloat16)
    >>> scan.A_log.dtype, scan.conv1d.weight.dtype
    (torch.float32, torch.bfloat16)
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
        return self.joined(past, future)

    def joined(self, past: Tensor, future: Tensor) -> Tensor:
        """What this scan has put out and what one in the other direction has, over the same streams: their sum."""
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
        """Let the scan see what the projection put out, and add nothing of its own: for a start from attention."""

    def start_beside(self, started: "Scan") -> None:
        """Start from attention as ``started`` has, the scan in the other direction over the same streams."""
        self.pass_through()

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) and .half() reach every parameter through here, and its gradient with it.
        def in_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device, torch.float32)

        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(in_float32, recurse=False)


class CausalMixer(Mixer):
    """A mixer whose frame t sees frames <= t only (>= t with ``reverse``), in three parts that can be shared.

    Any cut of the input into pieces, in either direction, gives the same result when the state is handed on.
    """

    scan: Scan

    def project(self, x: Tensor) -> Streams:
        """(B, T, D) to the streams that the scan and the gate need."""
        raise NotImplementedError(f"{type(self).__name__} has no project()")

    def finish(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """The scan's output (B, T, ...) and the gate to (B, T, D)."""
        raise NotImplementedError(f"{type(self).__name__} has no finish()")

    def new_scan(self) -> Scan:
        """Another, freshly initialised scan over the same streams."""
        raise NotImplementedError(f"{type(self).__name__} has no new_scan()")

    def opposite_scan(self) -> Scan:
        """A new scan that runs in the other direction, and whose output :meth:`Scan.joined` adds to this one's."""
        return self.new_scan()

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

        Inference on a CPU runs piece by piece in its caches, and makes nothing of full length but the output.
        """
        if in_pieces(x):
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
        """What :meth:`forward` gives and the state, piece by piece without gradients; added to ``add_to`` in place."""
        num_frames, out, held = x.size(1), add_to, None
        size = max(64, FRAMES_AT_ONCE // max(1, x.size(0)))
        starts = range(0, num_frames, size)
        for start in reversed(starts) if reverse else starts:
            frames = slice(start, min(start + size, num_frames))
            valid = None if lengths is None else (lengths - start).clamp(0, frames.stop - start)
            streams = self.project(x[:, frames])
            y, state = self.scan(streams.scanned, valid, state=state, reverse=reverse)
            piece = mask_padding(self.finish(y, streams.gate), valid)
            if out is None:
                out = piece.new_empty(*x.shape[:2], piece.size(2))
            # The streams live until the next piece has its own: memory that is handed back and asked for again with
            # every piece would cost its page faults.
            held = (streams, y)
            out[:, frames].copy_(piece) if add_to is None else out[:, frames].add_(piece)
        del held
        return out, state


def in_pieces(x: Tensor) -> bool:
    """Whether ``x`` (B, T, D) is more than inference on a CPU handles at once; never where a graph is traced."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" and not torch.is_grad_enabled() and x.size(0) * x.size(1) > FRAMES_AT_ONCE


class ShortConvolution(nn.Conv1d):
    """The convolution in front of the Mamba family's scans: every channel has its own few taps, and looks back only.

    It has an activation behind it, runs in either direction and in pieces.

    Arguments
    ---------
    channels : width of what it filters.
    d_conv : taps, the last of which weighs the present frame.
    activation : ``silu`` or ``identity``.

    Example
    -------
    >>> conv = ShortConvolution(8, d_conv=4, activation="identity")
    >>> conv.pass_through()
    >>> x = torch.randn(1, 5, 8)
    >>> y, state = conv(x)
    >>> torch.equal(x, y), state.shape  # the last three inputs, for the next piece
    (True, torch.Size([1, 8, 3]))
    """

    def __init__(self, channels: int, d_conv: int, *, activation: str = "silu"):
        super().__init__(channels, channels, d_conv, groups=channels)
        self.activation = activation

    @torch.no_grad()
    def pass_through(self) -> None:
        """Let the present frame through and nothing else."""
        self.weight.zero_()
        self.weight[..., -1] = 1.0
        self.bias.zero_()

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, *, state: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(B, T, channels) to the same, and the scan's last inputs (B, channels, d_conv - 1)."""
        return short_conv(
            x,
            self.weight.squeeze(1),
            self.bias,
            lengths=lengths,
            reverse=reverse,
            initial_state=state,
            return_final_state=True,
            activation=self.activation,
        )


def step_size_bias(count: int, dt_range: tuple[float, float]) -> Tensor:
    """Biases (count,) whose softplus is log-uniform in ``dt_range``: from a frame's memory to a thousand frames'.

    Example
    -------
    >>> dt = nn.functional.softplus(step_size_bias(100, (0.01, 0.1)))
    >>> bool((dt > 0.0099).all() and (dt < 0.101).all())
    True
    """
    dt = torch.exp(torch.empty(count).uniform_(math.log(dt_range[0]), math.log(dt_range[1])))
    return dt + torch.log(-torch.expm1(-dt))
