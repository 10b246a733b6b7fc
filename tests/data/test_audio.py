"""Audio in: every kind of file becomes (N,) float32 at 16 kHz, or an error that names it."""

import numpy as np
import pytest
import soundfile
import torch

from cald_speech.data.audio import SAMPLE_RATE, AudioError, audio_info, read_audio, read_entry, write_audio
from tests.data.corpora import write_sphere
from tests.training.test_faults import no_file_grows_past


def tone(seconds: float, rate: int) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


def test_written_is_read_back(tmp_path):
    samples = torch.rand(5_000) - 0.5
    write_audio(tmp_path / "new" / "a.flac", samples)
    audio = read_audio(tmp_path / "new" / "a.flac")
    assert audio.dtype == torch.float32 and audio.shape == (5_000,)
    torch.testing.assert_close(audio, samples, atol=2**-15, rtol=0)
    assert audio_info(tmp_path / "new" / "a.flac") == (5_000, SAMPLE_RATE)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.flac"]


@pytest.mark.parametrize("num_bytes", [0, 1_000, 9_000])
@pytest.mark.parametrize("suffix", [".flac", ".wav"])
def test_a_full_disk_leaves_no_half_of_a_file(tmp_path, suffix, num_bytes):
    """libsndfile alone keeps quiet of what it had buffered."""
    samples = torch.rand(5_000) - 0.5  # some 10 kB
    with no_file_grows_past(num_bytes), pytest.raises(OSError, match="File too large"):
        write_audio(tmp_path / f"a{suffix}", samples)
    assert not list(tmp_path.iterdir())


def test_stereo_is_mixed_down(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(0.1, 16_000), 0 * tone(0.1, 16_000)], axis=1), 16_000)
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), tone(0.1, 16_000) / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100])
def test_other_rates_are_resampled(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", tone(1.0, rate), rate)
    audio = read_audio(tmp_path / "a.wav")
    assert len(audio) == SAMPLE_RATE
    # the ends feel the edge of the resampling filter
    np.testing.assert_allclose(audio[200:-200], tone(1.0, SAMPLE_RATE)[200:-200], atol=5e-3)


def make_missing(path):
    pass


def make_text(path):
    path.write_text("not audio at all" * 10)


def make_no_bytes(path):
    path.write_bytes(b"")


def make_empty(path):
    soundfile.write(path, np.zeros(0), 16_000)


def make_short(path):
    soundfile.write(path, np.zeros(399), 16_000)


def make_nan(path):
    soundfile.write(path, np.array([0.0, np.nan] * 4_000), 16_000, subtype="FLOAT")


def make_infinite(path):
    soundfile.write(path, np.array([0.0, np.inf] * 4_000), 16_000, subtype="FLOAT")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_cut_off(path):
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 16_000)
    cut(path)


def make_cut_off_sphere(path):
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 16_000), 16_000, "PCM_16", format="NIST")
    cut(path)


def make_shortened(path):
    write_sphere(path, np.zeros(16_000), coding="pcm,embedded-shorten-v2.00")


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("a.flac", make_missing, "no such audio file"),
        ("a.flac", make_text, "cannot be read"),
        ("a.wav", make_no_bytes, "cannot be read"),
        ("a.wav", make_empty, "is empty"),
        ("a.flac", make_empty, "is empty|cannot be read"),
        ("a.flac", make_short, "has 399"),
        ("a.wav", make_nan, "NaN"),
        ("a.wav", make_infinite, "infinite"),
        ("a.wav", make_cut_off, "cut off"),
        ("a.flac", make_cut_off, "cut off|promises"),
        ("a.sph", make_cut_off_sphere, "cut off, 16512 of the 33024 bytes"),
        ("a.sph", make_shortened, "SPHERE with shorten compression.*sph2pipe -f wav"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(AudioError, match=message) as caught:
        read_audio(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_one_frame_is_enough(tmp_path):
    write_audio(tmp_path / "a.flac", torch.zeros(400))
    assert len(read_audio(tmp_path / "a.flac")) == 400
    with pytest.raises(AudioError, match="at least 401"):
        read_audio(tmp_path / "a.flac", min_samples=401)


@pytest.fixture(params=["wav", "flac", "sph"])
def recording(request, tmp_path):
    path, kind = tmp_path / f"a.{request.param}", "NIST" if request.param == "sph" else None
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, (32_000, 2)), 16_000, format=kind)
    return path


def test_a_segment_is_that_part_of_the_whole(recording):
    whole = read_audio(recording)
    assert torch.equal(read_audio(recording, start_s=0.5, duration_s=0.25), whole[8_000:12_000])
    assert torch.equal(read_audio(recording, start_s=1.75), whole[28_000:])
    assert torch.equal(read_audio(recording, duration_s=2.0), whole)
    # a start and a duration that were rounded up to 0.1 ms
    assert torch.equal(read_audio(recording, start_s=1.5001, duration_s=0.5), whole[24_002:])
    entry = {"audio": str(recording), "duration_s": 0.1}
    assert torch.equal(read_entry(entry), whole)
    assert torch.equal(read_entry(entry | {"start_s": 0.0}), whole[:1_600])


@pytest.mark.parametrize(("start_s", "duration_s"), [(1.5, 0.501), (2.5, 0.1), (2.0, 0.1)])
def test_a_segment_beyond_the_end(recording, start_s, duration_s):
    with pytest.raises(AudioError, match=rf"{recording}: expected a segment from {start_s:g} to .* ends at 2 s"):
        read_audio(recording, start_s=start_s, duration_s=duration_s)


def test_a_segment_of_no_length(recording):
    with pytest.raises(AudioError, match="but the segment has 160"):
        read_audio(recording, start_s=1.0, duration_s=0.01)
    for times in ({"duration_s": 0.0}, {"start_s": -1.0}, {"start_s": 2.0}):
        with pytest.raises(ValueError, match="expected 0 <= start_s"):
            read_audio(recording, **times)


def test_a_segment_at_another_rate(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(2.0, 44_100), 44_100)
    audio = read_audio(tmp_path / "a.wav", start_s=0.5, duration_s=1.0)
    assert len(audio) == SAMPLE_RATE
    np.testing.assert_allclose(audio[200:-200], tone(2.0, SAMPLE_RATE)[8_200:23_800], atol=5e-3)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_audio(tmp_path / "a.flac", torch.zeros(500))
    with no_file_grows_past(100), pytest.raises(OSError, match="File too large"):
        write_audio(tmp_path / "a.flac", torch.rand(900))
    assert len(read_audio(tmp_path / "a.flac")) == 500
    assert [path.name for path in tmp_path.iterdir()] == ["a.flac"]
