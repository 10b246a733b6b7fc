"""A short run of every generator: each case is used or refused, and none ends in a traceback or not at all."""

import os
import random
from functools import partial

import pytest

from tests.data.corpora import FORMATS
from tests.faults import LIMIT_S, generators, kills, manifests, run
from tests.faults.folders import sound, use

CASES = 20  # of each, in each of two tests; `python -m tests.faults` runs them by the thousand
SLOWER = {"ops by triton": 6}
WHOLE_COMMANDS = dict.fromkeys(kills.GENERATORS, 2) | {"killed train": 1, "full disks": 4}


@pytest.mark.slow  # with its neighbour below some 20 s of generators
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("name", [name for name in generators() if name not in WHOLE_COMMANDS])
def test_nothing_ends_in_a_traceback(name, part):
    outcomes, cases = {}, SLOWER.get(name, CASES)
    for seed in range(part * cases, part * cases + cases):
        outcome, said = run(generators()[name], f"{name} {seed}")
        assert outcome in ("used", "refused"), f"{name}, seed {seed}: {outcome}\n{said}"
        outcomes[outcome] = said
    assert "refused" in outcomes, f"none of the cases of {name} is damaged"


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE_COMMANDS)
def test_killed_or_refused_and_called_again_it_ends_as_if_undisturbed(name):
    for seed in range(WHOLE_COMMANDS[name]):
        outcome, said = run(generators()[name], f"{name} {seed}")
        assert outcome == "used" or (outcome == "refused" and name == "full disks"), f"{name}, seed {seed}: {said}"


def in_place(folder) -> None:
    with (folder / "a").open("w") as file:
        print("half", file=file, flush=True)
        (folder / "b").touch()
        print("whole", file=file)


def under_a_name_of_its_own(folder) -> None:
    (folder / f".{os.getpid()}").write_text("whole")
    (folder / f".{os.getpid()}").rename(folder / "a")


def once_more(folder) -> None:
    with (folder / "a").open("a") as file:
        print("a line", file=file)
    (folder / "b").touch()


@pytest.mark.parametrize(
    ("command", "grows", "said"),
    [
        (in_place, (), "neither the old nor the new"),
        (under_a_name_of_its_own, (), "too much"),
        (once_more, "a", "differs"),
    ],
)
def test_what_no_kill_may_leave_is_found(command, grows, said, monkeypatch):
    kills.undisturbed.cache_clear()
    monkeypatch.setattr(kills, "jobs", lambda: {"command": kills.Job(command, grows=tuple(grows))})
    outcomes = (run(partial(kills.killed, ["command"]), str(seed)) for seed in range(20))
    assert any(outcome == "traceback" and said in what for outcome, what in outcomes)
    kills.undisturbed.cache_clear()


def test_what_the_folders_are_damaged_from_is_sound():
    for name, folder in sound().items():
        use(folder, name)


def test_every_format_of_corpora_is_damaged():
    assert {name for of in manifests.GENERATORS.values() for name in of.args[0]} == {*FORMATS, "STM", "rows"}


def test_faults_and_hangs_are_told_apart(monkeypatch):
    def fails(rng: random.Random, folder) -> None:
        raise KeyError("x")

    def hangs(rng: random.Random, folder) -> None:
        while True:
            pass

    assert run(fails, "0")[0] == "traceback"
    monkeypatch.setattr("tests.faults.LIMIT_S", 1)
    assert LIMIT_S > 1 and run(hangs, "0")[0] == "hang"
