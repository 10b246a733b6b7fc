"""SLU-F1 by hand: what a wrong filler, a lost entity and one too many count for."""

import numpy as np
import pytest

from cald_speech.recipes.slurp.entities import character_distance, confusion, slu_f1, word_distance

TRUE = [("date", "next monday"), ("time", "nine am")]


@pytest.mark.parametrize(
    ("found", "counts"),
    [
        (TRUE, (2, 0, 0)),
        ([], (0, 0, 2)),
        ([("date", "next sunday"), ("time", "nine am")], (2, 0.5, 0.5)),
        ([("date", "on next monday"), ("place", "here")], (1, 1.5, 1.5)),
        ([("date", "next monday"), ("date", "next monday")], (1, 1, 1)),
    ],
    ids=["all", "nothing", "a wrong word", "one too many, one lost", "twice"],
)
def test_words(found, counts):
    assert confusion(TRUE, found, word_distance).tolist() == pytest.approx(counts)


def test_the_nearest_of_a_type_is_taken():
    true = [("name", "anna"), ("name", "bob")]
    assert confusion(true, [("name", "bo"), ("name", "anna")], character_distance).tolist() == pytest.approx(
        (2, 1 / 3, 1 / 3)
    )


def test_both_counts_are_summed():
    pairs = {"a": (TRUE, [("date", "next sunday")]), "b": (TRUE, TRUE), "c": ([], [])}
    found = slu_f1(pairs)
    words, characters = (
        np.sum([confusion(*pair, distance) for pair in pairs.values()], axis=0)
        for distance in (word_distance, character_distance)
    )
    true, false, lost = words + characters
    assert found["SLU-F1 %"] == pytest.approx(100 * 2 * true / (2 * true + false + lost))
    assert found["word F1 %"] < found["SLU-F1 %"] < found["char F1 %"] < 100
    assert 0 <= found["low"] <= found["SLU-F1 %"] <= found["high"] <= 100
