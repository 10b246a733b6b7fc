"""How far hidden states move while a model is fine-tuned, and which guidance mode that speaks for.

He & Garner (arXiv 2410.06846) found the cosine distance between the hidden states before and after fine-tuning large on
speech, 0.372 after 2,000 steps, and small on text; following the teacher's trajectory or its waypoints helped on text
and not on speech. Their reason: a student can follow a teacher's way only where that way is short.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cald_speech.distillation.losses import layer_distances

PUBLISHED_ON_SPEECH = 0.372
# Our reading, not the paper's: it gives one figure for speech and none that we know of for text. LARGE is about half of
# its figure, so that a distance like the paper's is clearly large; SMALL is an angle of 26 degrees. We know of no run
# that tells which mode is better between the two.
LARGE, SMALL = 0.2, 0.1


def cosine_distances(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """1 - cos of the angle between two models' hidden states, summed over valid frames, layer by layer.

    Arguments
    ---------
    ours, theirs : the hidden states (B, T, D) of each layer, of one batch read by two models.
    lengths : (B,) valid frames; None: all. What stands in the padding, NaN too, counts nothing.

    Returns
    -------
    (L,) float32 sums, and the number of frames as a float32 scalar. A frame's distance is 0 for one direction, 1 for
    right angles, 2 for opposite directions, whatever the sizes of the two states; it is exact to some 1e-7.

    Raises
    ------
    ValueError
        if the numbers of layers or the shapes differ.

    Example
    -------
    >>> import torch
    >>> east, north = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]])
    >>> sums, frames = cosine_distances([east, east, east], [2 * east, north, -east])
    >>> (sums / frames).tolist()
    [0.0, 1.0, 2.0]
    """
    sums, count = layer_distances(ours, theirs, lengths, distance="cosine")
    return sums.clamp(min=0), count  # the cosine of equal states is rounded, to either side of 1


@dataclass(frozen=True)
class Suggestion:
    """The guidance modes that a drift speaks for, the likeliest first; ``clear`` is False near the border."""

    modes: tuple[str, ...]
    clear: bool
    reason: str


def suggest(mean_distance: float) -> Suggestion:
    """The guidance that the paper's analysis speaks for, from the drift of the fine-tuned teacher.

    The borders, ``LARGE`` and ``SMALL``, are our reading of the paper; what decides in the end is a run of each mode.

    Arguments
    ---------
    mean_distance : cosine distance between the states before and after fine-tuning, mean over frames and layers.

    Raises
    ------
    ValueError
        for what cannot be a mean cosine distance.

    Example
    -------
    >>> [suggest(distance).modes[0] for distance in (0.372, 0.15, 0.02)]
    ['target', 'target', 'trajectory']
    """
    if not 0 <= mean_distance <= 2:
        raise ValueError(f"mean_distance: expected a cosine distance from 0 to 2, got {mean_distance}")
    seen = f"the mean cosine distance is {mean_distance:.3f}"
    paper = f"the paper saw {PUBLISHED_ON_SPEECH} on speech after 2,000 steps, where target and hybrid guidance won"
    ours = f"the borders {SMALL} and {LARGE} are our reading, the paper names none"
    if mean_distance >= LARGE:
        return Suggestion(("target", "hybrid"), True, f"{seen}, which is large ({LARGE} or more): {paper}; {ours}")
    if mean_distance <= SMALL:
        return Suggestion(
            ("trajectory", "waypoint", "target"),
            True,
            f"{seen}, which is small ({SMALL} or less), as on text, where following the trajectory or its waypoints "
            f"helped: they may help here, compare them with target guidance; {ours}",
        )
    return Suggestion(
        ("target", "hybrid", "trajectory"),
        False,
        f"{seen}, between small ({SMALL}) and large ({LARGE}): uncertain. Start with target or hybrid guidance, which "
        f"need no second training, and compare trajectory guidance if there is time; {ours}",
    )
