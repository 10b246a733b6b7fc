"""Differences between two models with an interval over clips: strings share clips, so strings are not independent."""

from collections.abc import Mapping

from cald_speech.recipes.digits.digit_strings import DigitString
from cald_speech.tasks.bootstrap import paired_bootstrap
from cald_speech.tasks.wer import EvaluationResult, Utterance


def compare_over_clips(
    a: EvaluationResult, b: EvaluationResult, strings: Mapping[str, DigitString]
) -> tuple[float, float, float]:
    """(difference, low, high) in points of WER, a minus b, by a paired bootstrap that draws clips.

    Every reference word is a clip; its errors are its own substitution or deletion and the words inserted after it
    (before it, for the first of a string).
    """
    errors_a, errors_b, clips = [], [], []
    for left, right in zip(a.utterances, b.utterances, strict=True):
        errors_a += errors_of_words(left)
        errors_b += errors_of_words(right)
        clips += strings[left.id].clips
    return paired_bootstrap(errors_a, errors_b, [1] * len(clips), groups=clips)


def errors_of_words(utterance: Utterance) -> list[int]:
    """The errors at each reference word; they add up to the utterance's.

    Example
    -------
    >>> from cald_speech.tasks.wer import score
    >>> errors_of_words(score({"a": "ONE TWO SIX"}, {"a": "OH ONE SIX NINE"}).utterances[0])
    [1, 1, 1]
    """
    errors, early = [], 0
    for sign, reference, _ in utterance.alignment:
        if reference is not None:
            errors.append(int(sign != "="))
        elif errors:
            errors[-1] += 1
        else:
            early += 1
    errors[0] += early
    return errors
