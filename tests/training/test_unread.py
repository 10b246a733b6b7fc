"""A key that is accepted is read by something: whole runs, under every mode, with each look at a setting recorded."""

import dis
import sys
from dataclasses import fields

import pytest

from cald_speech.distillation import Guidance, LossForm, options_of
from cald_speech.errors import UserError
from cald_speech.tasks.classification import Classification
from cald_speech.tasks.ctc import CTC
from cald_speech.tasks.encoding import Encoding
from cald_speech.tasks.language_modelling import CausalLM
from cald_speech.training.run import parse, run
from cald_speech.training.settings import Settings
from cald_speech.training.unread import unread
from tests.training.miniature import write_model
from tests.training.test_command_line import ACCEPTED

# These look at every key, whether or not it acts.
LOOKERS_ON = {
    "check_values",
    "resolved_yaml",
    "load",
    "unread",
    "_found",
    "__eq__",
    "__repr__",
    "check",
    "__post_init__",
}
TASKS = "cald_speech.tasks"
UNGUIDED = {"guidance": "unguided", "alpha_logits": None}
RUNS = {
    "hybrid": {
        "guidance": "hybrid",
        "switch_step": 1,
        "align_steps": 1,
        "align_learning_rate": 1e-3,
        "join_utterances": 2,
        "join_last_steps": 1,
        "short_first_steps": 1,
        "teacher_mask": "student",
        "blank_weight": 0.5,
    },
    "trajectory": {"guidance": "trajectory", "source": True},
    "waypoint": {"guidance": "waypoint", "source": True, "waypoints": True},
    "unguided": UNGUIDED | {"source": True, "teacher": None},
    "alignment": {"guidance": "alignment", "alpha_logits": None},
    "labels": UNGUIDED
    | {
        "source": "base",
        "teacher": None,
        "task": f"!new:{TASKS}.classification.Classification {{}}",
        "corpus": "{splits: {valid: [train-clean-100]}}",  # where no label is new
    },
}


@pytest.fixture
def looks(monkeypatch):
    """The names of settings, options of guidance and of the loss that were looked at."""
    seen = set()

    def watch(cls, names):
        look = cls.__getattribute__

        def watched(of, name):
            if name in names:
                frame = sys._getframe(1)
                callers = {frame.f_code.co_name, frame.f_back.f_code.co_name if frame.f_back else ""}
                if not callers & LOOKERS_ON:
                    seen.add(name)
            return look(of, name)

        monkeypatch.setattr(cls, "__getattribute__", watched, raising=False)

    watch(Settings, {f.name for f in fields(Settings)} - {"options"})
    watch(LossForm, LossForm.options())
    watch(Guidance, {name for _, name in ACCEPTED} - {f.name for f in fields(Settings)} - LossForm.options())
    return seen


@pytest.fixture
def words(teachers, tmp_path):
    """The command line of a run."""

    def of(name):
        keys = RUNS[name]
        made = {}
        if keys.get("source"):
            made["source"] = (
                teachers["layer"] if keys["source"] is True else write_model(tmp_path / "base", head="base")
            )
        if keys.get("waypoints"):
            made["waypoints"] = tmp_path / "waypoints"
            write_model(made["waypoints"] / "step-0000002")
        return [f"--{key}={'null' if value is None else value}" for key, value in (keys | made).items()]

    return of


@pytest.mark.parametrize("name", RUNS)
def test_what_is_not_refused_is_read(name, experiment, words, looks):
    path = experiment(recipe="librispeech", num_steps=3)
    brain = run([str(path), *words(name), "--noprogressbar"])
    accepted = {f.name for f in fields(Settings) if f.init} | LossForm.options()
    accepted |= options_of(type(brain.settings.guidance)).keys()
    assert accepted - unread(brain.settings).keys() - looks == set()


def test_all_that_is_accepted_is_read_by_one_of_these_runs(experiment, words):
    path, left = experiment(recipe="librispeech"), {name for _, name in ACCEPTED}
    for name in RUNS:
        settings, _ = parse([str(path), *words(name)])
        left -= (
            options_of(type(settings.guidance)).keys() | {f.name for f in fields(Settings)} - unread(settings).keys()
        )
        left -= LossForm.options() - unread(settings).keys()
    assert left == {"max_batch_tokens"}, "give RUNS one that reads it"  # of text, which recipes/glue and pile train on


@pytest.mark.parametrize("task", [Classification, Encoding, CausalLM], ids=lambda task: task.__name__)
def test_tasks_that_read_no_text(task):
    """What they are told of it makes no difference: their signatures have it, and no line besides."""
    for method in (task.processor, task.dataset):
        code = method.__code__
        used = {i.argval for i in dis.get_instructions(code) if i.opname.startswith("LOAD_FAST")}
        assert not used & {"normaliser", "unknown"} and set(task.unread) == {"normaliser", "unknown_characters"}
    assert CTC.unread == ()


@pytest.fixture
def path(tmp_path):
    (tmp_path / "e.yaml").write_text(
        "output_folder: !ref x/<join_pause_s>\nnum_steps: 9\nteacher: t\nguidance: target\nswitch_step: 4\n"
        "join_pause_s: 1\n"
    )
    return str(tmp_path / "e.yaml")


LM = f"--task=!new:{TASKS}.language_modelling.CausalLM {{}}"
ENCODING = f"--task=!new:{TASKS}.encoding.Encoding {{}}"
MAP = "!new:cald_speech.conversion.LayerMap {}"
CONSTANT = "!new:cald_speech.training.schedules.WarmupSchedule {floor: 0.1}"
WHOLE = "!new:cald_speech.distillation.Hybrid {switch_step: 3}"
REFUSED = {
    "another mode's": (["--switch_step=3"], "--switch_step: .*target guidance has no such option.* --guidance hybrid"),
    "of no teacher": (["--guidance=unguided", "--alpha_layer=3"], "--alpha_layer: .*hybrid or target"),
    "made by the yaml": ([f"--guidance={WHOLE}", "--alpha_layer=3"], "--alpha_layer: .*makes its guidance itself"),
    "no layer loss": (["--alpha_layer=0", "--alpha_logits=1", "--layer_reduce=sum"], "--layer_reduce: .*no layer loss"),
    "no logit loss": (["--temperature=3"], "--temperature: .*no logit loss under target.* --alpha_logits above 0"),
    "no comparison": (["--guidance=unguided", "--loss=lm"], "--loss: .*no teacher's states"),
    "no mask": (["--guidance=unguided", "--teacher_mask=student"], "--teacher_mask: .*runs no teacher"),
    "last layer": (["--loss=lm", "--final_norm_on_last=False"], "--final_norm_on_last: .*leaves the last layer out"),
    "no alignment": (["--align_learning_rate=1"], "--align_learning_rate: .*nothing is aligned"),
    "only alignment": (["--guidance=alignment", "--normalisation=reference"], "--normalisation: .*no loss of"),
    "nothing converted": (["--initialise=random"], "--initialise: .*converts no layer"),
    "a student": (["--student=s", f"--layer_map={MAP}"], "--layer_map: .*converted model to go on from"),
    "source": (["--source=s"], "--source: .*starts from its teacher's weights.* trajectory or unguided or waypoint"),
    "labels": ([LM, "--normaliser=lower"], "--normaliser: .*takes labels and texts as they stand"),
    "text": ([LM, "--max_batch_s=3"], "--max_batch_s: .*give --max_batch_tokens"),
    "no figure": ([ENCODING, "--score_test_sets=True"], "--score_test_sets: .*encoding has no figure of a test set"),
    "no decay": (["--weight_decay=0", "--decay=mixers"], "--decay: .*no matrix has weight decay.* --weight_decay"),
    "no front end": ([LM, "--freeze_front_end=False"], "--freeze_front_end: .*has no front end"),
    "audio": (["--max_batch_tokens=3"], "--max_batch_tokens: .*give --max_batch_s"),
    "two clocks": (["--checkpoint_every_steps=3", "--checkpoint_every_minutes=3"], "--checkpoint_every_minutes: "),
    "schedule": ([f"--schedule={CONSTANT}"], r"--schedule\.floor: .*does not decay"),
    "one process": (["--distributed_backend=gloo"], "--distributed_backend: expected several processes.*torchrun"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_not_be_read_is_refused(path, case):
    words, told = REFUSED[case]
    with pytest.raises(UserError, match=told) as caught:
        parse([path, *words])
    assert "\n" not in str(caught.value)


def test_a_yaml_may_serve_several_modes(path, caplog):
    """Such keys are named when training starts. What another key refers to is read by that key."""
    caplog.set_level("INFO")
    assert parse([path, "--join_pause_s=2"])[0].output_folder == "x/2"
    assert "keys this run does not read: switch_step" in caplog.text


def test_a_script_has_its_recipe(path):
    with pytest.raises(UserError, match="--recipe: expected no other recipe than the script's own, got pile"):
        run([path, "--recipe=pile"], lambda *folders: {})
