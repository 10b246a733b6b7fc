"""Errors at each clip add up to the utterance's, and a difference over clips is the difference of the rates."""

import pytest

from cald_speech.recipes.digits import clip_bootstrap
from cald_speech.recipes.digits.digit_strings import DigitString
from cald_speech.tasks.wer import compare, score

REFERENCES = {"a": "ONE TWO SIX", "b": "SIX", "c": "TWO TWO ONE ONE"}
HYPOTHESES = {"a": "OH ONE SIX NINE", "b": "", "c": "TWO ONE SEVEN ONE FIVE"}
CLIPS = {"a": ("1_x_0", "2_x_0", "6_x_0"), "b": ("6_x_0",), "c": ("2_x_0", "2_x_1", "1_x_0", "1_x_1")}
STRINGS = {key: DigitString("x", clips, (), 0) for key, clips in CLIPS.items()}


def test_errors_of_words_add_up():
    result = score(REFERENCES, HYPOTHESES)
    for utterance in result.utterances:
        errors = clip_bootstrap.errors_of_words(utterance)
        assert len(errors) == utterance.words.count and sum(errors) == utterance.words.errors


def test_the_difference_is_that_of_the_rates():
    perfect, poor = score(REFERENCES, REFERENCES), score(REFERENCES, HYPOTHESES)
    difference, low, high = clip_bootstrap.compare_over_clips(poor, perfect, STRINGS)
    assert difference == pytest.approx(compare(poor, perfect)[0])
    assert 0 <= low <= difference <= high


def test_equal_models_have_no_difference():
    poor = score(REFERENCES, HYPOTHESES)
    assert clip_bootstrap.compare_over_clips(poor, poor, STRINGS) == (0, 0, 0)
