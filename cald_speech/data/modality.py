"""What a model reads, audio or text: how a batch becomes its arguments, and how large an item is to a sampler."""

from pathlib import Path

from speechbrain.dataio.batch import PaddedBatch, PaddedData
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from cald_speech.data.manifests import manifest_hash
from cald_speech.data.tables import table_hash
from cald_speech.families import family_of
from cald_speech.families.lengths import frame_lengths
from cald_speech.ops import valid_frames


class Modality:
    """One kind of input. ``batch_limit`` is the setting that says how much of it a batch may hold, padding counted."""

    batch_limit: str
    size_key: str  # of an entry: how much of the limit it takes
    input_key: str  # of an item: what the model reads

    def sizes(self, dataset: Dataset) -> list[float]:
        """The size of each item of a set, in its order, without making the items."""
        return [entry[self.size_key] for entry in dataset.data.values()]

    def lengths(self, batch: PaddedBatch, model: PreTrainedModel) -> Tensor:
        """(B,) frames or tokens that the model's layers see of each item, on the CPU."""
        raise NotImplementedError

    def arguments(self, batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
        """What the model is called with, and its :meth:`lengths`; both on the model's device."""
        raise NotImplementedError

    def fingerprint(self, manifest: Path) -> str:
        """What tells a set from every other, wherever its files lie."""
        raise NotImplementedError


class Audio(Modality):
    """Items with ``wav``, (N,) samples at 16 kHz, in sets made of audio manifests."""

    batch_limit = "max_batch_s"
    size_key = "duration_s"
    input_key = "wav"

    def lengths(self, batch: PaddedBatch, model: PreTrainedModel) -> Tensor:
        return frame_lengths(item_lengths(batch.wav), model.config)

    def arguments(self, batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
        wav, samples = batch.wav.data.to(model.device), item_lengths(batch.wav).to(model.device)
        mask = valid_frames(samples, wav.size(1)).long()
        return {"input_values": wav, "attention_mask": mask}, frame_lengths(samples, model.config)

    def fingerprint(self, manifest: Path) -> str:
        return manifest_hash(manifest)


class Text(Modality):
    """Items with ``tokens``, (N,) ids, in sets made of tables of text."""

    batch_limit = "max_batch_tokens"
    size_key = "num_tokens"
    input_key = "tokens"

    def lengths(self, batch: PaddedBatch, model: PreTrainedModel) -> Tensor:
        return item_lengths(batch.tokens)

    def arguments(self, batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
        tokens, lengths = batch.tokens.data.to(model.device), item_lengths(batch.tokens).to(model.device)
        valid = valid_frames(lengths, tokens.size(1))
        # RoBERTa counts its positions by which ids are padding, whatever the mask says.
        tokens = tokens.masked_fill(~valid, model.config.pad_token_id or 0)
        options = {"use_cache": False} if family_of(model).causal else {}
        return {"input_ids": tokens, "attention_mask": valid.long(), **options}, lengths

    def fingerprint(self, manifest: Path) -> str:
        return table_hash(manifest)


def item_lengths(padded: PaddedData) -> Tensor:
    """(B,) elements of each item, from SpeechBrain's relative lengths.

    Example
    -------
    >>> import torch
    >>> batch = PaddedBatch([{"wav": torch.zeros(7)}, {"wav": torch.zeros(3)}])
    >>> item_lengths(batch.wav).tolist()
    [7, 3]
    """
    return (padded.lengths * padded.data.size(1)).round().long()
