"""Counts against examples made by hand, and what a bootstrap must satisfy."""

import jiwer
import numpy as np
import pytest

from cald_speech.tasks.bootstrap import bootstrap_interval, paired_bootstrap
from cald_speech.tasks.wer import Score, compare, score


def test_counts_and_alignment_by_hand():
    result = score({"u": "the cat sat on the big mat"}, {"u": "the cap sat the big mat today"})
    assert result.words == Score(hits=5, substitutions=1, insertions=1, deletions=1)
    assert result.words.rate == pytest.approx(300 / 7)
    assert result.utterances[0].alignment == [
        ["=", "the", "the"],
        ["S", "cat", "cap"],
        ["=", "sat", "sat"],
        ["D", "on", None],
        ["=", "the", "the"],
        ["=", "big", "big"],
        ["=", "mat", "mat"],
        ["I", None, "today"],
    ]


def test_characters_by_hand():
    # t for p; a space is a character
    assert score({"u": "a cat"}, {"u": "a  cap"}).characters == Score(hits=4, substitutions=1)


def test_runs_of_errors_of_one_kind_are_listed_word_by_word():
    utterances = score({"a": "x y", "b": "", "c": "x y"}, {"a": "p q", "b": "x y", "c": ""}).utterances
    assert [utterance.alignment for utterance in utterances] == [
        [["S", "x", "p"], ["S", "y", "q"]],
        [["I", None, "x"], ["I", None, "y"]],
        [["D", "x", None], ["D", "y", None]],
    ]


def test_empty_reference_counts_insertions_and_has_no_rate():
    result = score({"a": "", "b": "one two"}, {"a": "uh", "b": "one two"})
    assert result.utterances[0].words == Score(insertions=1)
    assert result.utterances[0].words.rate is None
    assert result.words.rate == 50.0
    silence = score({"a": ""}, {"a": ""})
    assert silence.words.rate is None and silence.characters.rate is None and silence.interval() is None


def test_empty_hypothesis_is_all_deletions():
    result = score({"a": "one two"}, {"a": ""})
    assert result.words == Score(deletions=2)
    assert result.words.rate == 100.0


def test_corpus_is_the_sum_of_its_utterances_and_jiwer_agrees():
    references = {"b": "one two three", "a": "four", "c": "five six"}
    hypotheses = {"c": "five", "a": "for four", "b": "one too three"}
    result = score(references, hypotheses, durations_s={"a": 1.0, "b": 2.0, "c": 3.0})
    assert [(utterance.id, utterance.duration_s) for utterance in result.utterances] == [("a", 1), ("b", 2), ("c", 3)]
    order = sorted(references)
    rate = jiwer.wer([references[key] for key in order], [hypotheses[key] for key in order])
    assert result.words.rate == pytest.approx(100 * rate)
    assert result.word_errors.tolist() == [1, 1, 1] and result.word_counts.tolist() == [1, 3, 2]


@pytest.mark.parametrize("hypotheses", [{"a": "one"}, {"a": "one", "b": "two", "c": "three"}], ids=["missing", "extra"])
def test_missing_or_extra_hypothesis_is_an_error(hypotheses):
    with pytest.raises(ValueError, match=r"1 missing|1 extra"):
        score({"a": "one", "b": "two"}, hypotheses)


def corpus(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 30, size)
    return generator.binomial(counts, 0.1), counts


def test_interval_contains_the_rate_and_shrinks():
    widths = []
    for size in (50, 500, 5000):
        errors, counts = corpus(size)
        low, high = bootstrap_interval(errors, counts, resamples=2000)
        assert low < 100 * errors.sum() / counts.sum() < high
        widths.append(high - low)
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_interval_covers_the_truth_at_its_level():
    intervals = [bootstrap_interval(*corpus(200, seed), level=0.8, resamples=500) for seed in range(200)]
    assert 0.7 < np.mean([low <= 10.0 <= high for low, high in intervals]) < 0.9


def test_interval_is_the_same_again_and_does_not_depend_on_chunks(monkeypatch):
    errors, counts = corpus(100)
    expected = bootstrap_interval(errors, counts, resamples=1000)
    assert bootstrap_interval(errors, counts, resamples=1000) == expected
    assert bootstrap_interval(errors, counts, resamples=1000, seed=1) != expected
    monkeypatch.setattr("cald_speech.tasks.bootstrap._DRAWS_AT_ONCE", 300)
    assert bootstrap_interval(errors, counts, resamples=1000) == expected


def test_groups_are_drawn_whole():
    # Utterances of a speaker are copies of one another: only the speakers are independent.
    errors, counts = corpus(40)
    copies = np.repeat(errors, 5), np.repeat(counts, 5)
    speakers = [f"speaker {place}" for place in np.repeat(np.arange(40), 5)]
    expected = bootstrap_interval(errors, counts)
    assert bootstrap_interval(*copies, groups=speakers) == expected
    narrow = bootstrap_interval(*copies)
    assert narrow[1] - narrow[0] < 0.6 * (expected[1] - expected[0])


def test_paired_bootstrap():
    errors, counts = corpus(300)
    assert paired_bootstrap(errors, errors, counts) == (0.0, 0.0, 0.0)
    # one error more in every tenth utterance: the difference is sure although both rates are wide
    worse = errors + (np.arange(300) % 10 == 0)
    difference, low, high = paired_bootstrap(worse, errors, counts)
    assert difference == pytest.approx(100 * 30 / counts.sum())
    assert 0 < low < difference < high
    assert paired_bootstrap(errors, worse, counts)[0] == -difference


@pytest.mark.parametrize(
    "arguments",
    [([1], [10]), ([0, 0], [0, 0]), ([1, 2], [10]), ([1, 2], [9, 9], ["one"])],
    ids=["one utterance", "no words", "unequal", "groups"],
)
def test_no_interval_without_the_means(arguments):
    errors, counts, *groups = arguments
    with pytest.raises(ValueError):
        bootstrap_interval(errors, counts, groups=groups[0] if groups else None)


def test_compare_wants_the_same_references():
    a = score({"a": "one two", "b": "three"}, {"a": "one", "b": "three"})
    assert compare(a, a, resamples=100) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="same references"):
        compare(a, score({"a": "one two", "b": "tree"}, {"a": "one", "b": "three"}))
    with pytest.raises(ValueError, match="same utterances"):
        compare(a, score({"a": "one two"}, {"a": "one"}))
