"""The settings of the paper's experiments (arXiv 2410.06846) and its code; teacher and student belong together."""

import math

import pytest
import torch

from cald_speech.distillation import LossWeights
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT

# The student's loss weights before the step at which guidance ends, and that step.
GUIDED = {
    "tedlium": (LossWeights(1.0, 15.0, 1.0), 40_000),
    "slurp": (LossWeights(1.0, 15.0, 0.0), 30_000),
    "voxceleb": (LossWeights(1.0, 30.0, 0.0), 50_000),
}


@pytest.mark.parametrize("corpus", GUIDED)
def test_student_and_teacher(corpus):
    student = Settings.load(ROOT / f"hparams/{corpus}/student.yaml", {"guidance": "hybrid"})
    weights, switch_step = GUIDED[corpus]
    assert student.guidance.weights(switch_step - 1) == weights
    # The published hybrid runs go on with the logit loss, where they have one.
    assert student.guidance.weights(switch_step) == LossWeights(1.0, 0.0, weights.logits)
    teacher = Settings.load(ROOT / f"hparams/{corpus}/teacher.yaml")
    assert teacher.layer_map.factories(24) == [None] * 24 and teacher.teacher is None
    assert student.teacher == f"{teacher.output_folder}/model"
    assert student.options["waypoints"] == f"{teacher.output_folder}/waypoints"
    assert teacher.waypoint_every_steps == 10_000


@pytest.mark.parametrize(
    "name", [f"{corpus}/{part}" for corpus in GUIDED for part in ("student", "teacher")] + ["slurp/joint"]
)
def test_steps_of_72_utterances(name):
    settings = Settings.load(ROOT / f"hparams/{name}.yaml")
    assert settings.accumulation * settings.max_batch_utterances == 72 and settings.num_steps == 90_000
    short = {"tedlium": 10_000, "slurp": 5_000, "voxceleb": 5_000}[name.split("/")[0]]
    assert (settings.short_first_steps, settings.short_first_s) == (short, 10.0)
    rates = [settings.learning_rate_at(step) for step in (5_000, 80_000)]
    assert rates == pytest.approx([3e-4, 1.5e-6], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "width", "heads", "parameters"),
    [
        *((corpus, 1024, 16, 6_863_456) for corpus in GUIDED),  # 379,432,864 in all, with 24 of them
        ("pile", 2048, 8, 33_377_280),
    ],
)
def test_a_mixer_is_as_large_as_the_published_one(name, width, heads, parameters):
    factory = Settings.load(ROOT / f"hparams/{name}/student.yaml").layer_map.factories(1)[0]
    with torch.device("meta"):
        mixer = factory(width, heads)
    assert sum(p.numel() for p in mixer.parameters()) == parameters


def test_the_piles_steps_and_schedule():
    """Two epochs of 1,464,320 blocks; a cosine over 24,000 steps that is never below a tenth."""
    settings = Settings.load(ROOT / "hparams/pile/student.yaml", {"guidance": "hybrid"})
    assert settings.num_steps * 128 == 2 * 1_464_320 and settings.corpus["num_train_tokens"] == 1_464_320 * 2049
    assert settings.accumulation * settings.max_batch_tokens == 128 * 2049
    assert 0 <= settings.guidance.switch_step - 9_120 < 40

    def literal(step):
        return max(0.1, 0.5 * (1 + math.cos(math.pi * (step - 720) / (24_000 - 720)))) * 3e-4

    steps = range(720, 24_000, 1_000)
    assert [settings.learning_rate_at(s) for s in steps] == pytest.approx([literal(s) for s in steps])
    smallest = Settings.load(
        ROOT / "hparams/pile/student.yaml",
        {"num_steps": 11_440, "schedule": {"warmup_steps": 360, "decay_steps": 11_640}, "guidance": "hybrid"},
    )
    assert smallest.guidance.switch_step == 4_576 and smallest.learning_rate_at(11_999) == pytest.approx(3e-5)
