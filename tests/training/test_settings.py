"""Settings: an experiment's yaml, the experiment it builds on, and the command line, in that order."""

from dataclasses import fields

import pytest

from cald_speech.conversion import LayerMap
from cald_speech.distillation import Hybrid, Target, Unguided
from cald_speech.mixers import Bidirectional, Mamba2
from cald_speech.tasks.ctc import CTC
from cald_speech.training.run import parse
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT

BASE = """
output_folder: !ref results/<seed>
seed: 3
guidance: hybrid
switch_step: 10
num_steps: 20
splits: [a]
corpus: {splits: {train: !ref <splits>, valid: [b]}}
layer_map: !new:cald_speech.conversion.LayerMap
    default: !name:cald_speech.mixers.Bidirectional
        share_projections: True
schedule: !new:cald_speech.training.schedules.WarmupSchedule
    warmup_steps: 4
    decay_steps: 16
    shape: linear
"""
OVERLAYS = {
    "nested keys": "layer_map: {overrides: {0: null}}",
    "another object": "layer_map: !new:cald_speech.conversion.LayerMap {default: !name:cald_speech.mixers.Mamba2 }",
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "guidance").symlink_to(ROOT / "hparams" / "guidance")
    (tmp_path / "base.yaml").write_text(BASE)
    for name, text in OVERLAYS.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: base.yaml\nseed: 4\n{text}\n")
    return tmp_path


def test_every_key_has_its_default(tmp_path):
    (tmp_path / "short.yaml").write_text("output_folder: x")
    settings = Settings.load(tmp_path / "short.yaml")
    defaults = Settings("x")
    changed = {f.name for f in fields(Settings) if getattr(settings, f.name) != getattr(defaults, f.name)}
    assert changed == {"guidance", "task"}  # objects without an equality of their own
    assert type(settings.guidance) is Unguided and type(settings.task) is CTC


def test_objects_and_references(folder):
    settings = Settings.load(folder / "base.yaml")
    assert settings.output_folder == "results/3"
    assert settings.corpus == {"splits": {"train": ["a"], "valid": ["b"]}}
    assert [settings.schedule(step) for step in (0, 4, 12, 20)] == [0.25, 1.0, 0.5, 0.0]
    assert settings.layer_map.default.func is Bidirectional
    assert settings.layer_map.default.keywords == {"share_projections": True}


def test_an_overlay_keeps_what_it_does_not_name(folder):
    settings = Settings.load(folder / "nested keys.yaml")
    assert (settings.seed, settings.output_folder, settings.num_steps) == (4, "results/4", 20)
    assert settings.layer_map.default.keywords == {"share_projections": True}
    assert settings.layer_map.overrides == {0: None}


def test_an_overlay_with_an_object_of_its_own_replaces_the_bases(folder):
    layer_map = Settings.load(folder / "another object.yaml").layer_map
    assert layer_map == LayerMap(Mamba2)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--learning_rate", "1e-3"], lambda s: s.learning_rate == 0.001),
        (["--learning_rate=2.5e-4"], lambda s: s.learning_rate == 0.00025),
        (["--seed", "7"], lambda s: (s.seed, s.output_folder) == (7, "results/7")),
        (["--corpus={splits: {train: [f]}}"], lambda s: s.corpus["splits"] == {"train": ["f"], "valid": ["b"]}),
        (["--splits", "[c, d]"], lambda s: s.corpus["splits"]["train"] == ["c", "d"]),
        (["--corpus", "{splits: {valid: [e]}}"], lambda s: s.corpus == {"splits": {"train": ["a"], "valid": ["e"]}}),
        (["--schedule={shape: constant}"], lambda s: s.schedule(0) == 0.25 and s.schedule(19) == 1.0),
        (["--layer_map={default: {d_conv: 3}}"], lambda s: s.layer_map.default.keywords["d_conv"] == 3),
        (["--guidance", "target", "--alpha_layer", "3"], lambda s: s.guidance.weights(15).layer == 3),
        (["--guidance", "unguided"], lambda s: isinstance(s.guidance, Unguided)),
        (["--alpha_logits", "0.5"], lambda s: s.guidance.weights(9).logits == 0.5),
        (["--switch_step", "5"], lambda s: s.guidance.switch_step == 5),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
@pytest.mark.parametrize("name", ["base", "nested keys"])
def test_command_line(folder, name, argv, value):
    settings, _ = parse([str(folder / f"{name}.yaml"), *argv])
    assert value(settings)


def test_run_options_are_not_settings(folder):
    settings, options = parse([str(folder / "base.yaml"), "--device", "cpu", "--precision", "bf16", "--seed", "1"])
    assert (options.device, options.precision, settings.precision, settings.seed) == ("cpu", "bf16", "fp32", 1)


@pytest.mark.parametrize(("name", "mode"), [("target", Target), ("hybrid", Hybrid), ("unguided", Unguided)])
def test_weights_go_to_the_modes_that_know_them(folder, name, mode):
    settings = Settings.load(folder / "base.yaml", {"guidance": name, "alpha_layer": 2.0, "alpha_logits": 0.25})
    assert type(settings.guidance) is mode
    weights = settings.guidance.weights(0)
    assert (weights.layer, weights.logits) == ((0.0, 0.0) if name == "unguided" else (2.0, 0.25))
