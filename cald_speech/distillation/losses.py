"""The distillation losses of CALD (arXiv 2410.06846), one copy for speech and text.

Every loss comes back as a sum with a count, so that the caller can divide by the count over all ranks and accumulated
batches: then one process, two ranks and a bigger batch give the same gradient at unequal lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech.ops import mask_padding

STATE_NORMS = ("none", "layer_norm")
# (B, T, D) twice to (B, T): how far two states are apart.
DISTANCES = {
    "squared": lambda s, t: (s - t).square().mean(-1),
    "cosine": lambda s, t: 1 - F.cosine_similarity(s, t, dim=-1),
}


def layer_distances(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    lengths: Tensor | None = None,
    *,
    normalise: str = "none",
    distance: str = "squared",
) -> tuple[Tensor, Tensor]:
    """Distance between hidden states, frame by frame, summed over valid frames, layer by layer.

    Arguments
    ---------
    student, teacher : the hidden states (B, T, D) of each layer; the teacher's receive no gradient.
    lengths : (B,) valid frames; None: all.
    normalise : ``layer_norm`` compares states normalised over their features (no learned scale), ``none`` raw ones.
    distance : ``squared``, averaged over the features, or ``cosine``, one minus the cosine of the angle.

    Returns
    -------
    (L,) float32 sums, and the number of frames as a float32 scalar.

    Raises
    ------
    ValueError
        if the numbers of layers or the shapes differ.
    """
    if normalise not in STATE_NORMS:
        raise ValueError(f"normalise: expected one of {', '.join(STATE_NORMS)}, got {normalise!r}")
    if distance not in DISTANCES:
        raise ValueError(f"distance: expected one of {', '.join(DISTANCES)}, got {distance!r}")
    if len(student) != len(teacher) or any(s.shape != t.shape for s, t in zip(student, teacher, strict=True)):
        raise ValueError(
            f"expected the same hidden states of student and teacher, got {[tuple(s.shape) for s in student]} and "
            f"{[tuple(t.shape) for t in teacher]}"
        )
    batch, num_frames, width = student[0].shape
    if lengths is None:
        lengths = torch.full((batch,), num_frames, device=student[0].device)
    sums = []
    for s, t in zip(student, teacher, strict=True):
        # Zeros on both sides where there is padding: no gradient, whatever stood there.
        s, t = mask_padding(s.float(), lengths), mask_padding(t.detach().float(), lengths)
        if normalise == "layer_norm":
            s, t = F.layer_norm(s, (width,)), F.layer_norm(t, (width,))
        sums.append(mask_padding(DISTANCES[distance](s, t), lengths).sum())
    return torch.stack(sums), lengths.sum().float()


def layerwise_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    lengths: Tensor | None = None,
    *,
    normalise: str = "layer_norm",
    distance: str = "squared",
    layers: Sequence[float] | None = None,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    """The layer loss: distances of :func:`layer_distances`, weighted by ``layers``, and summed or averaged over them.

    ``layers`` holds a weight for each layer (None: 1 for all); ``reduce`` is ``mean`` (divided by the sum of the
    weights) or ``sum``. Returns (sum over frames, number of frames).

    Example
    -------
    >>> states, other = [torch.zeros(1, 4, 2)] * 3, [torch.ones(1, 4, 2)] * 3
    >>> total, frames = layerwise_loss(states, other, normalise="none")
    >>> (total / frames).item()
    1.0
    """
    distances, frames = layer_distances(student, teacher, lengths, normalise=normalise, distance=distance)
    return reduce_layers(distances, layers, reduce), frames


def reduce_layers(distances: Tensor, layers: Sequence[float] | None, reduce: str) -> Tensor:
    """(L,) distances to one number; see :func:`layerwise_loss`."""
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce: expected mean or sum, got {reduce!r}")
    if layers is not None and len(layers) != len(distances):
        raise ValueError(f"layers: expected {len(distances)} weights, one for each layer, got {len(layers)}")
    weights = torch.ones_like(distances) if layers is None else distances.new_tensor(layers)
    total = (distances * weights).sum()
    return total / weights.sum() if reduce == "mean" else total


def logit_loss(
    student: Tensor,
    teacher: Tensor,
    lengths: Tensor | None = None,
    *,
    temperature: float = 2.0,
    scale_by_t2: bool = False,
    blank: int | None = None,
    blank_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Kullback-Leibler divergence of the student's softened output distribution from the teacher's, frame by frame.

    Arguments
    ---------
    student, teacher : logits (B, T, V); the teacher's receive no gradient.
    lengths : (B,) valid frames; None: all.
    temperature : both logits are divided by it.
    scale_by_t2 : multiply by temperature squared, which keeps the gradient's size (Hinton et al., arXiv 1503.02531).
    blank, blank_weight : frames where the teacher's likeliest label is ``blank`` count ``blank_weight`` (1: like any
        other). Most CTC frames are blank, and drown the rest.

    Returns
    -------
    (weighted sum over frames, number of frames), float32.

    Example
    -------
    >>> logits = torch.randn(1, 5, 8)
    >>> logit_loss(logits, logits)[0].abs().item() < 1e-5
    True
    """
    batch, num_frames, _ = student.shape
    if lengths is None:
        lengths = torch.full((batch,), num_frames, device=student.device)
    student, teacher = mask_padding(student.float(), lengths), mask_padding(teacher.detach().float(), lengths)
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    if blank is not None:
        divergence = divergence * torch.where(teacher.argmax(-1) == blank, blank_weight, 1.0)
    total = divergence.sum()
    return total * temperature**2 if scale_by_t2 else total, lengths.sum().float()


# What a sum over one batch is divided by: the key `normalisation`.
DIVISORS = ("per_frame", "reference")


@dataclass(frozen=True)
class LossForm:
    """Which states are compared, how, and what the sums are divided by.

    Arguments
    ---------
    distance, normalise : as in :func:`cald_speech.distillation.layer_distances`.
    layers, reduce : weight of each compared state, and how they are brought together: see ``layerwise_loss``.
    embedding : True compares the input of the first layer too, as the first of the states.
    last : False leaves the last layer's states out.
    final_norm : True compares the last layer's states after the model's final norm.
    masked : False counts padded frames like any other.
    temperature, scale_by_t2, blank_weight : as in :func:`cald_speech.distillation.logit_loss`.
    by_characters : in the reference's normalisation, True weighs each accumulated batch by its share of the step's
        label characters (speech); False takes each batch's own mean, divided by the number of batches (text).

    Example
    -------
    >>> PRESETS["lm"].num_states(num_layers=16)
    15
    """

    distance: str = "squared"
    normalise: str = "layer_norm"
    layers: Sequence[float] | None = None
    reduce: str = "mean"
    embedding: bool = False
    last: bool = True
    final_norm: bool = True
    masked: bool = True
    temperature: float = 2.0
    scale_by_t2: bool = False
    blank_weight: float = 1.0
    by_characters: bool = True

    def num_states(self, num_layers: int) -> int:
        """How many states of a model with so many layers are compared."""
        return num_layers + self.embedding - (not self.last)


# The reference's three (arXiv 2410.06846; speech/models/model.py, lm/open_instruct/train_utils.py and
# nlp/run_glue_linformer.py of its code).
PRESETS = {
    "speech": LossForm(),
    "lm": LossForm(last=False, final_norm=False, masked=False, by_characters=False),
    "nlp": LossForm(
        normalise="none",
        reduce="sum",
        embedding=True,
        final_norm=False,
        masked=False,
        scale_by_t2=True,
        by_characters=False,
    ),
}
