"""The modes as tables: step -> weights, whether a teacher is needed, which weights the student starts from."""

from collections.abc import Callable, Iterable

import pytest

from cald_speech.distillation import (
    Alignment,
    Guidance,
    Hybrid,
    LossWeights,
    Target,
    Trajectory,
    Unguided,
    Waypoint,
    guidance,
)
from cald_speech.training.settings import Settings
from tests.training.miniature import ROOT

TASK, GUIDED = LossWeights(1.0, 0.0, 0.0), LossWeights(1.0, 15.0, 0.5)
LOGITS = LossWeights(1.0, 0.0, 0.5)
UNLABELLED = LossWeights(0.0, 15.0, 1.0)
ALIGNING = LossWeights(0.0, 0.0, 0.0, slot_alignment=1.0)
ALPHAS = {"alpha_layer": 15.0, "alpha_logits": 0.5}
# mode, weights of steps 0 to 4, needs a teacher, starts from
MODES = {
    "unguided": (Unguided(), [TASK] * 5, False, "source"),
    "unguided, aligned": (Unguided(align_steps=2), [ALIGNING] * 2 + [TASK] * 3, True, "source"),
    "alignment": (Alignment(), [ALIGNING] * 5, True, "teacher"),
    "target": (Target(**ALPHAS), [GUIDED] * 5, True, "teacher"),
    "target without labels": (Target(alpha_logits=1.0, alpha_task=0.0), [UNLABELLED] * 5, True, "teacher"),
    "trajectory": (Trajectory(teacher_update_every=2, **ALPHAS), [GUIDED] * 5, True, "source"),
    "waypoint": (Waypoint(waypoints="waypoints", **ALPHAS), [GUIDED] * 5, True, "source"),
    "hybrid": (Hybrid(switch_step=3, **ALPHAS), [GUIDED, GUIDED, GUIDED, TASK, TASK], True, "teacher"),
    "hybrid, logits kept": (
        Hybrid(switch_step=3, keep_logits=True, **ALPHAS),
        [GUIDED, GUIDED, GUIDED, LOGITS, LOGITS],
        True,
        "teacher",
    ),
    "hybrid, aligned": (
        Hybrid(switch_step=2, align_steps=1, **ALPHAS),
        [ALIGNING, GUIDED, GUIDED, TASK, TASK],
        True,
        "teacher",
    ),
}
FILES = sorted((ROOT / "hparams" / "guidance").glob("*.yaml"))


@pytest.mark.parametrize("mode, weights, needs_teacher, starts_from", MODES.values(), ids=MODES)
def test_table(mode, weights, needs_teacher, starts_from):
    assert [mode.weights(step) for step in range(5)] == weights
    assert [mode.weights(step).needs_teacher for step in range(5)] == [w != TASK for w in weights]
    assert [mode.weights(step).runs_student for step in range(5)] == [w != ALIGNING for w in weights]
    assert (mode.needs_teacher, mode.starts_from) == (needs_teacher, starts_from)
    assert [mode.trains_teacher_at(step) for step in range(5)] == [mode.trains_teacher and s % 2 == 0 for s in range(5)]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_file_is_its_mode(path, tmp_path):
    (tmp_path / "a.yaml").write_text(
        f"output_folder: x\nguidance: {path.stem}\nnum_steps: 5\nalpha_layer: 15.0\nalpha_logits: 0.5\nswitch_step: 3\n"
        f"teacher_update_every: 2\nwaypoints: {_waypoints(tmp_path, 5)}\n"
    )
    mode, weights, *_ = MODES[path.stem]
    loaded = Settings.load(tmp_path / "a.yaml").guidance
    assert type(loaded) is type(mode) and [loaded.weights(step) for step in range(5)] == weights
    assert all(len(line) <= 120 for line in path.read_text().splitlines())


def _waypoints(folder, *steps):
    for step in steps:
        (folder / "waypoints" / f"step-{step:07d}").mkdir(parents=True)
    return folder / "waypoints"


@pytest.mark.parametrize("name", ["unguided", "target", "hybrid"])
def test_a_teacher_that_stands_still(name):
    mode = MODES[name][0]
    mode.check(5)
    for step in range(5):
        mode.update(step, None)  # None has no weights to change
    assert not mode.trains_teacher


@pytest.fixture
def followed(monkeypatch) -> Callable[[Waypoint, Iterable[int]], dict[int, str]]:
    """Run a mode through steps -> at which the teacher changed, and to which checkpoint."""

    def run(mode: Waypoint, steps: Iterable[int]) -> dict[int, str]:
        changes = {}
        # The step stands for the teacher, who is only handed on.
        monkeypatch.setattr(guidance, "take_over", lambda teacher, folder: changes.update({teacher: folder.name[-2:]}))
        for step in steps:
            mode.update(step, step)
        return changes

    return run


def test_the_waypoint_ahead(tmp_path, followed):
    """The checkpoint followed is the first later than the teacher's step beside the student's, at last the last."""
    mode = Waypoint(waypoints=_waypoints(tmp_path, 10, 20, 30), teacher_steps=5)
    mode.check(8)
    assert followed(mode, range(8)) == {0: "10", 2: "20", 4: "30"}
    resumed = Waypoint(waypoints=mode.waypoints, teacher_steps=5)
    resumed.load_state_dict(mode.state_dict())
    assert followed(resumed, [3]) == {3: "20"}


@pytest.mark.parametrize(
    ("steps", "expected"),
    [((), "there are none"), ((10, 30), "one every 10 steps"), ((10, 20, 25), "one every 10 steps")],
    ids=["none", "one missing", "of two runs"],
)
def test_waypoints_that_are_missing_or_out_of_order(tmp_path, steps, expected):
    with pytest.raises(ValueError, match=f"^waypoints: .*{expected}"):
        Waypoint(waypoints=_waypoints(tmp_path, *steps) if steps else tmp_path).check(30)


@pytest.mark.parametrize(("teacher_steps", "num_steps"), [(0, 30), (-1.0, 30), (1.0, 5)])
def test_waypoints_that_the_run_never_passes(tmp_path, teacher_steps, num_steps):
    with pytest.raises(ValueError, match=r"^teacher_steps: "):
        Waypoint(waypoints=_waypoints(tmp_path, 10, 20), teacher_steps=teacher_steps).check(num_steps)


@pytest.mark.parametrize("update_every", [-1, 0, 6])
def test_a_trajectory_that_never_moves(update_every):
    with pytest.raises(ValueError, match=r"^teacher_update_every: expected between 1 and 5"):
        Trajectory(teacher_update_every=update_every).check(5)


def test_a_moving_teacher_stands_still_during_slot_alignment(tmp_path, followed):
    mode = Trajectory(teacher_update_every=2, align_steps=3)
    assert [mode.trains_teacher_at(step) for step in range(7)] == [False] * 3 + [True, False, True, False]
    mode = Waypoint(waypoints=_waypoints(tmp_path, 10, 20), teacher_steps=5, align_steps=4)
    assert followed(mode, range(8)) == {0: "10", 6: "20"}


@pytest.mark.parametrize("align_steps", [-1, 5, 6])
@pytest.mark.parametrize("mode", [Target, Unguided])
def test_slot_alignment_leaves_steps_for_the_mode(mode, align_steps):
    with pytest.raises(ValueError, match=r"^align_steps: expected between 0 and 4 .*`alignment` guidance"):
        mode(align_steps=align_steps).check(5)


def test_a_switch_is_counted_from_the_end_of_slot_alignment():
    with pytest.raises(ValueError, match=r"^switch_step: expected between 1 and 2 .*of which 2 align"):
        Hybrid(switch_step=3, align_steps=2).check(5)


@pytest.mark.parametrize("switch_step", [-1, 0, 5, 6])
def test_hybrid_needs_both_phases(switch_step):
    with pytest.raises(ValueError, match=r"^switch_step: expected between 1 and 4"):
        Hybrid(switch_step=switch_step).check(5)


@pytest.mark.parametrize("mode", [Target, Trajectory])
def test_some_loss_is_left(mode):
    with pytest.raises(ValueError, match=r"^alpha_task, alpha_layer, alpha_logits: expected one of them above 0"):
        mode(alpha_task=0.0, alpha_layer=0.0).check(5)


@pytest.mark.parametrize("layer", [0, 15])
@pytest.mark.parametrize("logits", [0, 1])
def test_needs_teacher(layer, logits):
    assert LossWeights(1, layer, logits).needs_teacher is bool(layer or logits)


@pytest.mark.parametrize("mode", [entry[0] for entry in MODES.values()], ids=MODES)
def test_state_survives_a_resume(mode):
    before = [mode.weights(step) for step in range(5)]
    mode.load_state_dict(mode.state_dict())
    assert [mode.weights(step) for step in range(5)] == before


def test_a_mode_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match="Guidance has no mode_weights"):
        Guidance().weights(0)
