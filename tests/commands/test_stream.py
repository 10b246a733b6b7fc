"""`cald-speech stream`: what is read live is what one pass reads, from files and from raw audio."""

import pytest
import soundfile
import torch

from cald_speech.audio_files import resampling
from cald_speech.longform import Recogniser

SECONDS = 12  # of the talk


@pytest.fixture
def models(model, causal):
    return {"both ways": model, "causal": causal}


@pytest.mark.parametrize(("name", "lookahead"), [("both ways", ["--lookahead_s", SECONDS]), ("causal", [])])
def test_file_and_standard_input_are_read_as_one_pass_reads_them(call, models, talk, name, lookahead):
    """With a lookahead of all, and the statistics of all."""
    samples = soundfile.read(talk, dtype="int16")[0]
    options = ["--model", models[name], *lookahead, "--statistics", talk]
    whole = [word.text for word in Recogniser.of(models[name]).transcribe(talk)]
    assert len(whole) > 3, "the model says too little for this test"
    done = call("stream", talk, *options)
    assert done.stdout.split() == whole and "frames come" in done.stderr
    # A byte that is half a sample is lost.
    assert call("stream", "-", *options, heard=samples.tobytes() + b"\0").stdout.split() == whole
    times = call("stream", "-", *options, "--format", "ctm", heard=samples.tobytes()).stdout.splitlines()
    assert [line.split()[4] for line in times] == whole


def test_words_are_normalised_by_what_was_heard_so_far(call, models, talk):
    seconds = torch.from_numpy(soundfile.read(talk, dtype="float32")[0]).split(16_000)
    words = [word.text for word in Recogniser.of(models["causal"]).live(seconds)]
    assert call("stream", talk, "--model", models["causal"], "--chunk_s", 1).stdout.split() == words


@pytest.mark.parametrize("rate", [8_000, 44_100, 16_000])
def test_audio_that_arrives_at_another_rate(rate):
    x = torch.randn(rate)
    whole = resampling.Resampler(rate, 16_000)(x, 0, 0, 16_000)
    parts = list(resampling.resampled(x.split(1_111), rate, 16_000))
    assert sum(map(len, parts[:5])) > 0.9 * 5 * 1_111 * 16_000 / rate, "most comes as it arrives"
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["talk.wav", "--model", "both ways"], "(--lookahead_s)"),
        (["talk.wav", "--model", "both ways", "--lookahead_s", "-1"], "-1.0 is not in the range"),
        (["none.wav", "--model", "causal"], "there is no such audio file"),
        (["talk.wav", "--model", "causal", "--decoding", "best"], "'best' is not one of"),
        (["talk.wav", "--model", "nowhere"], "there is no folder"),
        (["talk.wav", "--model", "causal", "--beam_width", "4"], "--beam_width: does nothing here"),
        (["talk.wav", "--model", "causal", "--rate", "8000"], "--rate: does nothing here"),
    ],
    ids=[
        "without a lookahead",
        "into the past",
        "no such file",
        "no such decoding",
        "no such model",
        "greedy",
        "a file",
    ],
)
def test_what_is_refused(call, models, talk, monkeypatch, words, told):
    monkeypatch.chdir(talk.parent)
    assert told in call("stream", *(models.get(word, word) for word in words), status=2).stderr


def test_a_model_with_attention_cannot_read_live(call, place, talk):
    told = call("stream", talk, "--model", place / "teacher", status=2).stderr
    assert "need the whole audio: 0 (attention)" in told


def test_a_file_cut_short_is_read_up_to_there(call, models, talk):
    talk.write_bytes(talk.read_bytes()[: 44 + 2 * 16_000 * 4])
    done = call("stream", talk, "--model", models["causal"], status=1)
    assert done.stdout.split() and "only the first 4.00 s" in done.stderr
