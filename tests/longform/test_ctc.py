"""Greedy decoding in chunks, and the grouping of tokens into words with times."""

from pathlib import Path

import pytest
import torch
from transformers import Wav2Vec2CTCTokenizer

from cald_speech.families import families
from cald_speech.families.lengths import frame_lengths
from cald_speech.longform.ctc import greedy
from cald_speech.longform.words import FrameTimes, Margins, TokenSpan, Vocabulary, words
from tests.helpers import tiny_model
from tests.longform.chunks import collapse, cut, noisy_speech

TOKENS = ("<pad>", "|", "A", "B", "C", "D")
VOCABULARY = Vocabulary(TOKENS, blank=0, delimiter=1)
TIMES = FrameTimes(stride=320, receptive_field=320)
OWN_FRAMES = Margins(0.0, 0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 500])
def test_chunks_do_not_matter(size):
    logits = noisy_speech(500)
    spans = list(greedy(cut(logits, size), 0))
    best = logits.argmax(-1)
    assert tuple(span.token for span in spans) == collapse(best.tolist())
    posteriors = logits.softmax(-1)
    covered = torch.zeros(len(logits), dtype=torch.long)
    for span in spans:
        frames = slice(span.first_frame, span.last_frame + 1)
        covered[frames] = span.token
        assert span.confidence == pytest.approx(posteriors[frames, span.token].mean().item(), rel=1e-5)
    assert torch.equal(covered, best)


def test_a_repeat_at_a_border_is_one_token_and_with_a_blank_two():
    logits = 20.0 * torch.nn.functional.one_hot(torch.tensor([2, 2, 2, 2, 0, 2, 3]), 6).float()
    chunks = [(0, logits[:2]), (2, logits[2:5]), (5, logits[5:])]
    assert [(s.token, s.first_frame, s.last_frame) for s in greedy(chunks, 0)] == [(2, 0, 3), (2, 5, 5), (3, 6, 6)]


def test_another_blank():
    logits = 20.0 * torch.nn.functional.one_hot(torch.tensor([5, 0, 5, 5]), 6).float()
    assert [s.token for s in greedy([(0, logits)], blank=5)] == [0]


def test_a_span_comes_as_soon_as_it_has_ended():
    logits = 20.0 * torch.nn.functional.one_hot(torch.tensor([2, 2, 3, 0]), 6).float()

    def chunks():
        yield from cut(logits, 3)
        pytest.fail("the first token was over long ago")

    assert next(greedy(chunks(), 0)).token == 2


@pytest.mark.parametrize("chunks", [[], [(0, torch.zeros(0, 4))], [(0, 9.0 * torch.eye(4)[:1].repeat(5, 1))]])
def test_nothing_said(chunks):
    assert list(greedy(chunks, 0)) == []


def test_an_empty_chunk_between_two_changes_nothing():
    logits = noisy_speech(20)
    chunks = [(0, logits[:9]), (9, logits[9:9]), (9, logits[9:])]
    assert list(greedy(chunks, 0)) == list(greedy([(0, logits)], 0))


@pytest.mark.parametrize("first", [5, 11])
def test_chunks_that_leave_out_or_repeat_frames_are_refused(first):
    with pytest.raises(ValueError, match="from frame 10 on"):
        list(greedy([(0, torch.zeros(10, 4)), (first, torch.zeros(10, 4))], 0))


def test_logits_that_are_not_finite_name_the_frame():
    logits = torch.zeros(10, 4)
    logits[7, 2] = torch.nan
    with pytest.raises(RuntimeError, match="frame 107 are not finite"):
        list(greedy([(0, torch.zeros(100, 4)), (100, logits)], 0))


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
