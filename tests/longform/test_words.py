"""From token spans to words with times."""

from pathlib import Path

import pytest
import torch
from transformers import Wav2Vec2CTCTokenizer

from cald_speech.families import families
from cald_speech.families.lengths import frame_lengths
from cald_speech.longform.ctc import greedy
from cald_speech.longform.words import FrameTimes, Margins, TokenSpan, Vocabulary, words
from tests.helpers import tiny_model
from tests.longform.chunks import cut, noisy_speech

TOKENS = ("<pad>", "|", "A", "B", "C", "D")
VOCABULARY = Vocabulary(TOKENS, blank=0, delimiter=1)
TIMES = FrameTimes(stride=320, receptive_field=320)
OWN_FRAMES = Margins(0.0, 0.0)


def spans_of(frames: str) -> list[TokenSpan]:
    """One letter a frame; "_" is the blank."""
    tokens = torch.tensor([TOKENS.index("<pad>" if c == "_" else c) for c in frames])
    return list(greedy([(0, 20.0 * torch.nn.functional.one_hot(tokens, 6).float())], 0))


def test_words_are_what_the_tokenizer_decodes(tmp_path: Path):
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "|": 1, "A": 2, "B": 3, "C": 4, "D": 5}')
    for lower in (False, True):
        tokenizer = Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"), do_lower_case=lower)
        logits = noisy_speech(800)
        expected = tokenizer.decode(logits.argmax(-1).tolist())
        found = words(greedy(cut(logits, 37), 0), Vocabulary.of(tokenizer), TIMES)
        assert " ".join(word.text for word in found) == " ".join(expected.split())


def test_times_and_confidences_of_words():
    first, second = words(spans_of("__AA_B__||_C_"), VOCABULARY, TIMES, OWN_FRAMES)
    assert (first.text, first.start_s, first.end_s) == ("AB", pytest.approx(0.04), pytest.approx(0.12))
    assert [(c.text, round(c.start_s, 2), round(c.end_s, 2)) for c in first.characters] == [
        ("A", 0.04, 0.08),
        ("B", 0.1, 0.12),
    ]
    assert (second.text, second.start_s, second.end_s) == ("C", pytest.approx(0.22), pytest.approx(0.24))
    assert first.confidence == pytest.approx(sum(c.confidence for c in first.characters) / 2)


def test_margins_stop_at_the_delimiter_and_the_word_before():
    first, second, third = words(spans_of("__A__|B______|C"), VOCABULARY, TIMES, Margins(lead_s=0.05, tail_s=0.08))
    assert first.start_s == 0.0
    assert first.end_s == second.start_s == pytest.approx(0.1)
    assert second.end_s == pytest.approx(0.22)
    assert (third.start_s, third.end_s) == (pytest.approx(0.23), pytest.approx(0.38))


def test_no_margin_turns_a_word_around():
    late = Margins(lead_s=-5.0, tail_s=-5.0)
    assert all(word.start_s <= word.end_s for word in words(spans_of("_A_AB__|BBB|__C"), VOCABULARY, TIMES, late))


def test_a_word_comes_as_soon_as_its_delimiter_has():
    def spans():
        yield from spans_of("AB|")
        pytest.fail("the word was complete")

    assert next(words(spans(), VOCABULARY, TIMES)).text == "AB"


def test_delimiters_alone_are_no_words():
    assert list(words(spans_of("||_|__|"), VOCABULARY, TIMES)) == []


def test_frames_stand_about_the_centre_of_what_they_see():
    model = tiny_model(families()["hubert"])
    times = FrameTimes.of(model)
    samples = torch.tensor([times.receptive_field - 1, times.receptive_field])
    assert frame_lengths(samples, model.config).tolist() == [0, 1]
    assert (times.start_s(0) + times.end_s(0)) / 2 * 16_000 == pytest.approx(times.receptive_field / 2)
    assert times.start_s(50) - times.start_s(0) == pytest.approx(1.0)


def test_without_a_delimiter_every_character_is_a_word():
    """As soon as the next has come; a known text says how many make one of its words."""
    vocabulary = Vocabulary(("<pad>", *"今天好"), blank=0, delimiter=None)
    spans = [TokenSpan(token, frame, frame, 0.9) for token, frame in ((1, 3), (2, 6), (3, 90))]
    found = list(words(iter(spans), vocabulary, TIMES, OWN_FRAMES))
    assert [(word.text, word.joined) for word in found] == [("今", True), ("天", True), ("好", True)]
    assert found[0].end_s <= found[1].start_s
    found = list(words(iter(spans), vocabulary, TIMES, OWN_FRAMES, sizes=[2, 1]))
    assert [(word.text, word.joined) for word in found] == [("今天", False), ("好", False)]


def test_a_letter_after_a_long_pause_is_text_and_not_time():
    spans = [TokenSpan(t, f, f, 0.9) for t, f in zip((2, 3, 4), (127, 129, 131), strict=True)]
    (word,) = words([*spans, TokenSpan(5, 630, 630, 0.05), TokenSpan(1, 632, 633, 0.9)], VOCABULARY, TIMES)
    assert (word.text, len(word.characters)) == ("ABCD", 4)
    assert word.end_s - word.start_s < 0.3
