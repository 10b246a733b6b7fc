"""Every option that is accepted acts, every other one is refused with the way out, and no run gets an impossible value.

What is enumerated comes from the declarations: a new option is tested by itself, or this file says what it needs.
"""

from dataclasses import fields

import pytest
import yaml
from speechbrain.utils.run_opts import HELP_TEXTS, RunOptions

from cald_speech.distillation import Guidance, LossForm, Target, Trajectory, Unguided, every_option, options_of
from cald_speech.distillation.guidance import Hybrid, Waypoint
from cald_speech.distillation.options import is_numeric, meanings
from cald_speech.errors import UserError
from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training import loggers
from cald_speech.training.command_line import RUN_OPTIONS, WAYS_OUT
from cald_speech.training.run import parse, run
from cald_speech.training.schedules import WarmupSchedule
from cald_speech.training.settings import Settings

# Options with values of a kind that the declaration alone does not tell.
OTHERS = {
    "guidance": "target",
    "loss": "lm",
    "logger": "!new:cald_speech.training.loggers.WeightsAndBiases {project: words}",
    "task": "!new:cald_speech.tasks.ctc.CTC {blank: 3}",
    "layer_map": "!new:cald_speech.conversion.LayerMap {default: null, overrides: {0: null}}",
    "schedule": "!new:cald_speech.training.schedules.WarmupSchedule {warmup_steps: 3}",
    "conversion_schedule": "!new:cald_speech.conversion.ConversionSchedule {steps: [0, 2]}",
    "corpus": "{splits: [a]}",
    "model_overrides": "{hidden_dropout: 0.5}",
    "layer_weights": "[1.0, 2.0]",
    "layer_distance": "cosine",
    "layer_normalise": "none",
    "layer_reduce": "sum",
}
MODE_OF = {name: mode for mode in (Waypoint, Trajectory, Hybrid, Target, Unguided) for name in options_of(mode)}
NEEDED = {Hybrid: ["--switch_step=2"], Waypoint: ["--waypoints=w"], LossForm: ["--guidance=target", "--alpha_logits=1"]}
# What lets these act; without it they are refused.
NEEDED |= {
    "initialise": ["--layer_map=!new:cald_speech.conversion.LayerMap {default: !name:cald_speech.mixers.Mamba2 }"],
    "align_learning_rate": ["--align_steps=2"],
    "loss": ["--guidance=target"],
    "teacher_mask": ["--guidance=target"],
    "max_batch_tokens": ["--task=!new:cald_speech.tasks.language_modelling.CausalLM {}"],
    "join_pause_s": ["--join_utterances=2"],
    "join_last_steps": ["--join_utterances=2"],
    "short_first_s": ["--short_first_steps=2"],
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(Waypoint, "check", lambda mode, num_steps: None)  # it looks at its folder
    (tmp_path / "e.yaml").write_text("output_folder: x\nnum_steps: 9\n")
    return str(tmp_path / "e.yaml")


def another(cls: type, name: str) -> str:
    """A value that is not the default."""
    if name in OTHERS:
        return OTHERS[name]
    field = next(f for f in fields(cls) if f.name == name)
    if words := field.metadata.get("one_of"):
        return next(word for word in words if word != field.default)
    if isinstance(field.default, bool):
        return str(not field.default)
    return "3" if is_numeric(cls, name) else "words"


def value_of(settings: Settings, cls: type, name: str):
    of = {Settings: settings, LossForm: settings.loss}.get(cls, settings.guidance)
    return getattr(of, name)


ACCEPTED = [(Settings, f.name) for f in fields(Settings) if f.init]
ACCEPTED += [(LossForm, name) for name in sorted(LossForm.options())]
ACCEPTED += [(MODE_OF[name], name) for name in sorted(MODE_OF)]


@pytest.mark.parametrize(("cls", "name"), ACCEPTED, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_every_key_changes_the_settings(path, cls, name, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda package: True)  # W&B need not be installed to be named
    mode = [] if cls in (Settings, LossForm) else [f"--guidance={cls.__name__.lower()}"]
    needed = NEEDED.get(name, NEEDED.get(cls, []))
    before, _ = parse([path, *mode, *needed])
    needed = [word for word in needed if not word.startswith(f"--{name}=")]
    after, options = parse([path, *mode, *needed, f"--{name}", another(cls, name)])
    assert value_of(after, cls, name) != value_of(before, cls, name)
    assert options == parse([path])[1], "nothing of it goes to SpeechBrain"


def test_what_is_enumerated_is_what_is_accepted():
    assert {name for _, name in ACCEPTED} >= {f.name for f in fields(Settings) if f.init} | LossForm.options()
    assert MODE_OF.keys() == {n for n in every_option() if n != "fade_steps"}  # of another test's own mode


@pytest.mark.parametrize("name", sorted(RUN_OPTIONS.keys() - {"go_on"}))  # test_record.py has that
def test_every_run_option_acts(path, name, monkeypatch):
    monkeypatch.setenv("RANK", "0")  # of several processes
    value = RUN_OPTIONS[name].values
    words = [f"--{name}"] if value is None else [f"--{name}", (value or ("meta",))[-1]]
    options = parse([path, *words])[1]
    assert getattr(options, name) == (True if value is None else words[1])
    assert name in options.overridden_args


def test_run_options_reach_the_brain(experiment, start, capsys):
    path = experiment(num_steps=1)
    brain = start(path, "run", "--eval_precision", "bf16", "--max_grad_norm=0.25", "--device=cpu")
    assert (brain.eval_precision, brain.precision, brain.noprogressbar, brain.device) == ("bf16", "fp32", True, "cpu")
    assert brain.settings.max_grad_norm == 0.25
    # A run that has ended has a bar too, which says so.
    folder = ["--output_folder", str(brain.store.folder), "--max_grad_norm=0.25"]
    for words, shown in ((["--noprogressbar"], False), ([], True)):
        capsys.readouterr()
        run([str(path), *folder, *words], prepare)
        assert ("step 1 of 1" in capsys.readouterr().err) is shown


def test_all_of_speechbrains_options_are_keys_or_act_or_are_refused():
    theirs = {f.name for f in fields(RunOptions)} | HELP_TEXTS.keys()
    keys = {f.name for f in fields(Settings)}
    assert theirs - {"overridden_args"} == (theirs & keys) | (RUN_OPTIONS.keys() - {"go_on"}) | WAYS_OUT.keys()
    assert not keys & (RUN_OPTIONS.keys() | WAYS_OUT.keys())


@pytest.mark.parametrize("name", WAYS_OUT)
@pytest.mark.parametrize("value", [[], ["3"]], ids=["bare", "with a value"])
def test_what_does_nothing_is_refused(path, name, value):
    with pytest.raises(UserError, match=f"--{name}: .* does nothing here: (use|leave|start|take|give) "):
        parse([path, f"--{name}", *value])


def test_ways_out_are_options():
    for way in WAYS_OUT.values():
        for word in way.split("`")[0].replace(",", "").split():
            if word.startswith("--"):
                assert word.removeprefix("--") in {f.name for f in fields(Settings)}, way


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seed"], "--seed: expected a value after it"),
        (["--seed", "1", "--seed=2"], "--seed: .*given twice"),
        (["--eval_precision", "fp8"], "--eval_precision: expected one of fp32, bf16, fp16, got fp8"),
        (["--device", "toaster"], "--device: expected cpu, cuda or cuda:1, got 'toaster'"),
        (["--device"], "--device: expected a value, got none"),
        (["--noprogressbar", "yes"], "--noprogressbar: expected no value"),
        (["seed=3"], "expected --key value after the experiment file, got 'seed=3'"),
        (["--learn", "3"], "unknown key 'learn'"),
        (["--prec", "bf16"], "unknown key 'prec'; did you mean 'precision'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_be_meant(path, words, told):
    with pytest.raises(UserError, match=told):
        parse([path, *words])


@pytest.mark.parametrize("folder", ["2024", "a=b", "a: b #c", "it's", "1e3", "results/x", "true", "[x]"])
def test_a_folder_may_be_called_anything(path, folder):
    assert parse([path, "--output_folder", folder])[0].output_folder == folder
    assert parse([path, f"--teacher={folder}"])[0].teacher == folder


def test_a_text_may_still_refer_to_a_key_or_be_none(path):
    settings = parse([path, "--output_folder", "!ref runs/<num_steps>", "--teacher", "null", "--recipe=None"])[0]
    assert (settings.output_folder, settings.teacher, settings.recipe) == ("runs/9", None, None)


# --- values that no run can have --------------------------------------------------------------------------------------

DECLARED = [Settings, WarmupSchedule, LossForm, Guidance, Target, Trajectory, Hybrid, Waypoint]
NUMBERS = [
    (cls, f)
    for cls in DECLARED
    for f in fields(cls)
    if f.name in vars(cls)["__annotations__"] and is_numeric(cls, f.name)
]


def refused(path, cls, name, value):
    """What is told of a yaml with that value."""
    key, mode = name, MODE_OF.get(name)
    given = {"output_folder": "x", "num_steps": 9, name: value}
    if cls is WarmupSchedule:
        key = f"schedule.{name}"
        given = {"output_folder": "x"}
    if cls not in (Settings, LossForm, WarmupSchedule):
        given |= {"guidance": mode.__name__.lower(), "switch_step": 2, "waypoints": "w", name: value}
    text = yaml.safe_dump(given)
    if cls is WarmupSchedule:
        text += f"schedule: !new:cald_speech.training.schedules.WarmupSchedule\n    {yaml.safe_dump({name: value})}"
    with open(path, "w") as stream:
        stream.write(text)
    with pytest.raises(UserError, match=rf"e\.yaml: (.* )?{key}: expected") as told:
        Settings.load(path)
    return str(told.value)


@pytest.mark.parametrize(("cls", "field"), NUMBERS, ids=lambda v: getattr(v, "name", None) or v.__name__)
def test_every_number_has_a_range_which_is_kept(path, cls, field):
    bounds = field.metadata["bounds"]
    assert bounds, "declare the values that a run can have"
    values = [float("nan")]
    if not field.metadata["infinite"]:
        values += [float("inf"), float("-inf")]
    values += [bounds[name] + step for name, step in (("at_least", -1), ("above", 0), ("at_most", 1)) if name in bounds]
    values += ["many", True]
    for value in values:
        listed = field.name == "layer_weights"
        told = refused(path, cls, field.name, [1.0, value] if listed else value)
        assert "\n" not in told


@pytest.mark.parametrize(
    "text",
    [
        "corpus: {longest_s: .nan}",
        "model_overrides: {hidden_dropout: .nan}",
        "layer_map: !new:cald_speech.conversion.LayerMap {default: !name:cald_speech.mixers.Mamba2 {dt_max: .nan}}",
        "layer_weights: [0, 0]",
    ],
)
def test_numbers_of_others(path, text):
    with open(path, "a") as stream:
        stream.write(text)
    with pytest.raises(UserError, match=text.split(":")[0]):
        Settings.load(path)


def test_every_option_has_a_meaning():
    for cls in DECLARED:
        assert all(meaning for meaning, _ in meanings(cls).values()), cls
