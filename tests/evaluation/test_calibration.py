"""Calibration of a whole model: which frames a slot has, in families whose layers or base model are not the usual."""

import copy

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch

from cald_speech import LayerMap, convert
from cald_speech.data.batching import Audio
from cald_speech.distillation import captured_slots
from cald_speech.distillation.calibration import TURN
from cald_speech.evaluation.calibration import calibrate
from cald_speech.families import families, family_of
from cald_speech.mixers import DEFAULT
from tests.helpers import SPEECH, parakeet_config, tiny_model


class Noise(torch.utils.data.Dataset):
    """Utterances of unequal lengths, as samples or, with ``channels``, as features."""

    def __init__(self, channels: int | None):
        generator = torch.Generator().manual_seed(0)
        sizes = [(6000 + 640 * i,) if channels is None else (40 + 8 * i, channels) for i in range(12)]
        self.items = [torch.randn(size, generator=generator) for size in sizes]
        self.data = {str(i): {"duration_s": 1.0} for i in range(12)}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, place: int) -> dict:
        return {"id": str(place), "wav": self.items[place]}


def model_of(name: str):
    if name != "parakeet_ctc":
        return tiny_model(SPEECH[name])
    torch.manual_seed(0)
    return families()[name].load(parakeet_config()).eval()


def errors_alone(teacher, student, items: list[torch.Tensor]) -> list[float]:
    """Each slot's squared distance over the spread of attention's output, utterance by utterance."""
    family = family_of(teacher)
    mixers = [family.mixer(layer) for layer in family.layers(student)]
    ends = [family.slot_ends(layer) for layer in family.layers(teacher)]
    distances, outputs = [0.0] * len(mixers), [[] for _ in mixers]
    for item in items:
        batch = PaddedBatch([{"id": "a", "wav": item}])
        with torch.no_grad(), captured_slots(ends) as (entering, leaving):
            teacher(**Audio().arguments(batch, teacher)[0])
            for i, (mixer, x, y) in enumerate(zip(mixers, entering, leaving, strict=True)):
                distances[i] += (mixer(x) - y).double().square().sum().item()
                outputs[i].append(y[0].double())
    spreads = [(torch.cat(ys) - torch.cat(ys).mean(0)).square().sum().item() for ys in outputs]
    return [distance / spread for distance, spread in zip(distances, spreads, strict=True)]


@pytest.mark.parametrize("name", ["wav2vec2", "sew", "parakeet_ctc"])
def test_every_slot_is_measured_on_its_layers_frames(name):
    teacher = model_of(name)
    student = copy.deepcopy(teacher)
    report = convert(student, LayerMap(DEFAULT))
    started = copy.deepcopy(student)
    noise = Noise(teacher.config.encoder_config.num_mel_bins if name == "parakeet_ctc" else None)
    found = calibrate(report, teacher, student, noise, modality=Audio())
    held_out = [item for place, item in enumerate(noise.items) if TURN[place % len(TURN)] == 2]
    for when, model in enumerate((started, student)):
        expected = errors_alone(teacher, model, held_out)
        assert [slot.error[when] for slot in found.slots] == pytest.approx(expected, rel=1e-3)
