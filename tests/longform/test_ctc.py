"""CTC decoding in chunks: greedy, and prefix beam search against the sum over all paths, one by one."""

from itertools import product
from math import exp

import pytest
import torch

from cald_speech.errors import UserError
from cald_speech.longform import ctc
from cald_speech.longform.ctc import beam_search, greedy
from tests.longform.chunks import collapse, cut, noisy_speech

EVERYTHING = {"beam_width": 10_000, "token_prune_logp": -torch.inf, "beam_prune_logp": -torch.inf}

# --- greedy ----------------------------------------------------------------------------------------------------------


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


# --- prefix beam search ----------------------------------------------------------------------------------------------


def exhaustive(log_probs: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The text with the largest sum over all V^T paths, and its best single path."""
    masses, best = {}, {}
    rows = log_probs.tolist()
    for path in product(range(log_probs.size(1)), repeat=len(rows)):
        score = sum(row[token] for row, token in zip(rows, path, strict=True))
        text = collapse(path)
        masses[text] = masses.get(text, 0.0) + exp(score)
        if text not in best or score > best[text][0]:
            best[text] = (score, path)
    text = max(masses, key=masses.get)
    return text, best[text][1]


@pytest.mark.parametrize("seed", range(12))
def test_the_most_probable_text_and_its_best_path(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(6 + seed % 2, 3, generator=generator)
    text, path = exhaustive(logits.log_softmax(-1))
    spans = list(beam_search([(0, logits)], 0, **EVERYTHING))
    assert tuple(span.token for span in spans) == text
    frames = [0] * len(logits)
    for span in spans:
        frames[span.first_frame : span.last_frame + 1] = [span.token] * (span.last_frame - span.first_frame + 1)
    assert tuple(frames) == path
    posteriors = logits.softmax(-1)
    for span in spans:
        expected = posteriors[span.first_frame : span.last_frame + 1, span.token].mean().item()
        assert span.confidence == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("size", [1, 7, 50, 64, 399])
@pytest.mark.parametrize("memory_frames", [20, 500])
def test_chunks_do_not_matter_to_the_beam(size, memory_frames):
    logits = noisy_speech(400)
    options = {"beam_width": 8, "memory_frames": memory_frames}
    whole = list(beam_search([(0, logits)], 0, **options))
    assert len(whole) > 50
    assert list(beam_search(cut(logits, size), 0, **options)) == whole


def test_settling_early_changes_nothing_on_ordinary_logits():
    logits = noisy_speech(600)
    settled = list(beam_search([(0, logits)], 0, memory_frames=50))
    assert settled == list(beam_search([(0, logits)], 0, memory_frames=10**6))


def test_without_pruning_the_default_pruning_finds_the_same():
    logits = noisy_speech(300)
    pruned = list(beam_search([(0, logits)], 0))
    assert pruned == list(beam_search([(0, logits)], 0, beam_width=200, token_prune_logp=-20.0, beam_prune_logp=-40.0))


def test_equals_greedy_on_peaked_logits():
    logits = 30.0 * torch.nn.functional.one_hot(torch.tensor([1, 1, 0, 1, 2, 2, 3, 0, 0, 3]), 4).float()
    spans = list(beam_search(cut(logits, 3), 0))
    assert [(s.token, s.first_frame, s.last_frame) for s in spans] == [
        (s.token, s.first_frame, s.last_frame) for s in greedy(cut(logits, 3), 0)
    ]


def test_a_tie_far_back_is_settled_and_given_out(monkeypatch):
    # the first token is 1 or 2 with all but the same probability, and nothing later can decide it
    logits = noisy_speech(1_000)
    logits[0] = torch.tensor([0.001, 0.5, 0.49, *[1e-6] * (logits.size(1) - 3)]).log()
    logits[1] = 20.0 * torch.nn.functional.one_hot(torch.tensor(0), logits.size(1))
    longest = []
    prune = ctc._prune
    monkeypatch.setattr(ctc, "_prune", lambda beams, *a: longest.append(max(map(len, beams))) or prune(beams, *a))
    read = 0

    def chunks():
        nonlocal read
        for first, part in cut(logits, 10):
            read = first + len(part)
            yield first, part

    spans = beam_search(chunks(), 0, memory_frames=100)
    first = next(spans)
    assert (first.token, first.first_frame) == (1, 0)
    assert read <= 160
    rest = list(spans)
    assert len(rest) > 150
    assert max(longest) < 100, "pending tokens pile up"


def test_a_token_that_goes_on_over_a_settlement_is_one_token():
    frames = torch.tensor([1] * 70 + [0] * 5 + [2] * 130)
    logits = 30.0 * torch.nn.functional.one_hot(frames, 3).float()
    spans = list(beam_search(cut(logits, 11), 0, memory_frames=1))
    assert [(s.token, s.first_frame, s.last_frame) for s in spans] == [(1, 0, 69), (2, 75, 204)]


def test_no_frames_is_no_text():
    assert list(beam_search([], 0)) == []


def test_a_beam_of_nothing_is_refused():
    with pytest.raises(UserError, match="at least 1 prefix"):
        list(beam_search([], 0, beam_width=0))
