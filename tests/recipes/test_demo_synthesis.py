"""The demo corpus: the same bytes each time, and a test set that training never heard."""

import hashlib
import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cald_speech.errors import UserError
from cald_speech.recipes.demo import synthesis
from cald_speech.recipes.demo.commands import COMMANDS, draw_command, vocabulary
from cald_speech.recipes.demo.corpus_plan import DEFAULT_SPLITS, draw_corpus
from cald_speech.recipes.demo.noise import babble, mix, pink, white
from cald_speech.recipes.demo.synthesis import MARKER, synthesise_corpus
from cald_speech.recipes.demo.voices import ACCENTS, DEV_VARIANTS, TEST_VARIANTS, TRAIN_VARIANTS, draw_speakers

needs_espeak = pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None, reason="espeakng-loader (the demo extra) is not installed"
)
TINY = tuple(replace(split, num_speakers=2, num_utterances=6) for split in DEFAULT_SPLITS)


def contents(corpus: Path) -> dict[str, str]:
    files = (path for path in sorted(corpus.rglob("*")) if path.is_file())
    return {str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def drawn():
    return draw_corpus(seed=0, splits=DEFAULT_SPLITS)


def test_test_and_dev_are_new_to_train(drawn):
    for name in ("test", "dev"):
        assert not {u.text for u in drawn[name]} & {u.text for u in drawn["train-few"]}
        assert not {u.speaker for u in drawn[name]} & {u.speaker for u in drawn["train-few"]}
        variants = [{u.voice.split("+")[1] for u in drawn[split]} for split in (name, "train-few")]
        assert not variants[0] & variants[1]


def test_test_set_is_large_enough(drawn):
    assert sum(len(u.text.split()) for u in drawn["test"]) >= 2_000
    assert len({u.speaker for u in drawn["test"]}) >= 10


def test_train_hears_every_word_often(drawn):
    counts = Counter(word for u in drawn["train-few"] for word in u.text.split())
    assert set(counts) == vocabulary()
    assert min(counts.values()) >= 4


def test_more_training_data_leaves_the_test_set_alone(drawn):
    larger = tuple(
        replace(split, num_utterances=2_000) if split.name == "train-few" else split for split in DEFAULT_SPLITS
    )
    assert draw_corpus(seed=0, splits=larger)["test"] == drawn["test"]
    assert draw_corpus(seed=1, splits=DEFAULT_SPLITS)["test"] != drawn["test"]


def test_commands():
    generator = np.random.default_rng(0)
    commands = [draw_command(generator) for _ in range(2_000)]
    assert {len(command.split()) for command in commands} <= set(range(3, 9))
    assert 60 <= len(vocabulary()) <= 100 and len(COMMANDS) > 10
    assert all(word.isalpha() and word.isupper() for word in vocabulary())


def test_speakers_have_voices_of_their_own():
    speakers = draw_speakers(DEV_VARIANTS, 20, 100, np.random.default_rng(0))
    assert len({speaker.voice for speaker in speakers}) == 20
    assert len({speaker.voice.split("+")[1] for speaker in speakers[: len(DEV_VARIANTS)]}) == len(DEV_VARIANTS)
    with pytest.raises(ValueError, match="need more"):
        draw_speakers(DEV_VARIANTS, len(DEV_VARIANTS) * len(ACCENTS) + 1, 100, np.random.default_rng(0))
    everybody = TRAIN_VARIANTS + DEV_VARIANTS + TEST_VARIANTS
    assert len(set(everybody)) == len(everybody)


def test_noise_has_the_level_asked_for():
    generator = np.random.default_rng(0)
    speech = np.sin(np.arange(16_000)).astype(np.float32)
    for noise in (white(16_000, generator), pink(16_000, generator), babble(16_000, [speech[:9_000]] * 3, generator)):
        assert noise.dtype == np.float32 and noise.std() == pytest.approx(1, abs=0.02)
        added = mix(speech, noise, 10.0) - speech
        assert 10 * np.log10(np.mean(speech**2) / np.mean(added**2)) == pytest.approx(10, abs=0.2)


@needs_espeak
def test_layout_and_determinism(tmp_path):
    first, second = (synthesise_corpus(tmp_path / name, seed=3, splits=TINY) for name in ("a", "b"))
    assert first == tmp_path / "a" / "LibriSpeech"
    assert contents(first) == contents(second)
    assert contents(first) != contents(synthesise_corpus(tmp_path / "c", seed=4, splits=TINY))
    chapter = first / "test" / "3001" / "1"
    lines = (chapter / "3001-1.trans.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["3001-1-0000", "3001-1-0001", "3001-1-0002"]
    for line in lines:
        samples, rate = soundfile.read(chapter / f"{line.split()[0]}.flac")
        assert rate == 16_000 and 0.8 < len(samples) / rate < 5
        assert 0.19 < np.abs(samples).max() < 0.91


@needs_espeak
def test_done_work_is_kept_and_unfinished_work_is_not(tmp_path, monkeypatch):
    corpus = synthesise_corpus(tmp_path, splits=TINY)
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert synthesise_corpus(tmp_path, splits=TINY) == corpus
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before

    def interrupt(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(synthesis, "_write_split", interrupt)
        with pytest.raises(KeyboardInterrupt):
            synthesise_corpus(tmp_path / "new", splits=TINY)
    assert not (tmp_path / "new" / "LibriSpeech").exists()
    assert contents(synthesise_corpus(tmp_path / "new", splits=TINY)) == contents(corpus)


@needs_espeak
def test_other_settings_replace_the_corpus(tmp_path):
    corpus = synthesise_corpus(tmp_path, splits=TINY)
    before = contents(corpus)
    assert contents(synthesise_corpus(tmp_path, seed=1, splits=TINY)) != before
    assert [path.name for path in tmp_path.iterdir()] == ["LibriSpeech"]


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "LibriSpeech" / "train-clean-100").mkdir(parents=True)
    with pytest.raises(UserError, match="not synthesised here"):
        synthesise_corpus(tmp_path, splits=TINY)
    assert (tmp_path / "LibriSpeech" / "train-clean-100").is_dir()
    assert not (tmp_path / "LibriSpeech" / MARKER).exists()


def test_missing_espeak_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"pip install 'cald-speech\[demo\]'"):
        synthesise_corpus(tmp_path, splits=TINY)
    assert not (tmp_path / "LibriSpeech").exists()
