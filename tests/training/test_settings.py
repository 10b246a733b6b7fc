"""Settings: an experiment's yaml, the experiment it builds on, and the command line, in that order."""

from dataclasses import dataclass, fields, replace

import pytest

from cald_speech.conversion import LayerMap
from cald_speech.distillation import PRESETS, Hybrid, Target, Unguided
from cald_speech.errors import UserError
from cald_speech.mixers import Bidirectional, Mamba2
from cald_speech.tasks.ctc import CTC
from cald_speech.training.run import parse
from cald_speech.training.settings import Settings

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
    (tmp_path / "base.yaml").write_text(BASE)
    for name, text in OVERLAYS.items():
        (tmp_path / f"{name}.yaml").write_text(f"base: base.yaml\nseed: 4\n{text}\n")
    return tmp_path


def test_every_key_has_its_default(tmp_path):
    (tmp_path / "short.yaml").write_text("output_folder: x")
    settings = Settings.load(tmp_path / "short.yaml")
    defaults = Settings("x")
    changed = {f.name for f in fields(Settings) if getattr(settings, f.name) != getattr(defaults, f.name)}
    assert changed == {"task"}  # an object without an equality of its own
    assert type(settings.guidance) is Unguided and type(settings.task) is CTC


MISTAKES = {
    "a tab": (b"corpus:\n\ttrain: a", r"line 2: expected yaml, which this is not: found character '\\t'"),
    "a key twice": (b"seed: 1\nseed: 2", r"line 2: expected yaml, .*duplicate key .seed. .*original value"),
    "latin 1": (b"licence: \xe9", r"e\.yaml:1: expected an experiment in UTF-8.*0xE9"),
    "a number for a name": (b"teacher: 2024", r"teacher: expected text, got 2024"),
    "a list for a model": (b"source: [a]", r"source: expected text or a PreTrainedConfig, got \['a'\]"),
    "a list for a schedule": (b"conversion_schedule: [1]", r"conversion_schedule: expected a ConversionSchedule"),
    "no folder": (b"data_folder: ''", r"data_folder: expected a folder, got an empty name"),
    "a name for a mixer": (
        b"layer_map: !new:cald_speech.conversion.LayerMap {default: mamba2}",
        "layer_map: .*'mamba2'",
    ),
    "an option that is none": (b"task: !new:cald_speech.tasks.ctc.CTC {blnk: 3}", r"CTC: CTC.* argument 'blnk'"),
    "a name for a perturbation": (b"task: !new:cald_speech.tasks.ctc.CTC {perturbation: x}", "perturbation: .*got 'x'"),
    "a name for the blank": (b"task: !new:cald_speech.tasks.ctc.CTC {blank: x}", "blank: expected the number"),
    "numbers for labels": (
        b"task: !new:cald_speech.tasks.classification.Classification {labels: [0, 1]}",
        r"labels: expected a list of names, numbers among them in quotes, got \[0, 1\]",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_where_they_are(tmp_path, mistake):
    written, told = MISTAKES[mistake]
    (tmp_path / "e.yaml").write_bytes(written)
    with pytest.raises(UserError, match=told) as caught:
        Settings.load(tmp_path / "e.yaml", {"output_folder": "x"})
    assert "\n" not in str(caught.value) and "http" not in str(caught.value)


def test_paths_from_the_home_folder_and_other_encodings(tmp_path, monkeypatch):
    """No shell has seen a yaml's ~; to make a folder of that name invites its owner to remove the wrong one."""
    monkeypatch.setenv("HOME", "/home/anna")
    text = "output_folder: ~/out\nprepare_folder: ~/data\nteacher: ~/t\ndata_folder: a/~\nlicence: \N{COPYRIGHT SIGN}"
    (tmp_path / "e.yaml").write_text(text, encoding="utf-16")
    settings = Settings.load(tmp_path / "e.yaml")
    assert (settings.output_folder, settings.prepare_folder) == ("/home/anna/out", "/home/anna/data")
    assert (settings.teacher, settings.data_folder) == ("/home/anna/t", "a/~")
    assert settings.licence == "\N{COPYRIGHT SIGN}"


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
        (["--guidance", "trajectory", "--alpha_task", "0.5"], lambda s: s.guidance.weights(9).task == 0.5),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
@pytest.mark.parametrize("name", ["base", "nested keys"])
def test_command_line(folder, name, argv, value):
    settings, _ = parse([str(folder / f"{name}.yaml"), *argv])
    assert value(settings)


@pytest.mark.parametrize(("name", "mode"), [("target", Target), ("hybrid", Hybrid), ("unguided", Unguided)])
def test_weights_go_to_the_modes_that_know_them(folder, name, mode):
    settings = Settings.load(folder / "base.yaml", {"guidance": name, "alpha_layer": 2.0, "alpha_logits": 0.25})
    assert type(settings.guidance) is mode
    weights = settings.guidance.weights(0)
    assert (weights.layer, weights.logits) == ((0.0, 0.0) if name == "unguided" else (2.0, 0.25))


def test_a_yaml_may_have_options_of_other_modes(folder):
    """In a command they are refused: test_unread.py."""
    settings = Settings.load(folder / "base.yaml", {"guidance": "target", "teacher_steps": 2.0, "waypoints": "w"})
    assert settings.guidance == Target()
    assert settings.options == {"switch_step": 10, "teacher_steps": 2.0, "waypoints": "w"}


@pytest.mark.parametrize("preset", ["speech", "nlp"])
def test_options_of_the_loss_change_its_preset(folder, preset):
    given = {} if preset == "speech" else {"loss": preset}
    given |= {"temperature": 3.0, "layer_weights": [1.0, 2.0], "scale_by_t2": None}
    form = Settings.load(folder / "base.yaml", given).loss
    assert form == replace(PRESETS[preset], temperature=3.0, layer_weights=[1.0, 2.0])


def test_a_mode_that_the_experiment_makes(folder):
    mode = "!new:cald_speech.distillation.Hybrid {switch_step: 7, alpha_layer: 2.0}"
    settings, _ = parse([str(folder / "base.yaml"), "--guidance", mode])
    assert settings.guidance == Hybrid(switch_step=7, alpha_layer=2.0)


@dataclass(kw_only=True)
class Fading(Target):
    """A user's own mode."""

    fade_steps: int


@pytest.mark.parametrize("place", ["beside", "one folder up"])
def test_a_mode_of_the_users_own(tmp_path, place, monkeypatch):
    """One class and one yaml, which may set other defaults; its options are keys, and the shipped modes stay known."""
    monkeypatch.setenv("CALD_SPEECH_MODULES", "tests")
    experiment = tmp_path / "mine" / "a.yaml"
    guidance = (experiment.parent if place == "beside" else tmp_path) / "guidance"
    guidance.mkdir(parents=True)
    experiment.parent.mkdir(exist_ok=True)
    experiment.write_text("output_folder: x\nguidance: fading\nfade_steps: 3\n")
    mode = "guidance: !name:tests.training.test_settings.Fading {alpha_layer: 2.0, alpha_logits: 1.0}"
    (guidance / "fading.yaml").write_text(mode)
    loaded = Settings.load(experiment, {"alpha_logits": 0.5}).guidance
    assert type(loaded).__name__ == "Fading"
    assert (loaded.fade_steps, loaded.alpha_layer, loaded.alpha_logits) == (3, 2.0, 0.5)
    assert type(Settings.load(experiment, {"guidance": "target"}).guidance) is Target
    (guidance / "fading.yaml").write_text("guidance: !name:cald_speech.mixers.Mamba2")
    with pytest.raises(UserError, match=r"fading\.yaml: guidance: expected `!name:` with the class of a mode"):
        Settings.load(experiment)


def test_a_copy_of_a_shipped_mode_in_its_former_form(folder):
    """Such copies stood beside experiments: what to do is said, and then the same command works."""
    copy = folder / "guidance" / "hybrid.yaml"
    copy.parent.mkdir()
    copy.write_text(
        "alpha_layer: 15.0\nswitch_step: !PLACEHOLDER # set it in the experiment's yaml\n"
        "guidance: !new:cald_speech.distillation.Hybrid\n"
        "    switch_step: !ref <switch_step>\n    layer: !ref <alpha_layer>\n"
    )
    with pytest.raises(
        UserError, match=r"hybrid\.yaml: .*`!name:cald_speech\.distillation\.Hybrid`.* Write this one line"
    ):
        Settings.load(folder / "base.yaml")
    copy.unlink()
    assert Settings.load(folder / "base.yaml").guidance == Hybrid(switch_step=10)
