"""From audio to words, by function: tiny random models, real speech where there is some."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2Processor

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.families.hub import load_processor
from cald_speech.longform import AudioSource, align_text, transcribe
from cald_speech.longform.recogniser import Recogniser
from cald_speech.mixers import Bidirectional, Mamba2
from tests.helpers import tiny_model
from tests.longform.recognisers import save, talkative, whole_text


@pytest.mark.parametrize("chunk_s", [0.3, 10.0])
def test_the_text_is_that_of_the_whole(model, talk, chunk_s):
    samples = torch.from_numpy(soundfile.read(talk, dtype="float32")[0])
    words = list(transcribe(model, talk, chunk_s=chunk_s))
    text = " ".join(word.text for word in words)
    assert text == whole_text(model, samples)
    assert len(words) > 5, "the model says too little for this test"
    assert list(transcribe(model, samples, chunk_s=chunk_s)) == words
    assert list(transcribe(model, AudioSource.open(talk), chunk_s=chunk_s)) == words


def test_words_are_in_order_within_the_audio(model, talk):
    words = list(transcribe(model, talk))
    times = [moment for word in words for moment in (word.start_s, word.end_s)]
    assert times == sorted(times)
    assert times[0] >= 0.0
    assert times[-1] <= 12.0
    assert all(0.0 < word.confidence <= 1.0 for word in words)


def test_beam_search_and_its_width_are_passed_on(model, talk):
    words = list(transcribe(model, talk, decoding="beam", beam_width=4))
    assert [w.text for w in words][:1]
    with pytest.raises(UserError, match="one of greedy, beam, got 'best'"):
        transcribe(model, talk, decoding="best")
    with pytest.raises(UserError, match="at least 1 prefix"):
        list(transcribe(model, talk, decoding="beam", beam_width=0))


def test_progress_reaches_the_end(model, talk):
    fractions = []
    list(transcribe(model, talk, progress=fractions.append))
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)


def test_what_was_transcribed_aligns_where_it_was_heard(model, talk):
    heard = list(transcribe(model, talk))
    text = "  ".join(word.text.lower() for word in heard)
    aligned = list(align_text(model, talk, text))
    assert [word.text for word in aligned] == text.split()
    assert [word.start_s for word in aligned] == pytest.approx([word.start_s for word in heard], abs=0.1)


def test_words_nobody_can_align_are_left_out_with_a_warning(model, talk):
    with pytest.warns(UserWarning, match="1 words have no letter"):
        assert [w.text for w in align_text(model, talk, "one 2 Three", unknown="drop")] == ["one", "Three"]


def test_a_model_of_attention_alone_has_to_be_forced(kept, talk):
    with pytest.raises(UserError, match=r"memory and time will grow with the square.*--force"):
        transcribe(kept, talk)
    list(transcribe(kept, talk, force=True))


@pytest.mark.parametrize("seconds", [0.0, 0.02, 1.0], ids=["empty", "too short for a frame", "silence"])
def test_no_speech_is_no_words_and_a_warning(tmp_path, seconds):
    family = families()["wav2vec2"]
    silent = tiny_model(family)
    convert(silent, LayerMap(Bidirectional))
    silent.lm_head.bias.data[0] = 1e4
    processor = Wav2Vec2Processor.from_pretrained(save(tmp_path, silent))
    with pytest.warns(UserWarning, match="no speech was found"):
        assert list(transcribe(silent, torch.zeros(int(seconds * 16_000)), processor=processor)) == []


def test_a_model_from_nowhere_needs_a_processor():
    with pytest.raises(UserError, match="came from no folder"):
        transcribe(talkative(), torch.zeros(16_000))


def test_a_processor_of_another_model_is_refused(model, talk):
    processor = Wav2Vec2Processor.from_pretrained(model)
    wide = tiny_model(families()["wav2vec2"], vocab_size=99)
    with pytest.raises(UserError, match="99 outputs, but the tokenizer 32 tokens"):
        transcribe(wide, talk, processor=processor, force=True)


def test_a_model_without_its_head_says_nothing(model, talk, tmp_path):
    """transformers gives it a head of random weights, which says much."""
    save(tmp_path, from_pretrained(model).base_model)
    with pytest.raises(UserError, match=r"trained for this, a CaldWav2Vec2ForCTC, got one without its head \(lm_head"):
        Recogniser.of(str(tmp_path))
    assert from_pretrained(tmp_path).lm_head.weight.numel()


def test_a_causal_student_gives_words_live(tmp_path):
    torch.manual_seed(0)
    recogniser = Recogniser.of(save(tmp_path, talkative(Mamba2)))
    audio = torch.randn(10 * 16_000)
    asked = 0

    def microphone():
        nonlocal asked
        for chunk in audio.split(8_000):
            asked += 1
            yield chunk

    words = recogniser.live(microphone())
    first = next(words)
    assert asked < 20, "no word before the end"
    text = " ".join([first.text, *(word.text for word in words)])
    assert len(text.split()) > 10


def test_real_speech_of_any_rate(model, shared_data, tmp_path):
    clip = shared_data / "fsdd" / "recordings" / "3_george_0.flac"
    samples, rate = soundfile.read(clip)
    assert rate == 8_000
    soundfile.write(tmp_path / "stereo.wav", np.stack([samples, samples], axis=1), rate, subtype="FLOAT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(transcribe(model, tmp_path / "stereo.wav")) == list(transcribe(model, clip))


def test_a_processor_of_another_rate_is_refused(model):
    folder = Path(model)
    processor = load_processor(folder)
    processor.feature_extractor.sampling_rate = 8_000
    with pytest.raises(UserError, match="expected a processor for 16000 Hz, got one for 8000 Hz"):
        Recogniser.of(str(folder), processor)


def test_a_processor_with_a_language_model_serves_without_it(model, tmp_path):
    """Its class needs packages that greedy decoding does not."""
    folder = tmp_path / "with_lm"
    shutil.copytree(model, folder)
    (folder / "processor_config.json").unlink()
    options = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "processor_class": "Wav2Vec2ProcessorWithLM"}
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    assert load_processor(folder).tokenizer.get_vocab() == load_processor(model).tokenizer.get_vocab()
