"""One layer converted at a time, and what that does to the teacher: its words, its output, its hidden states."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cald_speech.conversion import replace_layers
from cald_speech.data.text import normalise
from cald_speech.distillation import logit_loss
from cald_speech.distillation.drift import cosine_distances
from cald_speech.evaluation.effective_memory import metered
from cald_speech.evaluation.forward import Batch, Mean, batches, states_and_output
from cald_speech.families import family_of
from cald_speech.mixers import Mixer, MixerFactory
from cald_speech.tasks.decoding import greedy
from cald_speech.tasks.wer import EvaluationResult, score


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules over again, around the same parameters and buffers: a layer of one can be replaced alone."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return deepcopy(model, shared)


def converted_alone(
    teacher: PreTrainedModel, index: int, factory: MixerFactory, *, initialise: str = "attention", seed: int = 0
) -> PreTrainedModel:
    """The teacher with a new mixer in layer ``index``; it shares all other weights with ``teacher``.

    ``seed`` fixes what is drawn, so that every layer's mixer gets the same numbers.
    """
    model, family = twin(teacher), family_of(teacher)
    factories: list[MixerFactory | None] = [None] * len(family.layers(model))
    factories[index] = factory
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        replace_layers(model, family, factories, initialise=initialise)
    return model.eval()


def with_mixer_of(student: PreTrainedModel, teacher: PreTrainedModel, index: int) -> PreTrainedModel:
    """The teacher with a copy of the student's mixer in layer ``index``."""
    model, family = twin(teacher), family_of(teacher)
    family.replace_attention(model, index, deepcopy(mixers_of(student)[index]))
    return model.eval()


def mixers_of(model: PreTrainedModel) -> dict[int, Mixer]:
    """The mixer of each converted layer."""
    family = family_of(model)
    filled = {index: family.mixer(layer) for index, layer in enumerate(family.layers(model))}
    return {index: mixer for index, mixer in filled.items() if mixer is not None}


@dataclass(frozen=True)
class Reading:
    """Which utterances are read, and how what was read is written down."""

    dataset: DynamicItemDataset
    places: Sequence[int]
    tokenizer: PreTrainedTokenizerBase
    normaliser: str
    max_batch_s: float
    quiet: bool = True

    def words(self, logits: Tensor, batch: Batch) -> dict[str, str]:
        texts = greedy(logits, batch.lengths.cpu(), self.tokenizer)
        return {key: normalise(text, self.normaliser) for key, text in zip(batch.ids, texts, strict=True)}

    def references(self) -> dict[str, str]:
        with self.dataset.output_keys_as(["id", "text"]):
            items = [self.dataset[place] for place in self.places]
        return {item["id"]: item["text"] for item in items}


@dataclass
class Comparison:
    """A model against the teacher: mean cosine distance in each layer, KL in nats a frame, words, memories."""

    distances: Mean = field(default_factory=Mean)
    divergence: Mean = field(default_factory=Mean)
    hypotheses: dict[str, str] = field(default_factory=dict)
    memory_frames: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    result: EvaluationResult | None = None


def compare_with(
    teacher: PreTrainedModel, others: Mapping[int | str, PreTrainedModel], reading: Reading
) -> tuple[EvaluationResult, dict[int | str, Comparison]]:
    """Read every utterance with the teacher and each other model, all of one family and width.

    Returns the teacher's own words, scored, and by the keys of ``others`` how each model compares.
    """
    own: dict[str, str] = {}
    compared = {key: Comparison() for key in others}
    with ExitStack() as stack:
        meters = {key: stack.enter_context(metered(mixers_of(model))) for key, model in others.items()}
        bar = stack.enter_context(tqdm(total=len(reading.places), unit="utt", disable=reading.quiet))
        for batch in batches(reading.dataset, reading.places, teacher, reading.max_batch_s):
            states, logits = states_and_output(teacher, batch)
            own |= reading.words(logits, batch)
            for key, model in others.items():
                their_states, their_logits = states_and_output(model, batch)
                found = compared[key]
                found.distances.add(*cosine_distances(their_states, states, batch.lengths))
                found.divergence.add(*logit_loss(their_logits, logits, batch.lengths, temperature=1.0))
                found.hypotheses |= reading.words(their_logits, batch)
            bar.update(len(batch.ids))
    references = reading.references()
    for key, found in compared.items():
        found.result = score(references, found.hypotheses)
        found.memory_frames = {index: meter.frames() for index, meter in meters[key].items()}
    return score(references, own), compared
