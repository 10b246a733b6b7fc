"""From SpeechBrain's padded batches to what a speech model is called with."""

import torch
from speechbrain.dataio.batch import PaddedBatch
from torch import Tensor
from transformers import PreTrainedModel

from cald_speech.families.lengths import frame_lengths


def sample_lengths(batch: PaddedBatch) -> Tensor:
    """(B,) samples of audio of each utterance, from SpeechBrain's relative lengths."""
    return (batch.wav.lengths * batch.wav.data.size(1)).round().long()


def utterance_frames(batch: PaddedBatch, model: PreTrainedModel) -> Tensor:
    """(B,) frames that the model makes of each utterance."""
    return frame_lengths(sample_lengths(batch), model.config)


def model_inputs(batch: PaddedBatch, model: PreTrainedModel) -> tuple[dict[str, Tensor], Tensor]:
    """What a speech model is called with, and its (B,) output lengths in frames; on the model's device."""
    wav = batch.wav.data.to(model.device)
    samples = sample_lengths(batch).to(model.device)
    mask = (torch.arange(wav.size(1), device=wav.device) < samples[:, None]).long()
    return {"input_values": wav, "attention_mask": mask}, frame_lengths(samples, model.config)
