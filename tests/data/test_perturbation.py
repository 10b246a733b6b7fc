"""Speed and noise: what they do to the sound, and that a batch alone decides."""

import random

import pytest
import torch
from speechbrain.augment.time_domain import AddNoise, SpeedPerturb

from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.data.perturbation import Perturbation, SpeechBrainAugmentation, coloured_noise
from cald_speech.data.text import make_processor
from cald_speech.errors import UserError
from cald_speech.experiment_yaml import build, check
from cald_speech.tasks.ctc import CTC
from tests.helpers import relative_error


def tone(frequency_hz: float = 400.0, samples: int = SAMPLE_RATE) -> torch.Tensor:
    return torch.sin(2 * torch.pi * frequency_hz * torch.arange(samples) / SAMPLE_RATE)


def items(count: int = 4) -> list[dict]:
    return [
        {"id": str(i), "wav": tone(), "labels": torch.tensor([5, 6]), "text": "AB", "duration_s": 1.0}
        for i in range(count)
    ]


@pytest.mark.parametrize("speed", [0.8, 0.9, 1.25])
def test_speed_moves_length_and_pitch(speed):
    [item] = Perturbation(speeds=[speed])(items(1), seed=0)
    assert len(item["wav"]) == pytest.approx(SAMPLE_RATE / speed, abs=1) and item["duration_s"] == pytest.approx(
        1 / speed, rel=1e-3
    )
    peak = torch.fft.rfft(item["wav"]).abs().argmax().item() * SAMPLE_RATE / len(item["wav"])
    assert peak == pytest.approx(400 * speed, abs=2)


def test_noise_is_as_loud_as_it_should_be():
    [item] = Perturbation(noisy=1.0, snr_db=(10, 10))(items(1), seed=0)
    gain = (item["wav"] @ tone()) / (tone() @ tone())
    noise = item["wav"] - gain * tone()
    snr_db = 10 * torch.log10((gain * tone()).square().mean() / noise.square().mean())
    assert snr_db.item() == pytest.approx(10, abs=0.3)
    assert item["wav"].std().item() == pytest.approx(tone().std().item(), rel=1e-3)


def test_colour():
    for slope in (0.0, 6.0):
        power = torch.fft.rfft(coloured_noise(2**16, slope, torch.Generator().manual_seed(0))).abs().square()
        octaves = 10 * torch.log10(power[4096:8192].mean() / power[16384:].mean()) / 2
        assert octaves.item() == pytest.approx(slope, abs=0.6)


def test_a_batch_alone_decides():
    perturbation = Perturbation(speeds=[0.9, 1.0, 1.1], noisy=0.5)
    one, again, other = (perturbation(items(8), seed=seed) for seed in (-3, -3, 4))
    assert all(torch.equal(a["wav"], b["wav"]) for a, b in zip(one, again, strict=True))
    assert [len(item["wav"]) for item in one] != [len(item["wav"]) for item in other]
    assert len({len(item["wav"]) for item in one + other}) == 3  # each utterance in its own way
    assert all(item["text"] == "AB" and item["labels"].tolist() == [5, 6] for item in one)


def test_nothing_to_change():
    [item] = Perturbation()(items(1), seed=0)
    assert relative_error(item["wav"], tone()) < 1e-5


def test_before_utterances_are_joined(tmp_path):
    processor = make_processor(tmp_path, ["AB"])
    change = CTC(perturbation=Perturbation(speeds=[0.5])).change(processor, join_utterances=2, pause_s=0.0)
    joined = change(items(4), 1)
    assert sum(item["duration_s"] for item in joined) == pytest.approx(8.0) and len(joined) < 4
    assert CTC(perturbation=Perturbation()).change(processor, join_utterances=1, pause_s=0.0)(items(1), 0)
    assert CTC().change(processor, join_utterances=1, pause_s=0.0) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speeds": []}, "speeds: .* got"),
        ({"speeds": [0.92]}, "steps of 0.05, got .0.92"),
        ({"speeds": [3]}, "0.5 to 2"),
        ({"noisy": 1.5}, "noisy: .* got 1.5"),
        ({"snr_db": [5]}, "snr_db: .* got .5"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        Perturbation(**options)


def test_augmenters_of_speechbrain_draw_by_the_batch_alone(tmp_path):
    """Noise from files is taken in turn by SpeechBrain: not here, or a resumed run would go on elsewhere."""
    lines = ["ID,duration,wav,wav_format,wav_opts"]
    for number in range(4):
        write_audio(
            tmp_path / f"{number}.wav", 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(number))
        )
        lines.append(f"{number},0.5,{tmp_path}/{number}.wav,wav,")
    (tmp_path / "noise.csv").write_text("\n".join(lines) + "\n")
    noise = AddNoise(str(tmp_path / "noise.csv"), snr_low=0, snr_high=10, normalize=False)
    augmentation = SpeechBrainAugmentation([SpeedPerturb(16_000, speeds=[80, 90, 110]), noise], share=0.9)
    before = torch.get_rng_state(), random.getstate()
    first = augmentation(items(6), seed=3)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    augmentation(items(6), seed=4)
    again = augmentation(items(6), seed=3)
    assert all(torch.equal(one["wav"], two["wav"]) for one, two in zip(first, again, strict=True))
    assert len({len(item["wav"]) for item in first}) > 1
    assert all(item["duration_s"] == len(item["wav"]) / SAMPLE_RATE for item in first)


def test_augmenters_of_a_yaml(tmp_path):
    place = "speechbrain.augment.time_domain"
    augmenters = f"[!new:{place}.SpeedPerturb {{orig_freq: 16000, speeds: [90, 110]}}]"
    text = "perturbation: !new:cald_speech.data.perturbation.SpeechBrainAugmentation {augmenters: %s}"
    check(text % augmenters, "mine.yaml")
    assert len(build(text % augmenters)["perturbation"](items(1), seed=0)) == 1
    with pytest.raises(UserError, match="run_on_main"):
        check("x: !apply:speechbrain.utils.distributed.run_on_main []", "mine.yaml")
    with pytest.raises(UserError, match="augmenters: expected"):
        SpeechBrainAugmentation([3])
