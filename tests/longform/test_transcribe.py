"""From audio to words, by function and by command: tiny random models, real speech where there is some."""

import json
import re
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from cald_speech import LayerMap, convert
from cald_speech.cli import main as cli
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.longform import AudioSource
from cald_speech.longform.command import main
from cald_speech.longform.recogniser import Recogniser
from cald_speech.longform.transcribe import align_text, transcribe
from cald_speech.mixers import Bidirectional, Mamba2
from tests.helpers import tiny_model

TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]


def save(folder, model):
    """The model and a processor for it in a folder."""
    (folder / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(TOKENS)}))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"), word_delimiter_token="|")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(do_normalize=True), tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def talkative(mixer=Bidirectional):
    """A converted model with random weights that says something else every few frames, delimiters among it."""
    family = families()["wav2vec2"]
    model = tiny_model(family)
    convert(model, LayerMap(mixer), initialise="random")
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)
        # seven tokens are left, so that the delimiter comes often: <pad>, | and A to E
        model.lm_head.bias[[1, 2, 3, *range(10, len(TOKENS))]] = -1e4
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    return save(tmp_path_factory.mktemp("model"), talkative())


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return save(tmp_path_factory.mktemp("kept"), tiny_model(families()["wav2vec2"]))


@pytest.fixture
def talk(tmp_path):
    generator = np.random.default_rng(0)
    soundfile.write(tmp_path / "talk.wav", 0.1 * generator.standard_normal(12 * 16_000), 16_000)
    return tmp_path / "talk.wav"


def whole_text(folder, samples: torch.Tensor) -> str:
    """What the model's own forward pass over the whole says."""
    from cald_speech import from_pretrained

    processor = Wav2Vec2Processor.from_pretrained(folder)
    inputs = processor(samples.numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        tokens = from_pretrained(folder)(inputs).logits[0].argmax(-1)
    return " ".join(processor.tokenizer.decode(tokens.tolist()).split())


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


# --- the command


def test_the_command_writes_complete_files_and_skips_them_next_time(model, talk, tmp_path, capsys):
    folder = tmp_path / "audio" / "inside"
    folder.mkdir(parents=True)
    (folder / "b.wav").write_bytes(talk.read_bytes())
    arguments = [str(talk), str(tmp_path / "audio"), "--model", model, "--output", str(tmp_path / "out")]
    assert main([*arguments, "--format", "json"]) == 0
    report = capsys.readouterr().err
    assert "12.0 s of audio" in report
    assert "real-time factor" in report
    outputs = [tmp_path / "out" / "talk.json", tmp_path / "out" / "inside" / "b.json"]
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(outputs)
    expected = [word.text for word in transcribe(model, talk)]
    assert [word["text"] for word in json.loads(outputs[1].read_text())["words"]] == expected
    outputs[0].unlink()
    outputs[1].write_text("mine")
    assert main([*arguments, "--format", "json"]) == 0
    assert "b.wav: skipped" in capsys.readouterr().err
    assert outputs[0].exists()
    assert outputs[1].read_text() == "mine"
    assert main([*arguments, "--format", "json", "--overwrite"]) == 0
    assert outputs[1].read_text() != "mine"


def test_a_file_cut_short_is_transcribed_up_to_there_and_the_others_too(model, talk, tmp_path, capsys):
    short = tmp_path / "short.wav"
    short.write_bytes(talk.read_bytes()[: 44 + 2 * 16_000 * 5])
    (tmp_path / "text.wav").write_text("no audio")
    paths = [str(tmp_path / name) for name in ("short.wav", "text.wav", "nowhere.wav", "talk.wav")]
    assert main([*paths, "--model", model, "--output", str(tmp_path / "out")]) == 1
    report = capsys.readouterr().err
    assert re.search(r"warning: .*short\.wav: only the first 5\.00 s: .*cut off", report)
    assert re.search(r"error: .*text\.wav: expected an audio file", report)
    assert re.search(r"error: .*nowhere\.wav: there is no such audio file", report)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["short.partial.txt", "talk.txt"]
    samples = torch.from_numpy(soundfile.read(talk, dtype="float32")[0])
    text = " ".join((tmp_path / "out" / "short.partial.txt").read_text().split())
    assert text == whole_text(model, samples[: 16_000 * 5])


def test_ctrl_c_keeps_the_words_so_far(model, talk, tmp_path, capsys, monkeypatch):
    original = Recogniser.transcribe

    def interrupted(*args, **options):
        for count, word in enumerate(original(*args, **options)):
            if count == 3:
                raise KeyboardInterrupt
            yield word

    monkeypatch.setattr(Recogniser, "transcribe", interrupted)
    arguments = [str(talk), str(talk.with_name("next.wav")), "--model", model, "--format", "json"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 130
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["talk.partial.json"]
    kept = json.loads((tmp_path / "out" / "talk.partial.json").read_text())
    expected = [word.text for _, word in zip(range(3), original(Recogniser.of(model), talk), strict=False)]
    assert [word["text"] for word in kept["words"]] == expected
    assert "next.wav" not in capsys.readouterr().err


def test_an_error_before_the_first_word_leaves_no_file(model, talk, tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise UserError("the disk is full")
        yield

    monkeypatch.setattr(Recogniser, "transcribe", full)
    assert main([str(talk), "--model", model, "--format", "vtt", "--output", str(tmp_path / "out")]) == 1
    assert list((tmp_path / "out").iterdir()) == []
    assert "the disk is full" in capsys.readouterr().err


def test_without_a_folder_it_prints(model, talk, capsys):
    assert main([str(talk), "--model", model]) == 0
    assert capsys.readouterr().out.split() == [word.text for word in transcribe(model, talk)]


def test_a_known_text_gets_its_times(model, talk, tmp_path, capsys):
    (tmp_path / "said.txt").write_text("what was\nsaid")
    arguments = [str(talk), "--model", model, "--text", str(tmp_path / "said.txt"), "--format", "ctm"]
    assert main(arguments) == 0
    assert [line.split()[4] for line in capsys.readouterr().out.splitlines()] == ["what", "was", "said"]
    with pytest.raises(UserError, match="expected one file, got 2"):
        main([str(talk), *arguments[1:], str(talk.with_name("other.wav"))])


def test_two_files_of_one_name_are_refused(model, talk, tmp_path):
    soundfile.write(talk.with_suffix(".flac"), np.zeros(16_000), 16_000)
    with pytest.raises(UserError, match=r"would both be .*talk\.txt"):
        main([str(talk), str(talk.with_suffix(".flac")), "--model", model, "--output", str(tmp_path / "out")])


def test_a_folder_without_audio_is_named(model, tmp_path):
    with pytest.raises(UserError, match="expected audio files in this folder"):
        main([str(tmp_path), "--model", model])


def test_cald_speech_transcribe_is_the_same_command(model, talk, kept):
    done = CliRunner().invoke(cli, ["transcribe", str(talk), "--model", model, "--format", "srt"])
    assert done.exit_code == 0, done.output
    assert "00:00:" in done.stdout
    refused = CliRunner().invoke(cli, ["transcribe", str(talk), "--model", kept])
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert "--storage" in CliRunner().invoke(cli, ["transcribe", "--help"]).stdout


def test_the_module_is_the_same_command(model, talk, repository):
    command = [sys.executable, "-m", "cald_speech.longform", str(talk), "--model", model]
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [word.text for word in transcribe(model, talk)]


def _heed_ctrl_c():
    """A shell makes what it runs in the background deaf to Ctrl-C, tests and all that they start included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_real_ctrl_c_ends_with_130(model, talk, repository, tmp_path):
    # twenty minutes of audio, so that the signal comes while the encoder runs
    soundfile.write(talk, np.tile(soundfile.read(talk)[0], 100), 16_000)
    command = [
        sys.executable,
        "-m",
        "cald_speech.longform",
        str(talk),
        "--model",
        model,
        "--output",
        str(tmp_path / "o"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=repository, preexec_fn=_heed_ctrl_c)
    try:
        while not (tmp_path / "o" / "talk.partial.txt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, report = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, report
    assert "Traceback" not in report
    assert list((tmp_path / "o").iterdir()) == []


def test_real_speech_of_any_rate(model, shared_data, tmp_path):
    clip = shared_data / "fsdd" / "recordings" / "3_george_0.flac"
    samples, rate = soundfile.read(clip)
    assert rate == 8_000
    soundfile.write(tmp_path / "stereo.wav", np.stack([samples, samples], axis=1), rate, subtype="FLOAT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert list(transcribe(model, tmp_path / "stereo.wav")) == list(transcribe(model, clip))
