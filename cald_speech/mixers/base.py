"""What fills a layer's slot: a mixer maps (B, T, D) to (B, T, D), adds no residual and knows no Hugging Face.

Beside :class:`Mixer` stand what it may start from (:class:`AttentionWeights`), how it passes through audio of any
length (:class:`Sweep`), and the linear layer that all mixers project with (:class:`Projection`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MixerFactory = Callable[[int, int], "Mixer"]
"""(d_model, num_heads) -> Mixer; in yaml ``!name:cald_speech.mixers.Mamba2`` with any keyword arguments."""


@dataclass(frozen=True)
class PositionBias:
    """What an attention adds to its scores for the distance from query to key, scaled by a gate of the query's frame.

    With a, b = sigmoid(gate x_h + gate_bias) of the query's input x_h, cut into heads, head h adds
    ``(a (b scale_h - 1) + 2) by_distance[h, key - query]``: WavLM's (arXiv 2110.13900, section 3.1).

    by_distance : (H, 2M + 1) for the distances from -M to M, whose ends stand for all beyond them; gate : (2, d);
    gate_bias : (2,); scale : (H,).
    """

    by_distance: Tensor
    gate: Tensor
    gate_bias: Tensor
    scale: Tensor


@dataclass(frozen=True)
class DistanceKeys:
    """Keys that an attention has for the distances from query to key, beside those of the frames.

    The score of query q and key k of head h is ``(q + frame_bias_h) k + (q + distance_bias_h) at(key - query)_h``, over
    the square root of d: Shaw et al. (arXiv 1803.02155) without biases, Transformer-XL (arXiv 1901.02860) with them.

    at : from (n,) distances to (H, n, d); frame_bias, distance_bias : (H, d), None where there are none.
    """

    at: Callable[[Tensor], Tensor]
    frame_bias: Tensor | None = None
    distance_bias: Tensor | None = None


@dataclass(frozen=True)
class AttentionWeights:
    """The projections of one self-attention, after whatever fusing its architecture does is undone.

    q : (H, d, D) query projection, for each of H heads of size d and model width D; k, v : (G, d, D) with G dividing H
    (G < H: grouped-query attention); o : (D, H, d) output projection. The biases q_bias (H, d), k_bias, v_bias (G, d)
    and o_bias (D,) are None where the attention has none; so are position_bias and distance_keys.
    positions names what its scores know of positions (relative, rotary), where they do, for people.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None = None
    k_bias: Tensor | None = None
    v_bias: Tensor | None = None
    o_bias: Tensor | None = None
    position_bias: PositionBias | None = None
    distance_keys: DistanceKeys | None = None
    positions: str | None = None

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

    def output_projections(self) -> tuple[nn.Linear, ...]:
        """The linear layers at its end, whose sum is its output: calibration sets them. None by default."""
        last = getattr(self, "out_proj", None)
        return (last,) if isinstance(last, nn.Linear) else ()

    def share_with(self, first: "Mixer") -> None:
        """Take over what ``first`` holds for both; the default shares nothing.

        Conversion calls it on each mixer whose entry in the layer map equals that of an earlier one, ``first``; what is
        taken over stands in a model's folder once.
        """


class Projection(nn.Linear):
    """An ``nn.Linear`` in all but speed, and in the order of its sums: a CPU's inference goes through oneDNN.

    ``nn.Linear`` calls the BLAS that torch was built with, MKL, which leaves half of an AMD core unused: on two cores
    of an AVX-512 EPYC, (1536, 768) times (768, 3084) takes 36 ms in MKL and 16 ms in oneDNN, which ships in torch too.

    Example
    -------
    >>> layer = Projection(4, 2)
    >>> x = torch.randn(3, 5, 4)
    >>> with torch.no_grad():
    ...     torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        return projected(x, self.weight, self.bias)


def projected(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a :class:`Projection` of this weight and bias makes of ``x``."""
    if not _by_onednn(x, weight):
        return nn.functional.linear(x, weight, bias)
    # The op behind torch.compile's fused linear layers; it has no backward pass.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a compiler chooses for itself, and an exported program goes elsewhere
        return False
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    if not plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
