"""Connectionist temporal classification (Graves et al., 2006): characters without an alignment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PretrainedConfig, ProcessorMixin, Wav2Vec2Processor

from cald_speech.data.batching import BatchChange, item_lengths
from cald_speech.data.dataset import make_dataset
from cald_speech.data.joining import Joiner
from cald_speech.data.manifests import read_manifest
from cald_speech.data.perturbation import Perturbation, SpeechBrainAugmentation
from cald_speech.data.text import make_processor, normalise
from cald_speech.errors import UserError
from cald_speech.families.vocabulary import Vocabulary
from cald_speech.ops import valid_frames
from cald_speech.tasks.base import Task
from cald_speech.tasks.decoding import greedy
from cald_speech.tasks.processors import SpeechProcessor, feature_extractor, first_processor
from cald_speech.tasks.wer import score


class CTC(Task):
    """Speech recognition with a CTC head: summed over characters, decoded greedily, measured in word error rate.

    ``blank`` is the id of the blank label; None takes the padding token of the processor's tokenizer, which it is in
    Hugging Face's models, and 0 as long as there is no processor. ``perturbation`` changes the sound of training
    batches, before utterances are joined.
    """

    head = "ctc"
    metric = "WER"

    def __init__(self, blank: int | None = None, perturbation: Perturbation | SpeechBrainAugmentation | None = None):
        if not (blank is None or type(blank) is int):
            raise ValueError(f"blank: expected the number of an output, got {blank!r}")
        if not (perturbation is None or callable(perturbation)):
            raise ValueError(
                "perturbation: expected !new:cald_speech.data.perturbation.Perturbation or SpeechBrainAugmentation, "
                f"got {perturbation!r}"
            )
        self.wanted_blank, self.blank, self.perturbation = blank, blank or 0, perturbation
        self.normaliser = "none"  # of the last data set's references: hypotheses are written in the same way
        self.num_outputs: int | None = None  # of the student's head, once it is known

    def processor(
        self, places: Sequence[str], required: str | None, folder: Path, train: Path, normaliser: str
    ) -> Wav2Vec2Processor:
        found = first_processor(SpeechProcessor, places, required)
        if found is not None:
            return self._hearing_blank(found)
        made = make_processor(folder, (normalise(entry["text"], normaliser) for entry in read_manifest(train).values()))
        extractor = feature_extractor(places, None)
        if extractor.model_input_names[0] != "input_values":  # an encoder that hears features has brought it
            made.feature_extractor = extractor
            made.save_pretrained(folder)
        return self._hearing_blank(made)

    def _hearing_blank(self, processor: ProcessorMixin) -> ProcessorMixin:
        own = processor.tokenizer.pad_token_id
        if self.wanted_blank is not None and own != self.wanted_blank:
            raise UserError(
                f"blank: expected {own}, the tokenizer's padding token, which every decoder takes for the blank, got "
                f"{self.wanted_blank}. Leave it out"
            )
        self.blank = own
        return processor

    def dataset(
        self, manifest: Path, processor: Wav2Vec2Processor, *, normaliser: str, unknown: str
    ) -> DynamicItemDataset:
        self.normaliser = normaliser
        options = {"normaliser": normaliser, "unknown": unknown, "num_outputs": self.num_outputs}
        return make_dataset(manifest, processor, **options, needs_labels=True)

    def change(self, processor: Wav2Vec2Processor, *, join_utterances: int, pause_s: float) -> BatchChange | None:
        if processor.feature_extractor.model_input_names[0] != "input_values":
            if join_utterances > 1 or self.perturbation is not None:
                raise UserError(
                    "join_utterances and perturbation change samples, and this model hears features: expected "
                    "join_utterances: 1 and no perturbation"
                )
            return None
        joiner = Joiner(join_utterances, pause_s, processor) if join_utterances > 1 else None
        if self.perturbation is None or joiner is None:
            return self.perturbation or joiner
        return lambda items, seed: joiner(self.perturbation(items, seed), seed)

    def head_options(self, start: str, config: PretrainedConfig, processor: Wav2Vec2Processor) -> dict[str, Any]:
        """A checkpoint without a head gets one of the tokenizer's size; one with a head must fit it.

        A head need have no output for what a tokenizer adds to its own vocabulary (<s> and </s>, a delimiter that the
        script does not write): no label is one of these.
        """
        own, whole = processor.tokenizer.vocab_size, len(processor.tokenizer)
        has_head = any("ForCTC" in name for name in config.architectures or ())
        if has_head and not own <= config.vocab_size <= whole:
            raise UserError(
                f"the head of {start!r} has {config.vocab_size} outputs and the tokenizer {whole} tokens: give the "
                "model's own tokenizer with --processor"
            )
        self.num_outputs = config.vocab_size if has_head else whole
        try:
            Vocabulary.of(processor.tokenizer, self.num_outputs)
        except UserError as error:
            raise UserError(f"{start}: {error}") from error
        # The padding of a batch is heard as this token: it is to be the blank.
        return {"vocab_size": self.num_outputs, "pad_token_id": processor.tokenizer.pad_token_id}

    def units(self, batch: PaddedBatch) -> Tensor:
        return item_lengths(batch.labels)

    def can_learn(self, batch: PaddedBatch, lengths: Tensor) -> Tensor:
        """Whether the frames suffice: one for each character, and a blank between two that are the same."""
        labels, targets = batch.labels.data, item_lengths(batch.labels)
        same = (labels[:, 1:] == labels[:, :-1]) & valid_frames(targets - 1, labels.size(1) - 1)
        return targets + same.sum(-1) <= lengths

    def loss(self, outputs: Tensor, lengths: Tensor, batch: PaddedBatch) -> Tensor:
        """The summed negative log-likelihood; an utterance with more characters than frames counts as 0.

        In float32 whatever autocast says: a long utterance's likelihood underflows in half precision.
        """
        log_probs = F.log_softmax(outputs.float(), dim=-1).transpose(0, 1)
        labels = batch.labels.data.to(outputs.device)
        targets = item_lengths(batch.labels).to(outputs.device)
        return F.ctc_loss(log_probs, labels, lengths, targets, blank=self.blank, reduction="sum", zero_infinity=True)

    def results(
        self, outputs: Tensor, followed: None, lengths: Tensor, batch: PaddedBatch, processor: Wav2Vec2Processor
    ) -> Sequence[tuple[str, str]]:
        """(reference, greedy hypothesis) of each utterance."""
        said = (normalise(text, self.normaliser) for text in greedy(outputs, lengths, processor.tokenizer))
        return list(zip(batch.text, said, strict=True))

    def score(self, results: Mapping[str, tuple[str, str]]) -> float:
        references, hypotheses = ({key: pair[i] for key, pair in results.items()} for i in range(2))
        rate = score(references, hypotheses).words.rate
        # A validation set without a single word has no error rate; inf never wins against one that has.
        return float("inf") if rate is None else rate
