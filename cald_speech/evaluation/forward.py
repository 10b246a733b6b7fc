"""Models run over a set of audio or text, batch by batch: the one pass that every evaluation of a data set makes.

    for batch in batches(dataset, model, max_batch):
        with naming(batch.ids):
            logits = model(**batch.arguments).logits

Whatever fails inside ``naming`` says of which items.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from cald_speech.data.batching import Audio, Modality, batches_by_length, padded
from cald_speech.distillation import captured_states
from cald_speech.errors import UserError
from cald_speech.families import family_of
from cald_speech.ops import valid_frames

# --- models


def check_comparable(models: dict[str, PreTrainedModel]) -> None:
    """Raise UserError, naming both, unless the models' hidden states can be compared with the first one's."""
    (first, one), *others = models.items()
    for name, other in others:
        for noun, ours, theirs in zip(("family", "width", "layers", "frames"), _form(one), _form(other), strict=True):
            if ours != theirs:
                raise UserError(
                    f"{first} and {name} differ in their {noun}: expected the same, got {ours} and {theirs}. Give "
                    "models of one kind: the pretrained one, and what was made of it"
                )


def check_unconverted(name: str, model: PreTrainedModel) -> None:
    """Raise UserError, naming the model, where a layer's attention was converted already."""
    family = family_of(model)
    mixers = [family.mixer(layer) for layer in family.layers(model)]
    converted = {i: type(mixer).__name__ for i, mixer in enumerate(mixers) if mixer is not None}
    if converted:
        raise UserError(
            f"{name}: expected a model with attention in every layer, got a converted one ({converted[min(converted)]} "
            f"in layer {min(converted)}, {len(converted)} layers converted). Give the model that it was made from"
        )


def _form(model: PreTrainedModel) -> tuple[str, int, int, str]:
    family = family_of(model)
    traits = family.traits(model.config)
    frames = ", ".join(f"{name} {traits[name]}" for name in ("kernels", "frame rate") if name in traits)
    return family.model_type, traits["width"], len(family.layers(model)), frames


# --- the pass


@dataclass(frozen=True)
class Batch:
    """Items padded on the right, by their ids and places in the set: what a model is called with, and lengths (B,) in
    frames or tokens, of its output and of its layers, on its device."""

    ids: list[str]
    places: list[int]
    items: PaddedBatch
    arguments: dict[str, Any]
    lengths: Tensor
    layer_lengths: Tensor


def batches(
    dataset: Dataset,
    model: PreTrainedModel,
    max_batch: float,
    *,
    modality: Modality | None = None,
    places: Sequence[int] | None = None,
    whole_items: bool = False,
) -> Iterator[Batch]:
    """The items in batches of at most ``max_batch``, padding counted, longest first: memory runs out at once or never.

    Arguments
    ---------
    model : says how many frames the audio gives, the device, and the dtype of audio.
    max_batch : in seconds or tokens, as the modality counts; a larger item is a batch of its own.
    modality : of the items; None: audio.
    places : of the items that are read; None: all of them.
    whole_items : keep what a task's results need of the items beside the model's input.

    Raises
    ------
    UserError
        for audio without a frame.
    """
    modality = modality or Audio()
    sizes = modality.sizes(dataset)
    places = range(len(sizes)) if places is None else places
    for group in batches_by_length([sizes[place] for place in places], max_batch):
        batch_places = [places[i] for i in group]
        made = (dataset[place] for place in batch_places)
        items = padded(
            [item if whole_items else {key: item[key] for key in ("id", modality.input_key)} for item in made]
        )
        arguments, lengths = modality.arguments(items, model)
        arguments = {key: _in_dtype(value, model.dtype) for key, value in arguments.items()}
        layer_lengths = family_of(model).layer_frames(lengths, model.config)
        short = [key for key, length in zip(items.id, layer_lengths.tolist(), strict=True) if length < 1]
        if short:
            raise UserError(f"utterances {', '.join(short)}: the audio is shorter than one frame. Leave them out.")
        yield Batch(list(items.id), batch_places, items, arguments, lengths, layer_lengths)


def _in_dtype(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def naming(ids: Sequence[str], limit: str = "max_batch_s") -> Iterator[None]:
    """Errors inside name a batch's items. Memory that runs out is a UserError, and ``limit`` the option to lower."""
    names = f"{len(ids)} utterances ({', '.join(ids)})"
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device ran out of memory on a batch of {names}: take smaller batches with --{limit} (0 takes them "
            "one by one), or another --device"
        ) from error
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise RuntimeError(f"evaluation failed on a batch of {names}: {error}") from error


def check_finite(what: str, values: Tensor, batch: Batch, lengths: Tensor | None = None) -> None:
    """Raise RuntimeError, naming the items, unless ``values`` (B, T, ...) of the valid frames are finite.

    These are the output's, or those that ``lengths`` counts.
    """
    finite = values.isfinite().all(-1) | ~valid_frames(batch.lengths if lengths is None else lengths, values.size(1))
    if not finite.all():
        bad = [key for key, row in zip(batch.ids, finite.all(1).tolist(), strict=True) if not row]
        raise RuntimeError(f"the {what} of {', '.join(bad)} are not finite")


def states_and_output(model: PreTrainedModel, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """The hidden states (B, T, D) after each layer, before any final norm, and what the model puts out: logits, if any.

    Errors are those of :func:`naming`; states of valid frames that are not finite are one.
    """
    with naming(batch.ids), torch.inference_mode():
        with captured_states(family_of(model).layers(model)) as states:
            output = model(**batch.arguments)[0]
        # What is not finite in a layer stays so in all that follow.
        check_finite("hidden states", states[-1], batch, batch.layer_lengths)
    return states, output


# --- what is read, and what is kept of it


def chosen(total: int, wanted: int) -> list[int]:
    """``wanted`` of ``total`` places (or all), evenly spread: manifests are sorted, often by speaker.

    Example
    -------
    >>> chosen(10, 3), chosen(2, 3)
    ([0, 3, 6], [0, 1])
    """
    if wanted < 1:
        raise UserError(f"--utterances: expected at least 1, got {wanted}")
    wanted = min(wanted, total)
    return [number * total // wanted for number in range(wanted)]


class Mean:
    """A mean over frames that come batch by batch, from sums with counts; kept in float64 on the CPU.

    Example
    -------
    >>> mean = Mean()
    >>> mean.add(torch.tensor([2.0, 6.0]), torch.tensor(2))
    >>> mean.add(torch.tensor([1.0, 0.0]), 1)
    >>> mean.values()
    [1.0, 2.0]
    """

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, sums: Tensor, count: Tensor | int) -> None:
        self.total = self.total + sums.detach().cpu().double()
        self.count += int(count)

    def values(self) -> list[float] | float:
        """A list where lists of sums were added, a number where numbers were."""
        return (self.total / self.count).tolist()
