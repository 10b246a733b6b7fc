"""A short run of every generator: each case is used or refused, and none ends in a traceback or not at all."""

import random

import pytest

from tests.faults import LIMIT_S, generators, run
from tests.faults.folders import SPEECH, sound, use

CASES = 20  # of each, in each of two tests; `python -m tests.faults` runs them by the thousand


@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("name", generators())
def test_nothing_ends_in_a_traceback(name, part):
    outcomes = {}
    for seed in range(part * CASES, part * CASES + CASES):
        outcome, said = run(generators()[name], f"{name} {seed}")
        assert outcome in ("used", "refused"), f"{name}, seed {seed}: {outcome}\n{said}"
        outcomes[outcome] = said
    assert "refused" in outcomes, f"none of the cases of {name} is damaged"


def test_what_the_folders_are_damaged_from_is_sound():
    for name, folder in sound().items():
        use(folder, speech=name in SPEECH)


def test_faults_and_hangs_are_told_apart(monkeypatch):
    def fails(rng: random.Random, folder) -> None:
        raise KeyError("x")

    def hangs(rng: random.Random, folder) -> None:
        while True:
            pass

    assert run(fails, "0")[0] == "traceback"
    monkeypatch.setattr("tests.faults.LIMIT_S", 1)
    assert LIMIT_S > 1 and run(hangs, "0")[0] == "hang"
