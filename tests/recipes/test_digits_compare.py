"""The grid: every cell is an experiment, stages come first, what has ended is not trained again, the table adds up."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from torch.utils.tensorboard import SummaryWriter

from cald_speech import recipes
from cald_speech.errors import UserError
from cald_speech.evaluation.report import write_report
from cald_speech.mixers import describe_factory
from cald_speech.recipes import grid as recipes_grid
from cald_speech.recipes import grid_figures, grid_table
from cald_speech.recipes.digits import compare, mixers
from cald_speech.recipes.grid import Grid, with_stages
from cald_speech.tasks.wer import score
from cald_speech.training.run import parse
from tests.training.miniature import ROOT

# A cell for each kind of keys: of every mode, of a start at random, of a stage, of what goes on
# from it, of other data and of another mixer.
FEW = ("unguided", "trajectory", "hybrid", "waypoint", "target, random", "alignment, all audio")
FEW += ("target, aligned on all audio", "target, no labels, all audio", "target, window of 16")
OTHERS = tuple(name for name in compare.make_cells(120) if name not in FEW)


@pytest.mark.slow
@pytest.mark.parametrize("names", [FEW, pytest.param(OTHERS, marks=pytest.mark.wide)], ids=len)
def test_every_cell_is_an_experiment(names, tmp_path):
    (tmp_path / "waypoints" / "step-0008000").mkdir(parents=True)
    cells = compare.make_cells(120)
    for name in names:
        cell = cells[name]
        words = ["--data_folder=x", *cell.arguments(seed=3)]
        words += [f"--waypoints={tmp_path / 'waypoints'}"] if name == "waypoint" else []
        settings, _ = parse([str(ROOT / "hparams" / "digits/grid.yaml"), *words])
        assert settings.seed == 3 and settings.num_steps == cell.steps, name
        assert type(settings.guidance).__name__.lower() == cell.keys["guidance"], name
        # Equal steps: what a student goes on from is counted in.
        before = 0 if cell.student is None else cells[cell.student].steps
        assert not cell.is_result or before + cell.steps == 120, name
        assert cell.needs_teacher == (name not in ("trajectory", "unguided from source")), name
        schedule = settings.schedule
        assert settings.guidance.align_steps + schedule.warmup_steps + schedule.decay_steps == cell.steps, name


def test_an_experiment_is_trained_with_each_mixer_and_seed(tmp_path, monkeypatch):
    trained = {}

    def train_one(grid, name, seed):
        words = ["--data_folder=x", *grid.cells[name].arguments(seed)]
        trained[name, seed] = parse([grid.experiment, *words])[0]

    monkeypatch.setattr(Grid, "train_one", train_one)
    words = [str(ROOT / "hparams" / "digits/cue.yaml"), "--steps=60", "--seed=0", "--seed=2", "--mixer=hydra"]
    result = CliRunner().invoke(mixers.main, [*words, "--mixer=window_16", f"--output_folder={tmp_path}"])
    assert not result.exception, result.output
    names = [(name, seed) for name in ("hydra", "window_16") for seed in (0, 2)]
    assert list(trained) == names
    assert json.loads(result.output) == [str(tmp_path / f"{name}-seed{seed}" / "model") for name, seed in names]
    for (name, seed), settings in trained.items():
        assert settings.seed == seed and settings.num_steps == 60 and settings.schedule.decay_steps == 40
        assert name.split("_")[0] in str(describe_factory(settings.layer_map.default)).lower()


def test_a_stage_comes_before_those_that_go_on_from_it(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(Grid, "train_one", lambda grid, name, seed: trained.append((name, seed)))
    grid = compare.make_cells(200)
    cells = with_stages(grid, ["target, aligned on all audio", "target"])
    assert list(cells) == ["target", "alignment, all audio", "target, aligned on all audio"]
    Grid("x.yaml", cells, (0, 1), tmp_path, tmp_path).train_all(jobs=3)
    assert len(trained) == 6
    for seed in (0, 1):
        assert trained.index(("alignment, all audio", seed)) < trained.index(("target, aligned on all audio", seed))
    trained.clear()
    Grid("x.yaml", cells, (0, 1), tmp_path, tmp_path, ["target, aligned on all audio"]).train_all(jobs=1)
    assert trained == [("target", 0), *((name, seed) for name in list(cells)[1:] for seed in (0, 1))]
    with pytest.raises(UserError, match=r"--repeat: expected cells of target, .*, got tarjet"):
        Grid("x.yaml", cells, (0, 1), tmp_path, tmp_path, ["tarjet"])
    assert with_stages(grid, ()) == grid
    with pytest.raises(UserError, match=r"--only: expected cells of unguided, target, .*, got tarjet"):
        with_stages(grid, ["tarjet"])


def test_what_has_ended_is_not_trained_again_and_what_fails_is_named(tmp_path, monkeypatch):
    commands = []

    class Failing:
        def __init__(self, words, **options):
            commands.append(words)
            self.pid = None

    monkeypatch.setattr(recipes.subprocess, "Popen", Failing)
    monkeypatch.setattr(recipes.os, "wait4", lambda *args: (0, 1, None))
    name, cells = "target, random", compare.make_cells(200)
    grid = Grid("hparams/digits/grid.yaml", cells, (2,), tmp_path, tmp_path)
    folder = grid.folder_of(name, 2)
    assert folder.name == "target-random-seed2"
    with pytest.raises(UserError, match=r"target-random-seed2 failed; see .*log\.txt"):
        grid.train_one(name, 2)
    assert "--initialise=random" in commands[0]
    (folder / "run.json").write_text("{}")  # which a training writes when it starts
    with pytest.raises(UserError, match="failed"):
        grid.train_one(name, 2)
    (folder / recipes.SPENT).write_text("{}")
    grid.train_one(name, 2)
    assert len(commands) == 2


def test_a_report_that_was_not_finished_is_made_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(recipes_grid, "evaluate_folder", lambda model, test, folder, **how: made.append(folder))
    grid = Grid("x.yaml", {"target": compare.make_cells(200)["target"]}, (0, 1), tmp_path, tmp_path)
    for seed, name in enumerate(("test.json", ".test.lock")):
        (tmp_path / f"target-seed{seed}" / "report").mkdir(parents=True)
        (tmp_path / f"target-seed{seed}" / "report" / name).touch()
    assert [student.seed for student in grid.evaluated(tmp_path)] == [0, 1]
    assert made == [tmp_path / "target-seed1" / "report"]


def test_the_table_and_the_figures(tmp_path, monkeypatch):
    references = {f"t{i}": "ONE TWO" for i in range(6)}

    class String:
        def __init__(self, number):
            self.clips = (f"1_x_{number % 2}", f"2_x_{number % 2}")

    strings = {key: String(i) for i, key in enumerate(references)}
    monkeypatch.setattr(compare, "test_strings", lambda: strings)
    about = {"manifest_hash": "0", "normaliser": "none", "model": "m", "decoder": "greedy", "split": "test"}
    write_report(tmp_path / "grid" / "teacher_report", score(references, references), **about)
    with SummaryWriter(str(tmp_path / "teacher" / "tensorboard")) as board:
        board.add_scalar("loss/task", 1.0, 0, walltime=100.0)
        board.add_scalar("loss/task", 0.5, 9, walltime=160.0)
    students = []
    for name, wrong in (("target", 1), ("unguided", 3)):
        for seed in (0, 1):
            folder = tmp_path / "grid" / f"{name}-seed{seed}"
            said = references | {f"t{i}": "ONE SIX" for i in range(wrong + seed)}
            write_report(folder / "report", score(references, said), **about)
            (folder / recipes.SPENT).write_text(json.dumps({"seconds": 10.0 + seed, "peak_gib": 1.0 + seed}))
            lines = [{"step": 9, "layer_distance/00": 0.5 * (name == "target")}, {"step": 9, "valid/WER": 20.0}]
            lines += [{"step": 19, "valid/WER": 10.0}]
            (folder / "train_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            students.append(grid_table.Student(name, seed, folder, None, 20))
    teachers, by_clip = {"teacher": tmp_path / "teacher"}, compare.errors_by_clip
    rows = grid_table.summarise(students, tmp_path / "grid", teachers, tmp_path, counts_of=by_clip)
    teacher, guided, unguided = rows
    assert teacher["WER %"] == 0 and teacher["minus teacher"] == 0
    assert guided["WER %"] == pytest.approx(np.mean([100 / 12, 200 / 12])) and guided["seeds"] == "8.33 16.67"
    assert guided["minus teacher"] == pytest.approx(guided["WER %"]) and guided["diff low"] <= guided["diff high"]
    assert unguided["spread"] == pytest.approx(100 / 12) and unguided["seconds"] == 10.5 and unguided["peak GiB"] == 2
    assert grid_figures.training_seconds(tmp_path / "teacher") == pytest.approx(60)
    for name in ("table.md", "wer.png", "distances.png"):
        assert (tmp_path / "grid" / name).stat().st_size > 0
