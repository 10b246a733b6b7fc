"""Every speech family from a teacher to a transcript: distilled, saved, loaded, evaluated, read in one pass.

Those that hear features have tests of their own. The usual ones stand in other tests, and here in `make test-all`.
"""

import json

import pytest
import torch
from speechbrain.dataio.batch import PaddedBatch

from cald_speech import from_pretrained
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.families.hub import load_processor
from cald_speech.longform import AudioSource
from cald_speech.longform.recogniser import Recogniser
from cald_speech.tasks.reading import whole as in_one_pass
from tests.helpers import SPEECH, USUAL
from tests.training.miniature import write_model

CASES = [pytest.param(f, id=name, marks=(pytest.mark.wide,) * (name in USUAL)) for name, f in SPEECH.items()]


@pytest.mark.parametrize("family", CASES)
def test_a_family_is_trained_evaluated_and_read(family, experiment, start, tmp_path):
    teacher = write_model(tmp_path / "teacher", family.model_type, mask_time_prob=0.1, mask_time_length=2)
    brain = start(experiment(teacher=str(teacher), guidance="hybrid", switch_step=2, align_steps=1, num_steps=4))
    batch = PaddedBatch([{"wav": torch.zeros(samples), "labels": torch.zeros(1)} for samples in (9000, 5000)])
    counts, config = brain.objective.count([batch]), brain.plain.config
    frames = family.frame_lengths(torch.tensor([9000, 5000]), config)
    assert counts.frames == frames.sum()
    assert counts.layer_frames == (frames // getattr(config, "squeeze_factor", 1)).sum()
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == f"cald_{family.model_type}"
    manifest = next((tmp_path / "data").rglob("*valid*.json"))
    assert evaluate_folder(model, manifest, tmp_path / "report", split="valid", progress=False)["wer"] >= 0
    samples = torch.randn(40_000)
    words = Recogniser.of(model).transcribe(AudioSource.from_samples(samples))
    expected = in_one_pass(from_pretrained(model), load_processor(model))(samples)
    assert [word.text for word in words] == expected.split() != []
