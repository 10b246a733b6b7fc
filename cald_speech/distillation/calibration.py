"""Calibration: a new mixer's scale and output projection, set in closed form by what attention puts out.

What enters a mixer's output projections, with a column of ones, is regressed on what the attention in the same slot of
the teacher puts out, both fed the teacher's input of the layer: so slots do not depend on each other, one pass over the
audio serves all of them, and what is measured of a slot is the slot's own. The regression is a ridge towards the
projection that was copied, times one scale. Its strength is chosen on utterances that it was not fitted to, and it is
taken over where it brings the slot nearer on a third part, which neither has seen.

Only sums of products are kept of the frames: with them every candidate's error is known for each part.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cald_speech.conversion import SlotFit
from cald_speech.errors import UserError

# Of every four utterances two are fitted to, one chooses the strength, and on one it is seen whether it helped.
PARTS = ("fitted", "chosen", "held out")
TURN = (0, 1, 0, 2)
STRENGTHS = (math.inf, 100.0, 10.0, 1.0, 0.1, 0.01, 0.001)  # over the features' mean square; inf: the scale alone
LEAST_SPREAD = 1e-8  # of what attention puts out, over its square: with less, all frames are the same


class Moments:
    """Sums over frames of products of features (F,), of targets (D,), and of both; in float64.

    Example
    -------
    >>> moments, x = Moments(), torch.randn(100, 4)
    >>> moments.add(x, x @ torch.eye(4))
    >>> round(moments.error(torch.eye(4)), 6), round(moments.ratio(2 * torch.eye(4)), 6)
    (0.0, 2.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self.gram = self.cross = self.total = self.square = torch.zeros((), dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """(n, F) and (n, D)."""
        features, targets = features.double(), targets.double()
        self.count += len(features)
        self.gram = self.gram + features.T @ features
        self.cross = self.cross + features.T @ targets
        self.total = self.total + targets.sum(0)
        self.square = self.square + targets.square().sum()

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments()
        for name, value in vars(self).items():
            setattr(both, name, value + getattr(other, name))
        return both

    @property
    def spread(self) -> Tensor:
        """Squared distance of the targets from their mean."""
        return self.square - self.total.square().sum() / self.count

    def error(self, weight: Tensor) -> float:
        """Squared distance of features @ weight (F, D) from the targets, over the targets' spread: the mean has 1."""
        weight = weight.double()
        distance = self.square - 2 * (weight * self.cross).sum() + (weight * (self.gram @ weight)).sum()
        return (distance / self.spread).item()

    def ratio(self, weight: Tensor) -> float:
        """The norm of features @ weight over the targets'."""
        weight = weight.double()
        return ((weight * (self.gram @ weight)).sum().clamp(min=0) / self.square).sqrt().item()

    def ridge(self, prior: Tensor, strength: float, *, ones: bool) -> Tensor:
        """The weight (F, D) that is nearest to the targets, drawn towards ``prior``; ``ones``: the last feature is 1.

        What goes with the ones is not drawn anywhere.
        """
        prior = prior.double().clone()
        free = len(prior) - int(ones)
        if math.isinf(strength):
            if ones:  # what the prior leaves, in the mean
                prior[-1] = (self.total - self.gram[-1, :free] @ prior[:free]) / self.count
            return prior
        pull = torch.zeros(len(prior), dtype=torch.float64, device=prior.device)
        pull[:free] = strength * self.gram.diagonal()[:free].mean()
        # A little on the ones too, so that features that never vary leave a matrix that can be solved.
        pull = pull + 1e-9 * self.gram.diagonal().mean()
        return torch.linalg.solve(self.gram + pull.diag(), self.cross + pull[:, None] * prior)

    def scale(self, weight: Tensor, *, ones: bool) -> float:
        """What brings features @ weight nearest to the targets when multiplied by it, 0 or more, means apart."""
        weight = weight.double().clone()
        if ones:
            weight[-1] = 0
        made = weight * (self.gram @ weight)
        along = (weight * self.cross).sum()
        if ones:
            mean = self.gram[-1] @ weight
            return (
                (along - mean @ self.total / self.count)
                .div((made.sum() - mean.square().sum() / self.count).clamp(min=1e-12))
                .clamp(min=0)
                .item()
            )
        return along.div(made.sum().clamp(min=1e-12)).clamp(min=0).item()


@dataclass
class Slot:
    """A layer's mixer, the projections whose sum is its output, and the moments of each part of the audio."""

    layer: int
    mixer: nn.Module
    projections: tuple[nn.Linear, ...]

    def __post_init__(self) -> None:
        self.moments = [Moments() for _ in PARTS]
        self.ones = any(p.bias is not None for p in self.projections)

    @classmethod
    def of(cls, layer: int, mixer: nn.Module, started: bool) -> "Slot":
        """Raises UserError, naming the mixer, for one that calibration can do nothing for."""
        name = type(mixer).__name__
        if not started:
            raise UserError(
                f"calibrate: expected mixers that start from attention, and {name} in layer {layer} has no such start: "
                "its projections are random, and there is nothing to draw them towards. Leave calibrate out, or give "
                "the layer a mixer with a start, or initialise: attention"
            )
        projections = mixer.output_projections()
        if not projections:
            raise UserError(
                f"calibrate: {name} in layer {layer} names no output projection (output_projections() gives none). "
                "Leave calibrate out, or give the layer another mixer"
            )
        return cls(layer, mixer, projections)

    def see(self, x: Tensor, target: Tensor, valid: Tensor, lengths: Tensor, parts: Sequence[int]) -> None:
        """A batch: the slot's input and the attention's output (B, T, D), which frames are valid, (B,) parts.

        Raises UserError for what is not finite.
        """
        features: dict[nn.Module, Tensor] = {}

        def keep(module: nn.Module, args: tuple) -> None:
            features[module] = args[0].detach()

        handles = [projection.register_forward_pre_hook(keep) for projection in self.projections]
        try:
            with torch.enable_grad():  # without, a long input would come in pieces
                self.mixer(x, lengths)
        finally:
            for handle in handles:
                handle.remove()
        made = torch.cat([features[projection].flatten(2) for projection in self.projections], dim=-1)
        if self.ones:
            made = torch.cat([made, torch.ones_like(made[..., :1])], dim=-1)
        for row, part in enumerate(parts):
            mine, wanted = made[row, valid[row]], target[row, valid[row]]
            if not (mine.isfinite().all() and wanted.isfinite().all()):
                raise UserError(
                    f"calibrate: what layer {self.layer} makes of the audio is not finite. Look for NaN in the audio "
                    "and in the model's weights, or leave calibrate out"
                )
            self.moments[part].add(mine, wanted)

    def fit(self) -> SlotFit:
        """Set the projections, and say what came of it.

        Raises UserError where attention puts out the same in all frames.
        """
        fitted, choosing, held_out = self.moments
        if min(float(m.spread / m.square.clamp(min=1e-30)) for m in self.moments) < LEAST_SPREAD:
            raise UserError(
                f"calibrate: attention in layer {self.layer} puts out the same for all frames of the audio. Expected "
                "speech, got silence or one tone: give other audio, or leave calibrate out"
            )
        before = self._weight()
        unknowns = len(before)
        strengths = STRENGTHS if fitted.count >= unknowns else STRENGTHS[:1]
        strength = min(strengths, key=lambda s: _finite(choosing.error(self._solved(fitted, before, s))))
        weight = self._solved(fitted + choosing, before, strength)
        errors = held_out.error(before), held_out.error(weight)
        helps = _finite(errors[1]) < errors[0]
        if helps:
            self._take_over(weight)
        how = "as it was: nothing brought it nearer" if not helps else "scale" if math.isinf(strength) else "projection"
        if fitted.count < unknowns:
            how += f" (no projection: {fitted.count} frames for {unknowns} unknowns)"
        taken = weight if helps else before
        return SlotFit(
            layer=self.layer,
            mixer=type(self.mixer).__name__,
            error=(errors[0], held_out.error(taken)),
            norm=(held_out.ratio(before), held_out.ratio(taken)),
            changed=how,
        )

    def _solved(self, moments: Moments, before: Tensor, strength: float) -> Tensor:
        prior = before.clone()
        prior[: len(prior) - int(self.ones)] *= moments.scale(before, ones=self.ones)
        return moments.ridge(prior, strength, ones=self.ones)

    def _weight(self) -> Tensor:
        """(F, D): the projections side by side, and the sum of their biases."""
        rows = [p.weight.detach().double().T for p in self.projections]
        if self.ones:
            rows.append(sum(p.bias.detach().double() for p in self.projections if p.bias is not None)[None])
        return torch.cat(rows)

    @torch.no_grad()
    def _take_over(self, weight: Tensor) -> None:
        start = 0
        for projection in self.projections:
            projection.weight.copy_(weight[start : start + projection.in_features].T)
            start += projection.in_features
        biases = [p.bias for p in self.projections if p.bias is not None]
        for bias in biases:
            bias.copy_(weight[-1] / len(biases))


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
