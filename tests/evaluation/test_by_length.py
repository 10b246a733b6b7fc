"""WER by length and under stress: the recordings are what they are called, and perfect and deaf readers score so."""

import itertools
import json

import pytest
import torch

from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.errors import UserError
from cald_speech.evaluation import by_length
from cald_speech.evaluation.by_length import BURST_LEVEL, STRESS, STRESS_UTTERANCES
from tests.training.miniature import write_model

SPEAKERS = ("ann", "bob", "cy")


@pytest.fixture
def manifest(tmp_path):
    """Six utterances, each a constant level that names it."""
    entries = {}
    for n in range(6):
        path = tmp_path / f"{n}.flac"
        write_audio(path, torch.full((SAMPLE_RATE,), 0.3 + 0.1 * n))
        entries[f"u{n}"] = {"audio": str(path), "duration_s": 1.0, "speaker": SPEAKERS[n % 3]}
        entries[f"u{n}"]["text"] = "ABCDEF"[n]
    (tmp_path / "m.json").write_text(json.dumps(entries))
    return tmp_path / "m.json"


@pytest.fixture
def entries(manifest):
    return list(json.loads(manifest.read_text()).values())


def hear(samples):
    """A perfect reader of these utterances: one letter for each stretch at one of their levels."""
    levels = ((samples - 0.3) / 0.1).round().long().where(samples > 0.25, torch.tensor(-1))
    seconds = [int(part.mode().values) for part in levels.split(SAMPLE_RATE // 20)]
    heard, count = [], 0
    for level, group in itertools.groupby(seconds):
        count = len(list(group))
        heard += ["ABCDEF"[level]] * round(count / 20) if 0 <= level < 6 else []
    return " ".join(heard)


def test_perfect_and_deaf_readers(entries):
    for name, condition in by_length.conditions([1, 2, 4]).items():
        made = list(condition.make(entries, 3))
        perfect, deaf = by_length.evaluate_condition({"ear": hear, "deaf": lambda s: ""}, iter(made), "librispeech")
        minutes = sum(r.duration_s for r in made) / 60
        assert perfect["WER %"] == 0 or name == "stress: noise bursts", name
        assert deaf["WER %"] == 100 and deaf["words"] == perfect["words"]
        assert deaf["del/min"] == pytest.approx(deaf["words"] / minutes) and deaf["ins/min"] == 0


@pytest.mark.parametrize("name", STRESS)
def test_stress_recordings_come_again(entries, name):
    one, two = (list(STRESS[name].make(entries, 3)) for _ in range(2))
    assert len(one) == 3 and all(torch.equal(a.samples, b.samples) for a, b in zip(one, two, strict=True))
    assert all(len(r.text.split()) == STRESS_UTTERANCES for r in one)


def test_stress_is_what_it_is_called(entries):
    voice = {e["text"]: e["speaker"] for e in entries}
    spoken = {name: [r.text.split() for r in STRESS[name].make(entries, 3)] for name in STRESS}
    assert all(len({voice[w] for w in words}) == 1 for words in spoken["one speaker"])
    for words in spoken["speaker changes"]:
        assert all(voice[a] != voice[b] for a, b in itertools.pairwise(words))
    assert all(len(set(words)) == 1 for words in spoken["repetitions"])
    silences = next(STRESS["30 s silences"].make(entries, 1))
    assert silences.duration_s == pytest.approx(30 * (STRESS_UTTERANCES - 1) + STRESS_UTTERANCES, abs=0.1)
    bursts = next(STRESS["noise bursts"].make(entries, 1))
    for start in bursts.starts[1:]:
        pause = bursts.samples[start - int(2.4 * SAMPLE_RATE) : start]
        assert pause[: SAMPLE_RATE // 10].std() < 0.01 and pause[-SAMPLE_RATE // 5 :].std() < 0.01
        assert pause[-SAMPLE_RATE // 2 : -SAMPLE_RATE // 4].std() == pytest.approx(BURST_LEVEL, rel=0.1)


@pytest.mark.slow
def test_whole_and_long_form_read_alike(manifest, tmp_path):
    model = write_model(tmp_path / "model", letters="ABCDEF")
    options = {"joins": [1, 2], "utterances": 4, "readers": ["whole", "long-form", "chunks"], "progress": False}
    rows = by_length.evaluate_by_length([str(model)], manifest, **options)
    assert {row["condition"] for row in rows} == set(by_length.conditions([1, 2]))
    short = by_length.evaluate_by_length([str(model)], manifest, **options, only="x 2, pauses to 0.5 s")
    assert short == [row for row in rows if row["condition"] == "x 2, pauses to 0.5 s"]
    with pytest.raises(UserError, match=r"only: expected words of one of x 1, pauses .*, got 'pauses to 9 s'"):
        by_length.evaluate_by_length([str(model)], manifest, **options, only="pauses to 9 s")
    pairs = zip(*([row for row in rows if reader in row["model"]] for reader in ("whole", "long")), strict=True)
    assert all(a["WER %"] == b["WER %"] for a, b in pairs)
