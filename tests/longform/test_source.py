"""Audio in parts is the whole audio, from any file; a damaged one gives what can be read and says what is wrong."""

import math

import numpy as np
import pytest
import soundfile
import torch
from torchaudio.functional import resample

from cald_speech.audio_files.resampling import Resampler
from cald_speech.data.audio import AudioError, read_audio
from cald_speech.errors import UserError
from cald_speech.longform.source import AudioSource
from tests.helpers import TOLERANCE, relative_error

RATES = (8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000)
SECONDS = 3


def write(folder, name, rate, channels=1, seconds=SECONDS):
    samples = 0.1 * np.random.default_rng(0).standard_normal((int(rate * seconds), channels))
    soundfile.write(folder / name, samples, rate)
    return folder / name


def in_blocks(source, size) -> torch.Tensor:
    return torch.cat([torch.empty(0), *source.blocks(size)])


@pytest.mark.parametrize("rate", [r for r in RATES if r != 16_000])
@pytest.mark.parametrize("length", [1, 37, 4_411])
def test_resampling_is_torchaudios(rate, length):
    x = torch.randn(length)
    resampler = Resampler(rate, 16_000)
    ours = resampler(x, 0, 0, resampler.num_outputs(length))
    assert relative_error(ours, resample(x, rate, 16_000)) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("rate", [7_999, 16_001, 44_100], ids=["7999 Hz", "16001 Hz", "44100 Hz"])
def test_parts_of_the_resampled_signal_equal_the_whole(rate):
    """Rates without a common divisor have thousands of phases, which must not cost memory."""
    x = torch.randn(rate)
    resampler = Resampler(rate, 16_000)
    whole = resampler(x, 0, 0, resampler.num_outputs(rate))
    for start, stop in ((0, 1), (0, 16_000), (15_999, 16_000), (777, 778), (1_234, 9_876)):
        first, last = (min(max(0, at), rate) for at in resampler.inputs(start, stop))
        assert relative_error(resampler(x[first:last], first, start, stop), whole[start:stop]) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("channels", [1, 2, 5], ids=["mono", "stereo", "5 channels"])
@pytest.mark.parametrize("rate", RATES)
def test_a_file_in_blocks_is_the_file_read_whole(tmp_path, rate, channels):
    path = write(tmp_path, "a.wav", rate, channels)
    expected = read_audio(path)
    source = AudioSource.open(path)
    assert source.num_samples == len(expected) and source.duration_s == SECONDS
    for size in (777, 16_000, 10**6):
        assert relative_error(in_blocks(source, size), expected) <= TOLERANCE["rounding"]
    assert source.fault is None


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.aiff", "a.w64"])
def test_formats(tmp_path, name):
    path = write(tmp_path, name, 44_100, 2)
    source = AudioSource.open(path)
    for _ in range(2):  # the second pass opens the file again
        assert relative_error(in_blocks(source, 5_000), read_audio(path)) <= TOLERANCE["rounding"]
    assert source.fault is None


def test_halos_are_what_stands_around(tmp_path):
    source = AudioSource.open(write(tmp_path, "a.flac", 8_000))
    whole = in_blocks(source, 10**6)
    parts = list(source.blocks(10_000, halo=300))
    assert torch.equal(parts[0], whole[:10_300]) and torch.equal(parts[-1], whole[39_700:])
    assert torch.equal(parts[2], whole[19_700:30_300])


def test_parts_come_in_any_order(tmp_path):
    source = AudioSource.open(write(tmp_path, "a.flac", 44_100))
    whole = in_blocks(source, 10**6)
    for start, stop in ((40_000, 41_000), (10, 20), (20, 5_000), (4_000, 4_001), (0, 48_000), (47_999, 60_000)):
        assert relative_error(source.read(start, stop), whole[start:stop]) <= TOLERANCE["rounding"]
    assert source.read(48_000, 49_000).numel() == source.read(7, 7).numel() == 0
    with pytest.raises(ValueError, match="expected 0 <= start <= stop, got 5, 4"):
        source.read(5, 4)


def test_samples_at_another_rate():
    x = torch.randn(8_000, dtype=torch.float64)
    source = AudioSource.from_samples(x, 8_000)
    assert (source.num_samples, source.duration_s, source.fault) == (16_000, 1.0, None)
    assert relative_error(in_blocks(source, 999), resample(x.float(), 8_000, 16_000)) <= TOLERANCE["rounding"]
    with pytest.raises(ValueError, match=r"expected float \(N,\)"):
        AudioSource.from_samples(torch.ones(2, 8_000))
    with pytest.raises(ValueError, match=r"expected float \(N,\)"):
        AudioSource.from_samples(torch.ones(8_000, dtype=torch.int16))


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.ogg", "a.mp3", "a.aiff"])
def test_a_file_that_is_cut_off_is_read_up_to_there(tmp_path, name, rate):
    path = write(tmp_path, name, rate, seconds=10)
    whole = in_blocks(AudioSource.open(path), 10**6)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    source = AudioSource.open(path)
    got = in_blocks(source, 16_000)
    assert len(got) == source.num_samples and 5.5 * 16_000 < len(got) < 7 * 16_000
    # Resampling at the cut has nothing to go by on its far side; a decoder may be unsure of its last frames.
    clear = len(got) - 2_000
    assert relative_error(got[:clear], whole[:clear]) <= TOLERANCE["rounding"]
    assert source.fault.message and math.isclose(source.fault.time_s, len(got) / 16_000, abs_tol=1e-3)
    assert torch.equal(in_blocks(source, 3_333)[:clear], got[:clear])


@pytest.mark.parametrize("at", [0.3, 0.5, 0.9])
def test_damage_in_the_middle_ends_the_audio_there_in_every_pass(tmp_path, at):
    path = write(tmp_path, "a.flac", 16_000, seconds=10)
    whole = in_blocks(AudioSource.open(path), 10**6)
    content = bytearray(path.read_bytes())
    place = int(len(content) * at)
    content[place : place + 3_000] = np.random.default_rng(1).bytes(3_000)
    path.write_bytes(content)
    with pytest.raises(AudioError):
        read_audio(path)
    source = AudioSource.open(path)
    assert source.fault is None
    got = in_blocks(source, 16_000)
    assert (at - 0.1) * 160_000 < len(got) <= at * 160_000 and torch.equal(got, whole[: len(got)])
    assert source.num_samples == len(got) and source.fault.time_s == len(got) / 16_000
    for size in (100, 7_777, 160_000):
        assert torch.equal(in_blocks(source, size), got)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["NaN", "infinity"])
def test_samples_that_are_no_numbers_end_the_audio(tmp_path, bad):
    samples = np.ones(32_000, np.float32)
    samples[20_000] = bad
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    source = AudioSource.open(tmp_path / "a.wav")
    assert len(in_blocks(source, 3_000)) == source.num_samples == 20_000
    assert source.fault == (1.25, "the samples are NaN or infinite")


@pytest.mark.parametrize("content", [b"", b"RIFF", b"what is this? " * 100], ids=["nothing", "a word", "text"])
def test_what_is_no_audio_is_refused(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.wav: expected an audio file"):
        AudioSource.open(tmp_path / "a.wav")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.flac: there is no such audio file"):
        AudioSource.open(tmp_path / "gone.flac")


def test_a_flac_without_a_length_is_read_to_its_end(tmp_path):
    """As ``ffmpeg -f flac -`` writes it."""
    path = write(tmp_path, "a.flac", 16_000)
    expected = read_audio(path)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    source = AudioSource.open(path)
    assert torch.equal(in_blocks(source, 10_000), expected)
    assert (source.num_samples, source.duration_s, source.fault) == (48_000, 3.0, None)


def test_an_empty_file_has_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 44_100)
    source = AudioSource.open(tmp_path / "a.wav")
    assert (source.num_samples, list(source.blocks(100)), source.fault) == (0, [], None)


def test_real_speech(shared_data):
    path = next(iter(sorted((shared_data / "fsdd" / "recordings").glob("*.flac"))))
    assert relative_error(in_blocks(AudioSource.open(path), 1_000), read_audio(path)) <= TOLERANCE["rounding"]
