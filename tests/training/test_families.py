"""Every speech family from a teacher to a transcript: distilled, saved, loaded, evaluated, read in one pass.

Those that hear features have tests of their own. The usual ones stand in other tests, and here in `make test-all`.
"""

import json

import pytest
import torch

from cald_speech import from_pretrained
from cald_speech.evaluation.recognition import evaluate_folder
from cald_speech.families.hub import load_processor
from cald_speech.longform import AudioSource
from cald_speech.longform.recogniser import Recogniser
from cald_speech.tasks.reading import whole as in_one_pass
from tests.helpers import SMALL, SPEECH, USUAL
from tests.training.miniature import write_model

CASES = [pytest.param(f, id=name, marks=(pytest.mark.wide,) * (name in USUAL)) for name, f in SPEECH.items()]


@pytest.mark.parametrize("family", CASES)
def test_a_family_is_trained_evaluated_and_read(family, experiment, start, tmp_path):
    options = SMALL.get(family.model_type, {})
    teacher = write_model(tmp_path / "teacher", family.model_type, mask_time_prob=0.1, mask_time_length=2, **options)
    start(experiment(teacher=str(teacher), guidance="hybrid", switch_step=2, align_steps=1, num_steps=4))
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["model_type"] == f"cald_{family.model_type}"
    manifest = next((tmp_path / "data").rglob("*valid*.json"))
    assert evaluate_folder(model, manifest, tmp_path / "report", split="valid", progress=False)["wer"] >= 0
    samples = torch.randn(40_000)
    words = Recogniser.of(model).transcribe(AudioSource.from_samples(samples))
    expected = in_one_pass(from_pretrained(model), load_processor(model))(samples)
    assert [word.text for word in words] == expected.split() != []
