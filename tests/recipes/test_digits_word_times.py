"""Word times against known ones: the extent of speech in a clip, the errors, the fit."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from cald_speech import LayerMap, convert
from cald_speech.data.text import make_processor
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.longform.recogniser import Recogniser
from cald_speech.longform.words import Margins, TokenSpan
from cald_speech.mixers import Bidirectional
from cald_speech.recipes.digits.digit_strings import WORDS
from cald_speech.recipes.digits.word_times import Measured, errors_s, fit, main, measure, speech_extent
from tests.helpers import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with random weights that could write digits."""
    torch.manual_seed(0)
    folder, family = tmp_path_factory.mktemp("model"), families()["wav2vec2"]
    processor = make_processor(folder, WORDS)
    model = tiny_model(family, vocab_size=len(processor.tokenizer))
    convert(model, LayerMap(Bidirectional))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def recogniser(folder):
    return Recogniser.of(folder)


@pytest.mark.parametrize(("level", "expected"), [(0.1, (1_600, 8_000)), (0.01, (3_200, 8_000))])
def test_speech_begins_where_it_is_no_more_than_30_db_below_the_loudest(level, expected):
    clip = 1e-4 * torch.randn(16_000)
    clip[1_600:3_200] += level
    clip[3_200:8_000] += 1.0
    assert speech_extent(clip) == expected


def word_of(recogniser, first_frame: int, last_frame: int) -> list[TokenSpan]:
    letter = recogniser.vocabulary.tokens.index("E")
    return [TokenSpan(letter, first_frame, first_frame, 1.0), TokenSpan(letter, last_frame, last_frame, 1.0)]


def test_errors_are_late_minus_true_and_the_fit_undoes_them(recogniser):
    gap = [TokenSpan(recogniser.vocabulary.delimiter, 60, 60, 1.0)]
    spans = [*word_of(recogniser, 10, 20), *gap, *word_of(recogniser, 100, 110)]
    # frame t begins at 20 t + 2.5 ms; the truth: words begin 30 ms later and end 70 ms later than their tokens
    true = np.array([[0.2325, 0.4925], [2.0325, 2.2925]])
    measured = [Measured(spans, {"clip": true + 1.0, "speech": true})]
    alone = errors_s(recogniser, measured, Margins(0.0, 0.0), "speech")
    np.testing.assert_allclose(alone, [[-0.03, -0.07]] * 2, atol=1e-9)
    np.testing.assert_allclose(errors_s(recogniser, measured, Margins(0.0, 0.0), "clip"), alone - 1.0, atol=1e-9)
    fitted = fit(recogniser, measured)
    assert fitted == Margins(lead_s=-0.03, tail_s=0.07)
    fitted_errors = errors_s(recogniser, measured, Margins(-0.02, 0.07), "speech")
    np.testing.assert_allclose(fitted_errors, [[-0.01, 0.0]] * 2, atol=1e-9)


def test_every_word_of_the_recordings_is_measured(recogniser, shared_data):
    options = {"num_words": 30, "words_each": 10, "pause_s": (0.1, 0.2)}
    measured = measure(recogniser, shared_data / "fsdd" / "recordings", range(2), **options)
    assert len(measured) == 3
    for recording in measured:
        clips, speech = recording.truths["clip"], recording.truths["speech"]
        assert clips.shape == speech.shape == (10, 2)
        pauses = clips[1:, 0] - clips[:-1, 1]
        assert (pauses >= 0.0999).all()
        assert (pauses <= 0.2001).all()
        assert (clips[:, 0] <= speech[:, 0]).all()
        assert (speech[:, 0] < speech[:, 1]).all()
        assert (speech[:, 1] <= clips[:, 1]).all()


def test_the_command_prints_a_row_for_each_choice_and_one_json_line(folder, shared_data):
    options = ["--data_folder", str(shared_data / "fsdd"), "--num_words", "20", "--words_each", "10"]
    done = CliRunner().invoke(main, [str(folder), *options], catch_exceptions=False)
    lines = done.stdout.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert [(row["margins"], row["truth"]) for row in rows] == [
        (margins, truth) for margins in ("tokens alone", "default", "fitted") for truth in ("clip", "speech")
    ]
    assert all(row["words"] == 20 and row["start ms"] >= abs(row["start late ms"]) - 1e-6 for row in rows)
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(rows)


def test_a_folder_without_clips_is_named(recogniser, tmp_path):
    with pytest.raises(UserError, match="Free Spoken Digit Dataset"):
        measure(recogniser, tmp_path, range(5), num_words=1, words_each=1, pause_s=(0.1, 0.2))
