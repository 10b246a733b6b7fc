"""What goes wrong in training ends in a paragraph that helps, with nothing lost."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from speechbrain import Stage
from transformers import PreTrainedModel

import cald_speech
from cald_speech.distillation import Target
from cald_speech.errors import UserError
from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training import models as building
from cald_speech.training.brain import CaldBrain
from cald_speech.training.checkpointing import UNFINISHED, AtomicCheckpointer
from cald_speech.training.run import run, train
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT, write_model
from tests.training.test_resume import Killed, assert_same_run, train_steps

# --- a loss or a gradient that is not finite --------------------------------------------------------------------------


def spoil_loss(brain: CaldBrain) -> torch.utils.hooks.RemovableHandle:
    return brain.plain.lm_head.register_forward_hook(lambda module, args, logits: logits * float("nan"))


def spoil_gradient(brain: CaldBrain) -> torch.utils.hooks.RemovableHandle:
    return brain.plain.lm_head.weight.register_hook(lambda gradient: gradient / 0)


@pytest.fixture(params=[spoil_loss, spoil_gradient], ids=["loss", "gradient"])
def spoilt(request, monkeypatch):
    """Spoil chosen steps, and keep the weights before each step."""
    fit_batch, weights = CaldBrain.fit_batch, []

    def choose(*steps: int) -> list[dict]:
        def fit(brain, batch):
            weights.append({name: value.clone() for name, value in brain.plain.state_dict().items()})
            handle = request.param(brain) if brain.optimizer_step in steps else None
            try:
                return fit_batch(brain, batch)
            finally:
                if handle is not None:
                    handle.remove()

        monkeypatch.setattr(CaldBrain, "fit_batch", fit)
        return weights

    return choose


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_spoilt_step_is_skipped(experiment, start, spoilt, caplog):
    weights = spoilt(2, 4)
    brain = start(experiment(num_steps=6, nonfinite_patience=2))
    changed = [not same(*pair) for pair in zip(weights, [*weights[1:], brain.plain.state_dict()], strict=True)]
    assert changed == [True, True, False, True, False, True]
    assert brain.skipped.count == 2 and "step 2: loss or gradient is not finite" in caplog.text
    lines = [json.loads(line) for line in (brain.store.folder / "train_log.jsonl").read_text().splitlines()]
    assert [line["skipped_steps"] for line in lines if "loss/task" in line] == [0, 0, 1, 1, 2, 2]
    assert all(value.isfinite().all() for value in brain.plain.state_dict().values())


def test_too_many_in_a_row_stop_the_run(experiment, start, spoilt):
    weights = spoilt(1, 2, 3)
    with pytest.raises(UserError, match=r"3 optimiser steps in a row .* step 3, .* 1-7-00\d\d") as stop:
        start(experiment(num_steps=6, nonfinite_patience=3))
    assert len(weights) == 4 and same(weights[1], weights[3])
    assert "learning_rate" in str(stop.value) and "There is no checkpoint yet" in str(stop.value)


def spoil_weight(brain: CaldBrain) -> None:
    brain.plain.lm_head.weight.data[0, 0] = float("nan")


def spoil_outputs(brain: CaldBrain) -> None:
    """The weights are finite, what comes of them in validation is not, and the loss does not show it."""
    brain.plain.lm_head.register_forward_hook(lambda m, a, logits: logits if m.training else logits * float("nan"))


def spoil_validation_after(monkeypatch, step: int, spoil) -> None:
    """From the validation after so many steps on."""
    start_stage = CaldBrain.on_stage_start

    def spoilt_from(brain, stage, epoch=None):
        if stage == Stage.VALID and brain.optimizer_step >= step:
            spoil(brain)
        start_stage(brain, stage, epoch)

    monkeypatch.setattr(CaldBrain, "on_stage_start", spoilt_from)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [spoil_weight, spoil_outputs])
def test_nan_never_becomes_the_best_model(experiment, start, monkeypatch, spoil):
    """Neither the model, nor any checkpoint that is kept, nor what the same command ends with once it is mended."""
    path = experiment(num_steps=7, checkpoint_every_steps=1)
    folder = path.parents[1] / "run"
    with monkeypatch.context() as patch:
        spoil_validation_after(patch, 5, spoil)
        with pytest.raises(UserError, match=r"finite.* checkpoint.* (the same|has these same)") as stop:
            start(path)
    (named,) = [word.strip(",") for word in str(stop.value).split() if "checkpoints/" in word]
    assert Path(named).is_dir()
    for checkpoint in (folder / "checkpoints").iterdir():
        state = torch.load(checkpoint / "student.ckpt")
        assert all(value.isfinite().all() for value in state.values())
    if (folder / "model").exists():
        assert all(v.isfinite().all() for v in load_file(folder / "model/model.safetensors").values())
    assert same(start(path).plain.state_dict(), start(path, "whole").plain.state_dict())


def test_a_validation_that_is_not_finite_ends_no_run_in_its_middle(experiment, start, monkeypatch, caplog):
    path = experiment(num_steps=9, accumulation=4)
    evaluate_batch = CaldBrain.evaluate_batch

    def once(brain, batch, stage):
        handle = spoil_loss(brain) if brain.optimizer_step < 9 else None
        try:
            return evaluate_batch(brain, batch, stage)
        finally:
            if handle is not None:
                handle.remove()

    monkeypatch.setattr(CaldBrain, "evaluate_batch", once)
    brain = start(path)
    assert "is not finite (utterances: 2-7-" in caplog.text and "neither model nor checkpoint" in caplog.text
    valid = [line for line in lines_of(brain.store.folder) if "valid/loss" in line]
    assert [line["valid/loss"] > 0 for line in valid] == [False] * (len(valid) - 1) + [True]
    assert json.loads((brain.store.folder / "model/cald.json").read_text())["valid"]["step"] == 9


def test_the_checkpoint_before_the_first_skipped_step_is_kept(experiment, start, spoilt, monkeypatch):
    """Also where a signal saves another: what spoils the steps may be in its weights."""
    spoilt(3, 4, 5)
    with monkeypatch.context() as patch:
        patch.setattr(CaldBrain, "_asked_to_stop", lambda brain: brain.optimizer_step == 4)
        with pytest.raises(SystemExit):
            start(experiment(num_steps=6, nonfinite_patience=3, checkpoint_every_steps=1, max_batch_s=2.0))
    with pytest.raises(UserError, match=r"The newest checkpoint, (\S+), has these same weights: delete it") as stop:
        start(experiment(num_steps=6, nonfinite_patience=2, checkpoint_every_steps=1, max_batch_s=2.0))
    named = [Path(word.strip(",")) for word in str(stop.value).split() if "checkpoints/" in word]
    assert len(named) == 2 and all(path.is_dir() for path in named)
    assert [yaml.safe_load((path / "brain.ckpt").read_text())["optimizer_step"] for path in named] == [4, 3]


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


# --- a full disk ------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_grows_past(num_bytes: int):
    """The operating system refuses to write, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def torch_save_fails():
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        yield


def from_step(monkeypatch, step: int, trouble) -> None:
    """Trouble from that optimiser step to the end of the run."""
    fit_batch = CaldBrain.fit_batch

    def troubled(brain, batch):
        if brain.optimizer_step == step:
            brain.trouble = trouble()
            brain.trouble.__enter__()
        return fit_batch(brain, batch)

    fit = CaldBrain.fit

    def relieved(brain, *args, **kwargs):
        try:
            return fit(brain, *args, **kwargs)
        finally:
            brain.trouble.__exit__(None, None, None)

    monkeypatch.setattr(CaldBrain, "fit_batch", troubled)
    monkeypatch.setattr(CaldBrain, "fit", relieved)


@pytest.mark.parametrize(
    "trouble", [torch_save_fails, lambda: no_file_grows_past(60_000)], ids=["torch.save", "operating system"]
)
def test_full_disk_at_a_checkpoint(experiment, start, whole, monkeypatch, trouble):
    keys = {"checkpoint_every_steps": 2, "num_steps": 5}
    path, expected = experiment(**keys), whole(**keys).brain
    with monkeypatch.context() as patch:
        from_step(patch, 3, trouble)
        with pytest.raises(
            UserError, match=r"cannot save a checkpoint .* MiB free\. Make room\. The last good checkpoint"
        ):
            start(path)
    checkpoints = path.parents[1] / "run" / "checkpoints"
    assert [p.name.split("+")[0] for p in checkpoints.iterdir()] == ["CKPT"]
    assert_same_run(start(path), expected)


@contextmanager
def save_pretrained_fails():
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", full)
        yield


@pytest.mark.parametrize(
    "trouble", [save_pretrained_fails, lambda: no_file_grows_past(60_000)], ids=["save_pretrained", "operating system"]
)
def test_full_disk_at_a_model(experiment, start, trouble):
    brain = start(experiment())
    folder = brain.store.folder / "model"
    weights = (folder / "model.safetensors").read_bytes()
    with trouble(), pytest.raises(UserError, match=r"cannot save the model in .*run/model.* untouched"):
        brain.store.save("model", brain.plain)
    assert not [path for path in brain.store.folder.iterdir() if path.name.startswith(".")]
    assert (folder / "model.safetensors").read_bytes() == weights
    assert cald_speech.from_pretrained(folder).config.layer_map is not None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
def test_full_disk_at_the_log(experiment, start, monkeypatch):
    from_step(monkeypatch, 2, lambda: no_file_grows_past(1_000))
    with pytest.raises(UserError, match=r"cannot write .*train_log\.jsonl"):
        start(experiment())


# --- what a killed run leaves -----------------------------------------------------------------------------------------


def test_leftovers_are_cleaned(experiment, start):
    path = experiment()
    folder = start(path).store.folder
    weights = (folder / "model" / "model.safetensors").read_bytes()
    unfinished = folder / "checkpoints" / f"{UNFINISHED}CKPT+2026"
    unfinished.mkdir()
    (unfinished / "student.ckpt").write_bytes(b"half")
    # Killed between the two renames that replace a model folder where folders cannot be exchanged.
    shutil.copytree(folder / "model", folder / ".model.99999999.unfinished")
    (folder / "model").rename(folder / ".model.99999999.old")
    brain = start(path)
    assert brain.optimizer_step == 4 and not unfinished.exists()
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    brain.store.save("model", brain.plain)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_killed_after_its_last_checkpoint_a_run_keeps_no_more_than_undisturbed(experiment, start, monkeypatch):
    path = experiment(checkpoint_every_steps=1)

    def killed(checkpointer, **kwargs):
        if len(checkpointer.find_checkpoints()) > 1 and checkpointer.find_checkpoints()[0].meta["end-of-epoch"]:
            raise Killed
        return delete(checkpointer, **kwargs)

    delete = AtomicCheckpointer.delete_checkpoints
    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointer, "delete_checkpoints", killed)
        with pytest.raises(Killed):
            start(path)
    checkpoints = path.parents[1] / "run/checkpoints"
    assert len(list(checkpoints.iterdir())) == 2
    start(path)
    (kept,) = checkpoints.iterdir()
    assert yaml.safe_load((kept / "CKPT.yaml").read_text())["end-of-epoch"]


def test_strays_of_killed_processes_are_swept(experiment, start):
    """Half-deleted checkpoints, and temporary files of processes that are gone; those of living ones stay."""
    path = experiment(prepare_folder=None)
    folder = start(path, "run", "--num_steps=2").store.folder
    (folder / "checkpoints/CKPT+2020-01-01+00-00-00+00").mkdir()
    (folder / "checkpoints/CKPT+2020-01-01+00-00-00+00/student.ckpt").write_bytes(b"left")
    (folder / "waypoints/.step-0000002.99999999.unfinished").mkdir(parents=True)
    gone = [folder / f"{name}.99999999.unfinished.json" for name in ("manifests/.train", ".train_log")]
    living = folder / f"manifests/.valid.{os.getppid()}.unfinished.json"
    for file in (*gone, living):
        file.write_text("{")
    assert start(path).optimizer_step == 4
    assert living.exists() and not any(file.exists() for file in gone)
    assert [p.name for p in folder.glob("checkpoints/*") if not (p / "CKPT.yaml").exists()] == []
    assert not list(folder.glob("*/.*.unfinished"))


@pytest.mark.slow
def test_a_checkpoint_goes_at_once(experiment, start, monkeypatch):
    """Killed while one is deleted, file by file, the run finds no half of it."""
    path = experiment(checkpoint_every_steps=1)

    def killed(place, **kwargs):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            start(path)
    left = [p.name.split("+")[0] for p in (path.parents[1] / "run/checkpoints").iterdir()]
    assert sorted(left) == ["CKPT", "unfinished"]
    assert_same_run(start(path), start(path, "whole"))


@pytest.mark.slow  # trainings
@pytest.mark.parametrize("after", ["log", "checkpoint"])
def test_killed_between_the_log_and_the_checkpoint_no_validation_is_lost(experiment, start, whole, monkeypatch, after):
    """Also where a checkpoint inside the epoch is of the same step."""
    keys = {"num_steps": 6, "accumulation": 4, "checkpoint_every_steps": 1}
    path, expected = experiment(**keys), whole(**keys).brain
    method = {"log": "_log_validation", "checkpoint": "_checkpoint"}[after]
    done = getattr(CaldBrain, method)

    def killed(brain, *args, **kwargs):
        done(brain, *args, **kwargs)
        if kwargs.get("end_of_epoch", after == "log"):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CaldBrain, method, killed)
        with pytest.raises(Killed):
            start(path)
    assert_same_run(start(path), expected)


def test_a_second_process_is_refused(experiment, start, tmp_path):
    code = (
        "import sys, time; from cald_speech.files import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as other:
        assert other.stdout.readline() == "held\n"
        told = rf"run is in use by another process \(process {other.pid} on {socket.gethostname()}\): wait for it"
        with pytest.raises(UserError, match=told):
            start(experiment(num_steps=1))
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"], "nothing is written"
        other.kill()
    assert start(experiment(num_steps=1)).optimizer_step == 1, "a lock ends with its process"
    assert not (tmp_path / "run/.lock").exists()


def test_full_disk_at_the_start(experiment, capsys, tmp_path):
    """Nothing of a manifest, of settings.yaml or of a log is half written; the same command goes on afterwards."""
    path = experiment()
    for num_bytes in (0, 100, 1_500):
        with no_file_grows_past(num_bytes):
            assert_matches(r"cannot write .*File too large.* make room", message(capsys, str(path)))
        for file in [*tmp_path.rglob("run/*.*"), *tmp_path.rglob("manifests/*.json")]:
            if file.suffix in (".json", ".yaml"):
                assert yaml.safe_load(file.read_text()), file
    train([str(path), "--noprogressbar"], prepare)
    assert (tmp_path / "run/model/model.safetensors").exists()


def test_an_output_folder_that_cannot_be(experiment, capsys, tmp_path):
    (tmp_path / "run").write_text("a file")
    assert_matches(r"cannot write .*/run.*: ", message(capsys, str(experiment())))


def test_half_a_line_in_the_log(experiment, start):
    path = experiment(checkpoint_every_steps=2)
    folder = start(path, "run", "--num_steps", "2").store.folder
    with open(folder / "train_log.jsonl", "a") as stream:
        stream.write('{"step": 2, "loss/ta')
    start(path)
    assert train_steps(folder) == [0, 1, 2, 3]


class Planted:
    """What a pickle of a stranger may be."""

    def __reduce__(self):
        return Path.touch, (Path("planted"),)


def test_no_file_of_a_checkpoint_runs_code(experiment, start, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = whole(num_steps=1).brain.store.folder
    (checkpoint,) = (source / "checkpoints").iterdir()
    for name in ("student.ckpt", "optimizer.ckpt", "progress.ckpt", "random_state.ckpt", "CKPT.yaml"):
        file = checkpoint / name
        folder = shutil.copytree(source, tmp_path / "run", dirs_exist_ok=True)
        place = folder / file.relative_to(source)
        torch.save(Planted(), place) if file.suffix == ".ckpt" else place.write_text(
            "!!python/object/apply:os.mkdir [planted]"
        )
        with pytest.raises(UserError, match="cannot resume"):
            start(experiment(num_steps=2))
        assert not Path("planted").exists()


FILES = ("student", "optimizer", "brain", "progress", "random_state", "epochs", "CKPT")
DAMAGED = [(name, damage) for name in FILES for damage in ("empty", "half", "rubbish", "missing")]
DAMAGED.remove(("CKPT", "missing"))  # not a checkpoint any more
DAMAGED.remove(("epochs", "half"))  # it holds one digit
# Two are read as others are, of which there is every damage: of these what a kill leaves.
SELDOM = [(name, damage) for name in ("optimizer", "random_state") for damage in ("empty", "rubbish")]
DAMAGED = [pytest.param(*case, marks=pytest.mark.wide if case in SELDOM else ()) for case in DAMAGED]


@pytest.mark.parametrize("name, damage", DAMAGED)
def test_damaged_checkpoint(experiment, start, whole, tmp_path, name, damage):
    folder = shutil.copytree(whole(num_steps=1).brain.store.folder, tmp_path / "run")
    (checkpoint,) = (folder / "checkpoints").iterdir()
    file = checkpoint / (f"{name}.yaml" if name == "CKPT" else f"{name}.ckpt")
    if damage == "missing":
        file.unlink()
    else:
        written = file.read_bytes()
        file.write_bytes({"empty": b"", "half": written[: len(written) // 2], "rubbish": b"\x80\x02: ["}[damage])
    with pytest.raises(UserError, match=r"cannot resume .*checkpoints.*Delete its folder"):
        start(experiment(num_steps=2))


def test_checkpoint_of_another_model(experiment, start, tmp_path):
    start(experiment(num_steps=1))
    wide = write_model(tmp_path / "wide", hidden_size=48)
    with pytest.raises(UserError, match=r"cannot resume .* the same model, layer map and number of processes"):
        start(experiment(num_steps=2, teacher=str(wide)), "run", "--go_on")


def test_checkpoint_of_another_layer_map(experiment, start):
    start(experiment(num_steps=1))
    with pytest.raises(UserError, match="cannot resume"):
        start(experiment(num_steps=2), "run", "--layer_map={overrides: {0: null}}", "--go_on")


# --- models that do not fit each other --------------------------------------------------------------------------------


class FromSource(Target):
    """A mode whose student does not start from the teacher it follows."""

    starts_from = "source"


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("family", {"family": "hubert"}),
        ("width", {"hidden_size": 48}),
        ("layers", {"layers": 3}),
        ("frame rate", {"conv_stride": (8, 8, 4)}),
    ],
    ids=["family", "width", "layers", "frame rate"],
)
def test_teacher_that_does_not_match(teachers, tmp_path, what, options):
    source = str(write_model(tmp_path / "source", **options))
    settings = Settings(str(tmp_path), teacher=str(teachers["layer"]), source=source, guidance=FromSource())
    with pytest.raises(UserError, match=f"do not match in their {what}: expected the same"):
        building.build_models(settings, tmp_path / "no manifest")


# --- experiments that cannot run: one paragraph on stderr, status 2 ---------------------------------------------------

BROKEN = {
    "no teacher": ({"teacher": None}, r"guidance target follows a teacher, and none is set: give --teacher"),
    "no model at all": ({"teacher": None, "guidance": "unguided"}, "no model to start from: give --source"),
    "no such teacher": ({"teacher": "nobody/nothing"}, r"'nobody/nothing'.*network"),
    "no such processor": ({"processor": "nobody/nothing"}, "'nobody/nothing'"),
    "unknown key": ({"num_step": 3}, "unknown key 'num_step'; did you mean 'num_steps'"),
    "unknown key, nothing near": ({"zzz": 3}, "unknown key 'zzz'; the known keys: accumulation"),
    "unknown guidance": ({"guidance": "trajectoire"}, "expected one of alignment, hybrid, .*'trajectoire'"),
    "switch past the end": ({"guidance": "hybrid", "switch_step": 4}, r"yaml: switch_step: expected between 1 and 3"),
    "no switch": ({"guidance": "hybrid"}, "yaml: switch_step: hybrid guidance needs a value.*Set the missing key"),
    "word for a weight": ({"alpha_layer": "much"}, "alpha_layer: expected a number, got 'much'"),
    "no guidance at all": ({"guidance": None}, "guidance: expected `!name:` with the class of a mode, got None"),
    "no loss at all": ({"loss": None}, "loss: expected one of speech, lm, nlp, got None"),
    "unknown start": ({"initialise": "magic"}, "initialise: expected one of attention, random, got 'magic'"),
    "layer weights": ({"layer_weights": [1.0, 2.0, 3.0]}, "error: layer_weights: expected 2 weights.*got 3"),
    "layer normalisation": ({"layer_normalise": "batch"}, "layer_normalise: expected one of none, layer_norm"),
    "layer reduction": ({"layer_reduce": "max"}, "layer_reduce: expected one of mean, sum, got 'max'"),
    "layer distance": ({"layer_distance": "far"}, "layer_distance: expected one of squared, cosine"),
    "unknown loss": ({"loss": "asr"}, "loss: expected one of speech, lm, nlp, got 'asr'"),
    "unknown normalisation": ({"normalisation": "mean"}, "normalisation: expected one of per_frame, reference"),
    "unknown mask": ({"teacher_mask": "teacher"}, "teacher_mask: expected one of none, student"),
    "nothing but alignment": ({"align_steps": 4}, "align_steps: expected between 0 and 3 .*`alignment` guidance"),
    "aligned, no teacher": (
        {"teacher": None, "source": "x", "guidance": "unguided", "align_steps": 2},
        "guidance unguided follows a teacher, and none is set",
    ),
    "fp16 on a CPU": ({"precision": "fp16"}, "precision: .*fp16.*bf16"),
    "unknown precision": ({"precision": "fp8"}, "precision: .*fp8"),
    "word for a number": ({"num_steps": "many"}, "num_steps: expected an integer.*'many'"),
    "fraction for a count": ({"accumulation": 1.5}, "accumulation: expected an integer.*1.5"),
    "no steps": ({"num_steps": 0}, "num_steps: expected at least 1, got 0"),
    "no accumulation": ({"accumulation": 0}, "accumulation: expected at least 1, got 0"),
    "no data": ({"data_folder": "nowhere"}, "no such folder.*make demo"),
    "no such split": ({"corpus": {"splits": {"train": ["x"], "valid": ["y"]}}}, "expected the split x"),
    "unknown corpus key": ({"corpus": {"split": {}}}, "corpus: .*'?splits?'?"),
    "no training set": ({"corpus": {"splits": {"valid": ["dev-clean"]}}}, "corpus: .*train"),
    "unknown normaliser": ({"normaliser": "upside-down"}, "'upside-down'"),
    "outside the vocabulary": ({"normaliser": "lower"}, r"utterance 1-7-\d+: .*outside the tokenizer's vocabulary"),
    "no base": ({"base": "nothing.yaml"}, "no experiment file .*nothing.yaml"),
}


def message(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        train([*argv, "--noprogressbar"] if argv else [], prepare)
    assert stopped.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors and errors.count("error: ") >= 1
    text = errors[errors.index("error: ") :].strip()
    assert "\n\n" not in text
    return text.replace("\n", " ")


@pytest.mark.parametrize("keys, expected", BROKEN.values(), ids=BROKEN)
def test_broken_experiment(experiment, capsys, keys, expected):
    path = experiment(**keys)
    assert_matches(expected, message(capsys, str(path)))


TEXTS = {
    "not yaml": ("output_folder: [", r"experiment\.yaml, line 1: expected yaml"),
    "empty": ("", "expected keys and values"),
    "no output folder": ("seed: 0", "expected an output_folder.*--output_folder"),
    "unknown class": ("output_folder: x\nlayer_map: !new:cald_speech.conversion.LayerCake", "LayerCake"),
    "unknown argument": ("output_folder: x\nlayer_map: !new:cald_speech.LayerMap {layers: 3}", "layers"),
    "option of a mode that is made": (
        "output_folder: x\nguidance: !new:cald_speech.distillation.Hybrid {switch_step: 3, layer: 15}",
        "unexpected keyword argument 'layer'.* It is called alpha_layer",
    ),
    "schedule": (
        "output_folder: x\nschedule: !new:cald_speech.training.schedules.WarmupSchedule {shape: zigzag}",
        "schedule.shape: expected one of constant.*'zigzag'",
    ),
}


@pytest.mark.parametrize("text, expected", TEXTS.values(), ids=TEXTS)
def test_broken_yaml(tmp_path, capsys, text, expected):
    path = tmp_path / "experiment.yaml"
    path.write_text(text)
    assert_matches(expected, message(capsys, str(path)))


LINES = {
    "nothing": ([], "expected an experiment file first"),
    "no file": (["nowhere.yaml"], "no experiment file nowhere.yaml"),
    "keys first": (["--seed", "1"], "expected an experiment file first"),
}


@pytest.mark.parametrize("argv, expected", LINES.values(), ids=LINES)
def test_broken_command_line(capsys, argv, expected):
    assert_matches(expected, message(capsys, *argv))


@pytest.mark.parametrize("recipe", [None, "libri"])
def test_no_such_recipe(experiment, recipe):
    with pytest.raises(UserError, match=f"recipe: expected one of align, .*librispeech, .*got {recipe!r}.*--recipe"):
        run([str(experiment(recipe=recipe))])


def test_layer_that_does_not_exist(experiment, capsys):
    text = message(capsys, str(experiment()), "--layer_map={overrides: {7: null}}")
    assert_matches(r"layer_map.overrides: expected layer indices from 0 to 1 .*got \[7\]", text)


def test_damaged_teacher(experiment, teachers, tmp_path, capsys):
    folder = shutil.copytree(teachers["layer"], tmp_path / "teacher")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert_matches("truncated or damaged", message(capsys, str(experiment(teacher=str(folder)))))


def test_a_fault_of_the_program_keeps_its_traceback(experiment, monkeypatch):
    monkeypatch.setattr(CaldBrain, "fit_batch", lambda brain, batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train([str(experiment()), "--noprogressbar"], prepare)


def assert_matches(expected: str, text: str) -> None:
    with pytest.raises(UserError, match=expected):
        raise UserError(text)
