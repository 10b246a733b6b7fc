"""`cald-speech transcribe` and `align`: many files, damaged ones, interruptions."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch

from cald_speech.commands.jobs import find_jobs, jobs_of, run_jobs
from cald_speech.data.manifests import write_manifest
from cald_speech.errors import UserError
from cald_speech.longform import transcribe
from cald_speech.longform.formats import FORMATS
from cald_speech.longform.recogniser import Recogniser
from cald_speech.longform.words import Word
from tests.longform.recognisers import whole_text


def test_complete_files_are_written_and_skipped_next_time(call, model, talk, tmp_path):
    folder = tmp_path / "audio" / "inside"
    folder.mkdir(parents=True)
    (folder / "b.wav").write_bytes(talk.read_bytes())
    words = ["transcribe", talk, tmp_path / "audio", "--model", model, "--format", "json", "--output", tmp_path / "out"]
    report = call(*words).stderr
    assert "12.0 s of audio" in report
    assert "real-time factor" in report
    outputs = [tmp_path / "out" / "talk.json", tmp_path / "out" / "inside" / "b.json"]
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == sorted(outputs)
    expected = [word.text for word in transcribe(model, talk)]
    assert [word["text"] for word in json.loads(outputs[1].read_text())["words"]] == expected
    outputs[0].unlink()
    outputs[1].write_text("mine")
    assert "b.wav: skipped" in call(*words).stderr
    assert outputs[0].exists()
    assert outputs[1].read_text() == "mine"
    call(*words, "--overwrite")
    assert outputs[1].read_text() != "mine"


def test_a_file_cut_short_is_transcribed_up_to_there_and_the_others_too(call, model, talk, tmp_path):
    short = tmp_path / "short.wav"
    short.write_bytes(talk.read_bytes()[: 44 + 2 * 16_000 * 5])
    (tmp_path / "text.wav").write_text("no audio")
    paths = [tmp_path / name for name in ("short.wav", "text.wav", "nowhere.wav", "talk.wav")]
    report = call("transcribe", *paths, "--model", model, "--output_folder", tmp_path / "out", status=1).stderr
    assert re.search(r"warning: .*short\.wav: only the first 5\.00 s: .*cut off", report)
    assert re.search(r"error: .*text\.wav: expected an audio file", report)
    assert re.search(r"error: .*nowhere\.wav: there is no such audio file", report)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["short.partial.txt", "talk.txt"]
    samples = torch.from_numpy(soundfile.read(talk, dtype="float32")[0])
    text = " ".join((tmp_path / "out" / "short.partial.txt").read_text().split())
    assert text == whole_text(model, samples[: 16_000 * 5])


def test_ctrl_c_keeps_the_words_so_far(call, model, talk, tmp_path, monkeypatch):
    original = Recogniser.transcribe

    def interrupted(*args, **options):
        for count, word in enumerate(original(*args, **options)):
            if count == 3:
                raise KeyboardInterrupt
            yield word

    monkeypatch.setattr(Recogniser, "transcribe", interrupted)
    files = [talk, talk.with_name("next.wav")]
    options = ["--model", model, "--format", "json", "--output", tmp_path / "out"]
    assert "next.wav" not in call("transcribe", *files, *options, status=130).stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["talk.partial.json"]
    kept = json.loads((tmp_path / "out" / "talk.partial.json").read_text())
    expected = [word.text for _, word in zip(range(3), original(Recogniser.of(model), talk), strict=False)]
    assert [word["text"] for word in kept["words"]] == expected


def test_an_error_before_the_first_word_leaves_no_file(call, model, talk, tmp_path, monkeypatch):
    def full(*args, **options):
        raise UserError("the disk is full")
        yield

    monkeypatch.setattr(Recogniser, "transcribe", full)
    options = ["--model", model, "--format", "vtt", "--output", tmp_path / "out"]
    assert "the disk is full" in call("transcribe", talk, *options, status=1).stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_without_a_folder_it_prints(call, model, talk):
    assert call("transcribe", talk, "--model", model).stdout.split() == [word.text for word in transcribe(model, talk)]
    assert "00:00:" in call("transcribe", talk, "--model", model, "--format", "srt").stdout


def test_a_known_text_gets_its_times(call, model, talk, tmp_path):
    """By `align`, and by `transcribe --text`."""
    said = tmp_path / "said.txt"
    said.write_text("what was\nsaid")
    times = call("align", talk, said, "--model", model, "--format", "ctm").stdout
    assert [line.split()[4] for line in times.splitlines()] == ["what", "was", "said"]
    options = ["--model", model, "--text", said, "--format", "ctm"]
    assert call("transcribe", talk, *options).stdout == times
    two = call("transcribe", talk, talk.with_name("other.wav"), *options, status=2)
    assert "expected one file, got 2" in two.stderr


def test_a_text_that_cannot_be_aligned(call, model, talk, tmp_path):
    (tmp_path / "said.txt").write_text("take 2")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    assert (
        "expected a text file in UTF-8"
        in call("align", talk, tmp_path / "latin.txt", "--model", model, status=2).stderr
    )
    assert "'2'" in call("align", talk, tmp_path / "said.txt", "--model", model, status=1).stderr
    assert call("align", talk, tmp_path / "said.txt", "--model", model, "--unknown", "drop").stdout == "take\n"


def test_a_known_text_is_written_as_the_normaliser_says(call, model, talk, tmp_path):
    (tmp_path / "said.txt").write_text("{BREATH} it 's <unk> said")
    words = ["align", talk, tmp_path / "said.txt", "--model", model, "--unknown", "drop"]
    assert call(*words, "--normaliser", "tedlium").stdout == "IT'S SAID\n"
    assert call(*words).stdout == "{BREATH} it 's <unk> said\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--beam_width", "4"], "--beam_width: does nothing here: expected it with --decoding beam"),
        (["--unknown", "drop"], "--unknown: does nothing here: expected it with --text"),
        (["--normaliser", "lower"], "--normaliser: does nothing here: expected it with --text"),
        (["--text", "said.txt", "--decoding", "beam"], "--decoding: does nothing here"),
        (["--overwrite"], "--overwrite: does nothing here: expected it with --output_folder"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_an_option_acts_or_is_refused(call, talk, words, told):
    assert told in call("transcribe", talk, "--model", "any", *words, status=2).stderr


def test_one_bad_file_never_ends_a_batch(call, model, talk, tmp_path):
    """Files without a header, macOS companions, odd names, links, endings in capitals, one name twice."""
    folder, sound = tmp_path / "talks", talk.read_bytes()
    (folder / "inside").mkdir(parents=True)
    for name in (
        "talk.wav",
        "talk.partial.wav",
        "b.WAV",
        "meeting 24.01.05",
        "b.raw.wav",
        "inside/talk.wav",
        "a\n.wav",
    ):
        (folder / name).write_bytes(sound)
    soundfile.write(folder / "talk.flac", np.zeros(16_000), 16_000)
    soundfile.write(folder / "c.sph", np.zeros(16_000), 16_000, format="NIST")
    (folder / "._talk.wav").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100))
    (folder / "b.raw").write_bytes(bytes(32_000))
    (folder / "notes.txt").write_text("no audio")
    (folder / "gone.wav").symlink_to("nowhere.wav")
    (folder / "ring").symlink_to(folder, target_is_directory=True)
    (folder / "linked").symlink_to(folder / "inside", target_is_directory=True)
    options = ["--model", model, "--output", tmp_path / "out"]
    report = call("transcribe", folder, *options, status=1).stderr
    done = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.txt"))
    names = [
        "a\n",
        "b.WAV",
        "b.raw.wav",
        "c",
        "inside/talk",
        "meeting 24.01.05",
        "talk.flac",
        "talk.partial.wav",
        "talk.wav",
    ]
    assert done == sorted(f"{name}.txt" for name in names)
    assert re.search(r"error: .*b\.raw: .*sox -t raw", report) and re.search(r"error: .*gone\.wav: there is no", report)
    assert "passed over what is no audio: 1 macOS companions, 1 .txt" in report
    assert "11 files: 9 done, 2 not done" in report
    again = call("transcribe", folder, folder / "talk.wav", *options, status=1).stderr
    assert "11 files: 9 skipped, 2 not done" in again


def test_files_of_one_name_keep_apart(call, model, talk, tmp_path):
    other = tmp_path / "other" / talk.name
    other.parent.mkdir()
    other.write_bytes(talk.read_bytes())
    files = [talk, other, talk.with_name("." + "x" * 249 + ".wav")]
    report = call("transcribe", *files, "--model", model, "--output", tmp_path / "out", status=1).stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["talk.wav.txt"]
    assert f"error: {other}: its transcript would be" in report and "3 files: 1 done, 2 not done" in report


def one_word(source, progress):
    source.read(0, 10**9)
    yield Word("ONE", 0.0, 0.5, 1.0, ())


def test_whatever_lies_in_a_folder_has_its_transcript_beside_it_or_its_reason(tmp_path, capsys):
    """A pipe among the files would be waited for; names are as long as they may be, and in what terminals obey."""
    folder = tmp_path / "talks"
    folder.mkdir()
    audio = np.zeros(8_000)
    names = ["a" * 251, "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 83, "b\n\x1b[31m", "c", "d"]
    for name in names:
        soundfile.write(folder / f"{name}.wav", audio, 16_000)
    (folder / "d.txt").mkdir()
    for pipe in ("control", "._control", "e.wav"):
        os.mkfifo(folder / pipe)
    assert run_jobs(find_jobs([folder], folder, ".txt"), one_word, FORMATS["text"]) == 1
    told = capsys.readouterr().err
    assert "6 files: 4 done, 2 not done" in told and "2 without an ending" in told and "\x1b" not in told
    assert re.search(r"e\.wav: expected an audio file, got a folder, a pipe", told)
    assert re.search(r"d\.wav: its transcript would be .*d\.txt, which is a folder", told)
    for name in names[:4]:
        assert (folder / f"{name}.txt").read_text() == "ONE\n"
    assert run_jobs(find_jobs([folder], folder, ".json"), one_word, FORMATS["json"]) == 1
    assert len(list(folder.glob("*.json"))) == 5  # the longest has a shorter name


def test_ids_of_every_kind_are_names_of_transcripts(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(8_000), 16_000)
    longest = "\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 100
    ids = ["", ".", "a\0b", "../up", "/up", "a/b", "a", longest + "a", longest + "b", "x/" * 400 + "y"]
    write_manifest(tmp_path / "m.json", {i: {"audio": tmp_path / "a.wav", "duration_s": 0.5, "text": ""} for i in ids})
    jobs = jobs_of(tmp_path / "m.json", tmp_path / "out", ".txt")
    assert run_jobs(jobs, one_word, FORMATS["text"]) == 0
    assert len({path for path in (tmp_path / "out").rglob("*") if path.is_file()}) == len(ids)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "m.json", "out"]


@pytest.mark.parametrize("error", [RuntimeError("NaN logits"), IndexError("x"), TypeError("x")], ids=repr)
def test_whatever_a_file_raises_is_its_own(call, model, talk, tmp_path, monkeypatch, error):
    original = Recogniser.transcribe

    def fails(self, source, **options):
        if source.duration_s < 5:
            raise error
        return original(self, source, **options)

    monkeypatch.setattr(Recogniser, "transcribe", fails)
    soundfile.write(tmp_path / "bad.wav", np.zeros(16_000), 16_000)
    options = ["--model", model, "--output", tmp_path / "out"]
    report = call("transcribe", tmp_path / "bad.wav", talk, *options, status=1).stderr
    assert re.search(rf"error: .*bad\.wav: .*{type(error).__name__}: {error}", report)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["talk.txt"]


def test_a_folder_without_audio_is_named(call, model, tmp_path):
    assert "expected audio files in this folder" in call("transcribe", tmp_path, "--model", model, status=2).stderr


def test_a_model_that_kept_its_attention_needs_force(call, talk, kept):
    refused = call("transcribe", talk, "--model", kept, status=2)
    assert refused.stderr.startswith("error: every layer of this model kept its attention")
    assert "--force" in refused.stderr
    call("transcribe", talk, "--model", kept, "--force")


def test_what_is_no_option_is_a_usage_error(call, model, talk):
    assert "Missing option '--model'" in call("transcribe", talk, status=2).stderr
    assert "got 'toaster'" in call("transcribe", talk, "--model", model, "--device", "toaster", status=2).stderr
    assert "'doc' is not one of" in call("transcribe", talk, "--model", model, "--format", "doc", status=2).stderr


def _heed_ctrl_c():
    """A shell makes what it runs in the background deaf to Ctrl-C, tests and all that they start included."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow  # a Python process that transcribes
def test_a_real_ctrl_c_ends_with_130(model, talk, repository, tmp_path):
    # ten minutes of audio, so that the signal comes while the encoder runs
    soundfile.write(talk, np.tile(soundfile.read(talk)[0], 50), 16_000)
    program = [sys.executable, "-c", "from cald_speech.commands import main; main()"]
    command = [*program, "transcribe", str(talk), "--model", model, "--output", str(tmp_path / "o")]
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
