"""Run models over a set of audio or text, batch by batch, for what compares their hidden states and logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from cald_speech.conversion import from_pretrained
from cald_speech.data.batching import Audio, Modality, batches_by_length
from cald_speech.distillation import captured_states
from cald_speech.errors import UserError
from cald_speech.families import family_of
from cald_speech.ops import valid_frames


@dataclass(frozen=True)
class Batch:
    """Items padded on the right: what a model is called with, lengths (B,) in frames or tokens, all on one device."""

    ids: list[str]
    arguments: dict[str, Tensor]
    lengths: Tensor


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


def load(source: str | Path, device: str, *, head: str) -> PreTrainedModel:
    """A model in evaluation mode on ``device``. Raises UserError for a device that is not there, or a bad model."""
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device}: torch {torch.__version__} sees no CUDA device here. Use --device cpu.")
    try:
        return from_pretrained(source, head=head).to(device)
    except RuntimeError as error:  # torch's own, for a name that is no device
        raise UserError(f"{source} cannot be put on the device {device!r}: {error}. Use cpu or cuda.") from error


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
    config, family = model.config, family_of(model)
    traits = family.traits(config)
    frames = ", ".join(f"{name} {traits[name]}" for name in ("kernels", "frame rate") if name in traits)
    return family.model_type, config.hidden_size, len(family.layers(model)), frames


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


def batches(
    dataset: Dataset, places: Sequence[int], model: PreTrainedModel, max_batch: float, modality: Modality | None = None
) -> Iterator[Batch]:
    """The items at ``places`` in batches of at most ``max_batch``, padding counted, longest first.

    modality : of the items, which says in what ``max_batch`` counts; default: audio, in seconds.
    model : says how many frames the audio gives, and the device.

    Raises UserError for audio without a frame.
    """
    modality = modality or Audio()
    sizes = modality.sizes(dataset)
    for group in batches_by_length([sizes[place] for place in places], max_batch):
        items = (dataset[places[i]] for i in group)
        batch = PaddedBatch([{key: item[key] for key in ("id", modality.input_key)} for item in items])
        arguments, lengths = modality.arguments(batch, model)
        short = [key for key, length in zip(batch.id, lengths.tolist(), strict=True) if length < 1]
        if short:
            raise UserError(f"utterances {', '.join(short)}: the audio is shorter than one frame. Leave them out.")
        yield Batch(list(batch.id), arguments, lengths)


def states_and_output(model: PreTrainedModel, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """The hidden states (B, T, D) after each layer, before any final norm, and what the model puts out: logits, if any.

    Raises: UserError where memory runs out; RuntimeError for states of valid frames that are not finite.
    """
    try:
        with torch.inference_mode(), captured_states(family_of(model).layers(model)) as states:
            output = model(**batch.arguments)[0]
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the device ran out of memory on a batch of {len(batch.ids)} utterances: give a smaller --max_batch_s (0 "
            "takes utterances one by one), or another --device"
        ) from error
    # What is not finite in a layer stays so in all that follow.
    if not states[-1].isfinite().all(-1).logical_or(~valid_frames(batch.lengths, states[-1].size(1))).all():
        raise RuntimeError(f"the hidden states of a batch are not finite ({', '.join(batch.ids)})")
    return states, output
