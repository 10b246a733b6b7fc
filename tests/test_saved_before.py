"""What users have is not lost: folders and a stopped run of the first layout of the package load and go on.

The fixtures are described in tests/fixtures/saved_before/README.md. Weights are compared to the bit; what is computed
from them to rounding, since processors differ in the order of their sums.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cald_speech
from cald_speech.families import family_of
from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training.run import run
from tests.training.miniature import SPLITS, write_corpus, write_experiment

SAVED = Path(__file__).parent / "fixtures" / "saved_before"
MODELS = sorted(path.parent.name for path in SAVED.glob("*/expected.safetensors"))


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_folder_loads_and_puts_out_the_same(name):
    head = {"roberta": "masked_lm", "gpt_neox": "lm"}.get(name.split("-")[0], "ctc")
    model = cald_speech.from_pretrained(SAVED / name, head=head).eval()
    state = model.state_dict()
    for key, value in load_file(SAVED / name / "model.safetensors").items():
        assert torch.equal(state[key], value), key
    inputs = load_file(SAVED / name / "expected.safetensors")
    expected = inputs.pop("logits")
    with torch.inference_mode():
        logits = model(**inputs | {"attention_mask": inputs["attention_mask"].long()}).logits
    frames = [expected.size(1), *(family_of(model).context(model).frames.tolist()[1:])]
    for alone, before, num_frames in zip(logits, expected, frames, strict=True):
        torch.testing.assert_close(alone[:num_frames], before[:num_frames], rtol=1e-5, atol=1e-5)


def test_a_stopped_run_goes_on(tmp_path):
    shutil.copytree(SAVED / "stopped_run", tmp_path / "stopped")
    keys = {
        "output_folder": str(tmp_path / "stopped/run"),
        "data_folder": str(write_corpus(tmp_path / "LibriSpeech")),
        "prepare_folder": str(tmp_path / "data"),
        "corpus": {"splits": SPLITS},
        "source": str(tmp_path / "stopped/teacher"),
        "teacher": str(tmp_path / "stopped/teacher"),
        "guidance": "trajectory",
        "teacher_update_every": 2,
        "alpha_logits": 1.0,
        "num_steps": 13,
        "max_batch_s": 4.0,
        "accumulation": 2,
        "learning_rate": 1e-3,
        "log_every_steps": 1,
        "checkpoint_every_steps": 5,
        "model_overrides": {"hidden_dropout": 0.1, "mask_time_prob": 0.2, "mask_time_length": 2},
    }
    brain = run([str(write_experiment(tmp_path / "hparams/e.yaml", **keys)), "--noprogressbar"], prepare)
    assert brain.optimizer_step == 13
    log = [json.loads(line) for line in (tmp_path / "stopped/run/train_log.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (SAVED / "stopped_run/end_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [line["step"] for line in whole], "no step is done twice or left out"
    for line, expected in zip(log, whole, strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-5)
    end = load_file(SAVED / "stopped_run/end.safetensors")
    state = brain.plain.state_dict()
    for key, value in end.items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-4)
