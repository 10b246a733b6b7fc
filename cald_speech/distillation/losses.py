"""The distillation losses of CALD (arXiv 2410.06846), one copy for speech and text, and their form as values.

Every loss comes back as a sum with a count, so that the caller can divide by the count over all ranks and accumulated
batches: then one process, two ranks and a bigger batch give the same gradient at unequal lengths. How the terms come
together is in cald_speech/training/objective.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from cald_speech.distillation.options import check_values, option
from cald_speech.ops import mask_padding

STATE_NORMS = ("none", "layer_norm")
REDUCTIONS = ("mean", "sum")
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


def reduce_layers(distances: Tensor, weights: Sequence[float] | None = None, reduce: str = "mean") -> Tensor:
    """The layer loss: (L,) distances to one number.

    Arguments
    ---------
    distances : of each layer, from :func:`layer_distances`.
    weights : how much each layer counts; None: 1 for all.
    reduce : ``mean``, divided by the sum of the weights, or ``sum``.

    Returns
    -------
    A scalar.

    Raises
    ------
    ValueError
        for another number of weights, or another word than these two.

    Example
    -------
    >>> reduce_layers(torch.tensor([1.0, 2.0, 6.0]), weights=[0.0, 1.0, 3.0])
    tensor(5.)
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce: expected {' or '.join(REDUCTIONS)}, got {reduce!r}")
    if weights is not None and len(weights) != len(distances):
        raise ValueError(f"weights: expected {len(distances)}, one for each layer, got {len(weights)}")
    weights = torch.ones_like(distances) if weights is None else distances.new_tensor(weights)
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


@dataclass(frozen=True, kw_only=True)
class LossForm:
    """The form of the distillation terms: one set of options, and the published code's three settings of it.

    The reference has a copy of the losses for each of its tasks, with other layers, norms, masks and scales; here they
    are values (:data:`PRESETS`). The fields are options of an experiment by these names, but for the last four.

    Arguments
    ---------
    layer_distance, layer_normalise : as ``distance`` and ``normalise`` in :func:`layer_distances`.
    layer_weights, layer_reduce : as ``weights`` and ``reduce`` in :func:`reduce_layers`; a weight for each compared
        state.
    final_norm_on_last : True compares the last layer's states after the model's final norm.
    temperature, scale_by_t2, blank_weight : as in :func:`logit_loss`.
    embedding : True compares the input of the first layer too, as the first of the states.
    last : False leaves the last layer's states out.
    masked : False counts padded frames like any other.
    by_characters : where sums are divided as in the reference, True weighs each accumulated batch by its share of the
        step's label characters (speech); False takes each batch's own mean, divided by the number of batches (text).

    Raises
    ------
    ValueError
        which names the option to mend.

    Example
    -------
    >>> PRESETS["lm"].num_states(num_layers=16)
    15
    """

    layer_distance: str = option("squared", one_of=tuple(DISTANCES))
    layer_normalise: str = option("layer_norm", one_of=STATE_NORMS)
    layer_weights: Sequence[float] | None = option(None, at_least=0)
    layer_reduce: str = option("mean", one_of=REDUCTIONS)
    final_norm_on_last: bool = True
    temperature: float = option(2.0, above=0)
    scale_by_t2: bool = False
    blank_weight: float = option(1.0, at_least=0)
    embedding: bool = option(False, settable=False)
    last: bool = option(True, settable=False)
    masked: bool = option(True, settable=False)
    by_characters: bool = option(True, settable=False)

    def __post_init__(self) -> None:
        check_values(self)
        if self.layer_weights is not None and not any(self.layer_weights):
            raise ValueError(f"layer_weights: expected one of them above 0, got {list(self.layer_weights)}")

    @classmethod
    def options(cls) -> set[str]:
        """What an experiment may set of it."""
        return {f.name for f in fields(cls) if f.metadata.get("settable", True)}

    def num_states(self, num_layers: int) -> int:
        """How many states of a model with so many layers are compared."""
        return num_layers + self.embedding - (not self.last)

    def check(self, num_layers: int) -> None:
        """Raise ValueError, naming the option to mend, if the form does not fit a model with so many layers."""
        expected = self.num_states(num_layers)
        if self.layer_weights is not None and len(self.layer_weights) != expected:
            got = len(self.layer_weights)
            raise ValueError(f"layer_weights: expected {expected} weights, one for each compared state, got {got}")

    def compared(self, states: Sequence[Tensor], final_norm: Callable[[Tensor], Tensor]) -> Sequence[Tensor]:
        """Of a model's states, layer by layer, those that are compared, each as it is compared."""
        if not self.last:
            return states[:-1]
        return [*states[:-1], final_norm(states[-1])] if self.final_norm_on_last else states

    def distances(self, student: Sequence[Tensor], teacher: Sequence[Tensor], lengths: Tensor | None) -> Tensor:
        """(L,) distances of the compared states, summed over frames."""
        options = {"normalise": self.layer_normalise, "distance": self.layer_distance}
        return layer_distances(student, teacher, lengths, **options)[0]

    def layer_loss(self, distances: Tensor) -> Tensor:
        """The layer loss of (L,) distances."""
        return reduce_layers(distances, self.layer_weights, self.layer_reduce)

    def logit_loss(self, student: Tensor, teacher: Tensor, lengths: Tensor | None, blank: int | None) -> Tensor:
        """The logit loss, summed over frames."""
        options = {"temperature": self.temperature, "scale_by_t2": self.scale_by_t2}
        if self.blank_weight != 1.0:
            options |= {"blank": blank, "blank_weight": self.blank_weight}
        return logit_loss(student, teacher, lengths, **options)[0]


# The reference's three (arXiv 2410.06846; speech/models/model.py, lm/open_instruct/train_utils.py and
# nlp/run_glue_linformer.py of its code). tests/training/test_reference.py holds them against what that code computes.
PRESETS = {
    "speech": LossForm(),
    "lm": LossForm(last=False, final_norm_on_last=False, masked=False, by_characters=False),
    "nlp": LossForm(
        layer_normalise="none",
        layer_reduce="sum",
        embedding=True,
        final_norm_on_last=False,
        masked=False,
        scale_by_t2=True,
        by_characters=False,
    ),
}
