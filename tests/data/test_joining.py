"""Joining utterances: nothing is lost, the same batch is always joined in the same way, a run resumes to the bit."""

import pytest
import torch

from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.data.joining import Joiner, recordings
from cald_speech.data.text import make_processor

DURATIONS_S = (0.5, 0.8, 1.1, 0.4, 0.7)


@pytest.fixture
def processor(tmp_path):
    return make_processor(tmp_path, ["AB C"])


@pytest.fixture
def items(processor):
    g = torch.Generator().manual_seed(0)
    make = lambda n, s: {  # noqa: E731
        "id": f"u{n}",
        "wav": torch.randn(int(s * SAMPLE_RATE), generator=g),
        "labels": torch.tensor(processor.tokenizer("ABC"[n % 3]).input_ids),
        "text": "ABC"[n % 3],
        "duration_s": s,
    }
    return [make(n, s) for n, s in enumerate(DURATIONS_S)]


def test_every_utterance_is_in_one_of_them(items, processor):
    for seed in range(20):
        joined = Joiner(3, 0.5, processor)(items, seed)
        assert "+".join(item["id"] for item in joined) == "+".join(item["id"] for item in items)
        assert all(item["id"].count("+") < 3 for item in joined)
        for item in joined:
            assert processor.tokenizer.decode(item["labels"], group_tokens=False) == item["text"]
            assert item["text"].split() == ["ABC"[int(i[1:]) % 3] for i in item["id"].split("+")]
            pauses_s = item["duration_s"] - sum(DURATIONS_S[int(i[1:])] for i in item["id"].split("+"))
            assert -1e-3 <= pauses_s <= 0.5 * item["id"].count("+")


def test_the_batch_alone_says_what_is_joined(items, processor):
    joiner = Joiner(3, 0.5, processor)
    torch.manual_seed(1)
    first = joiner(items, 5)
    torch.manual_seed(2)
    assert all(torch.equal(a["wav"], b["wav"]) for a, b in zip(first, joiner(items, 5), strict=True))
    assert {tuple(i["id"] for i in joiner(items, seed)) for seed in range(9)} != {tuple(i["id"] for i in first)}


def test_joined_audio_is_normalised_as_one(items, processor):
    whole = Joiner(len(items), 0.5, processor)(items, seed=1)
    assert any("+" in item["id"] for item in whole)
    for item in whole:
        if "+" in item["id"]:
            assert item["wav"].mean().abs() < 1e-5 and (item["wav"].var(correction=0) - 1).abs() < 1e-4


@pytest.fixture
def entries(tmp_path):
    paths = [tmp_path / f"{n}.flac" for n in range(len(DURATIONS_S))]
    for path, s in zip(paths, DURATIONS_S, strict=True):
        write_audio(path, torch.full((int(s * SAMPLE_RATE),), 0.5))
    return [{"audio": path, "text": f"W{n}"} for n, path in enumerate(paths)]


def test_recordings_hold_what_they_say(entries):
    made = list(recordings(entries, 3, (0.5, 2.0), count=4, seed=3))
    assert len(made) == 4 and {w for r in made for w in r.text.split()} == {e["text"] for e in entries}
    for recording in made:
        words = [int(word[1:]) for word in recording.text.split()]
        assert len(words) == len(recording.starts) == 3
        speech = sum(DURATIONS_S[w] for w in words)
        assert speech + 1.0 <= recording.duration_s <= speech + 4.0
        for start, word in zip(recording.starts, words, strict=True):
            stop = start + int(DURATIONS_S[word] * SAMPLE_RATE)
            assert recording.samples[start:stop].min() > 0.4
            assert start == 0 or recording.samples[start - 100 : start].abs().max() < 0.1
    again = list(recordings(entries, 3, (0.5, 2.0), count=4, seed=3))
    assert all(torch.equal(a.samples, b.samples) for a, b in zip(made, again, strict=True))


def test_recordings_of_segments(entries, tmp_path):
    write_audio(tmp_path / "long.flac", torch.cat([torch.full((8_000,), level) for level in (0.1, 0.5, 0.1)]))
    segments = [{"audio": tmp_path / "long.flac", "start_s": 0.5, "duration_s": 0.5, "text": "W"}] * 2
    recording = next(iter(recordings(segments, 2, (0.0, 0.0), count=1)))
    assert recording.duration_s == 1.0 and recording.samples.min() > 0.4


def test_silence_is_never_digital(entries):
    recording = next(iter(recordings(entries, 2, (1.0, 1.0), count=1)))
    assert (recording.samples == 0).float().mean() < 0.01
