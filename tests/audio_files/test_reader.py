"""Audio files to their real end, whatever their headers say; what is not whole is told, in training and long form."""

import struct

import numpy as np
import pytest
import soundfile
import torch

from cald_speech.audio_files import AudioFile, containers, reader
from cald_speech.audio_files.resampling import Resampler, kernel
from cald_speech.data.audio import AudioError, audio_info, read_audio
from cald_speech.errors import UserError
from cald_speech.longform import AudioSource
from tests.faults.audio import check_sound

SOUND = (3_000 * np.random.default_rng(0).standard_normal(40_000)).astype("<i2")
FORM = struct.pack("<IHHIIHH", 16, 1, 1, 16_000, 32_000, 2, 16)


def wave(data_size: int, riff_size: int | None = None, *, name=b"RIFF", wide=b"", sound=SOUND, behind=b"") -> bytes:
    size = min(data_size + 36, 0xFFFFFFFF) if riff_size is None else riff_size
    head = name + struct.pack("<I", size) + b"WAVE" + wide + b"fmt " + FORM + b"data" + struct.pack("<I", data_size)
    return head + sound.tobytes() + behind


def ds64(riff: int, data: int) -> bytes:
    return b"ds64" + struct.pack("<IQQQI", 28, riff, data, data // 2, 0)


def read_both(path) -> torch.Tensor:
    """The same by both readers, without a fault."""
    source = AudioSource.open(path)
    parts = torch.cat(list(source.blocks(7_000)))
    whole = read_audio(path)
    assert source.fault is None and len(whole) == len(parts) == source.num_samples == audio_info(path)[0]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    return whole


def fault_in_both(path) -> reader.Fault:
    """What is told: to training as an error, by long form after what could be read."""
    with pytest.raises(AudioError, match=str(path)):
        read_audio(path)
    source = AudioSource.open(path)
    count = sum(map(len, source.blocks(7_000)))
    assert source.num_samples == count and source.fault.time_s == pytest.approx(count / 16_000, abs=1e-3)
    return source.fault


HEADERS = {
    "size 0, a killed recorder": wave(0, 36),
    "all ones, ffmpeg": wave(0xFFFFFFFF, 0xFFFFFFFF),
    "sox to a pipe": wave(0x7FFFF000),
    "arecord to a pipe": wave(0x80000000),
    "all ones less the header": wave(0xFFFFFFFF - 44),
    "RIFF's size with its own 8 bytes": wave(80_000, 80_044),
    "RIFF's size 0": wave(80_000, 0),
    "a chunk behind": wave(80_000, behind=b"LIST" + struct.pack("<I", 4) + b"INFO"),
    "a tag behind": wave(80_000, behind=b"TAG" + bytes(125)),
    "a little filling behind": wave(80_000, behind=bytes(500)),
    "RF64": wave(0xFFFFFFFF, name=b"RF64", wide=ds64(80_072, 80_000)),
    "RF64 of length 0": wave(0xFFFFFFFF, name=b"RF64", wide=ds64(0, 0)),
    "RF64 of all ones": wave(0xFFFFFFFF, name=b"RF64", wide=ds64(2**64 - 1, 2**64 - 1)),
    "BW64": wave(0xFFFFFFFF, name=b"BW64", wide=ds64(80_072, 80_000)),
    "AU of length 0": b".snd" + struct.pack(">IIIII", 24, 0, 3, 16_000, 1) + SOUND.byteswap().tobytes(),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_whole_file_is_read_to_its_end(tmp_path, name):
    path = tmp_path / "a.raw"  # the name tells nothing
    path.write_bytes(HEADERS[name])
    assert torch.equal(read_both(path), torch.from_numpy(SOUND / np.float32(2**15)))
    assert torch.equal(read_audio(path, start_s=1.0, duration_s=0.5), read_audio(path)[16_000:24_000])


@pytest.mark.parametrize("gib", [3.5, 5])
def test_sizes_past_32_bits(tmp_path, gib):
    """A WAV file whose size was counted in 32 bits; the sound is a hole on the disk."""
    path, size = tmp_path / "a.wav", int(gib * 2**30)
    with path.open("wb") as file:
        file.write(wave(size % 2**32, sound=SOUND[:0]))
        file.truncate(44 + size)
    file = AudioFile(path)
    assert file._decoder.num_samples == size // 2 and file.fault is None
    assert len(file.read(1_000)) == 1_000


@pytest.mark.parametrize(
    ("content", "message", "count"),
    [
        (wave(80_000)[:-1_001], "cut off, 1001 of the 80044 bytes", 39_499),
        (wave(80_000) * 2, "another file is joined", 40_000),
        (wave(60_000), "more follows than the header says: 20000 bytes", 30_000),
        (HEADERS["RF64"][:-8_001], "cut off, 8001 of", 35_999),
    ],
    ids=["cut off", "joined", "more", "RF64"],
)
def test_what_is_not_whole_is_told(tmp_path, content, message, count):
    (tmp_path / "a.wav").write_bytes(content)
    fault = fault_in_both(tmp_path / "a.wav")
    assert message in fault.message and fault.time_s == pytest.approx(count / 16_000)


def compressed(path, *, seconds=3, coding=None) -> bytes:
    rate = 48_000 if coding == "OPUS" else 16_000
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(seconds * rate), rate, subtype=coding)
    return path.read_bytes()


@pytest.mark.parametrize("coding", ["VORBIS", "OPUS"])
def test_ogg(tmp_path, coding):
    """Chained links are read on; within the last page and in a damaged one they are not whole."""
    path = tmp_path / "a.ogg"
    one = compressed(path, coding=coding)
    first = read_audio(path)
    path.write_bytes(one * 3)
    source = AudioSource.open(path)
    assert sum(map(len, source.blocks(5_000))) == 3 * len(first) == len(read_audio(path)) and source.fault is None
    for content, message in (
        (one[:-1], "its last page is missing"),
        (one[: one.rfind(b"OggS") + 5], "its last page is missing"),
        (one[: one.rfind(b"OggS")], "its last page is missing"),
        (one[: len(one) // 2] + b"x" + one[len(one) // 2 + 1 :], "damaged at byte"),
    ):
        path.write_bytes(content)
        assert message in fault_in_both(path).message


def test_mp3(tmp_path):
    """Without its frame count, joined with and without it, tags around; cut off."""
    path = tmp_path / "a.mp3"
    one = compressed(path)
    count = len(read_audio(path))
    assert count == 48_000
    bare = one[containers.mpeg_layout.__globals__["_frame"](one[:4]).length :]
    for content, expected in (
        (one * 3, 3 * count),
        (bare, count),
        (bare * 2, 2 * count),
        (one + b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + bare, 2 * count),
        (b"ID3\4\0\0\0\0\0\x0a" + bytes(10) + one + b"TAG" + bytes(125), count),
    ):
        path.write_bytes(content)
        assert abs(len(read_both(path)) - expected) <= 3_000
    for content in (one[:-1], one[: len(one) // 2], bare[:-5]):
        path.write_bytes(content)
        assert "cut off" in fault_in_both(path).message


def test_flac_of_unknown_length(tmp_path):
    path = tmp_path / "a.flac"
    content = bytearray(compressed(path))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    assert len(read_both(path)) == 48_000
    path.write_bytes(content[:-3])
    assert "cut off" in fault_in_both(path).message


def test_every_format_is_whole_where_it_is(tmp_path):
    check_sound(tmp_path)


def test_a_format_without_a_length_is_noted(tmp_path):
    soundfile.write(tmp_path / "a.sf", np.zeros(1_000), 16_000, format="IRCAM", subtype="PCM_16")
    assert "do not say how long they are" in AudioSource.open(tmp_path / "a.sf").note
    soundfile.write(tmp_path / "a.wav", np.zeros(1_000), 16_000)
    assert AudioSource.open(tmp_path / "a.wav").note is None


@pytest.mark.parametrize("rate", [44_101, 99_991])
def test_odd_rates_take_little_memory(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(rate), rate)
    assert len(read_both_lengths(tmp_path / "a.wav")) == 16_000
    resampler = Resampler(rate, 16_000)
    taps = kernel(resampler.old, resampler.new, resampler.width)
    assert sum(run.taps.numel() * 4 for run in taps) < 20e6 and kernel.cache_info().maxsize <= 4


def read_both_lengths(path) -> torch.Tensor:
    whole = read_audio(path)
    assert sum(map(len, AudioSource.open(path).blocks(7_000))) == len(whole)
    return whole


@pytest.mark.parametrize("rate", [999, 384_001, 10**8])
def test_rates_that_nobody_records_at_are_refused(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(1_000), rate)
    for read in (AudioSource.open, read_audio):
        with pytest.raises(UserError, match=rf"expected audio at 1,000 to 384,000 Hz, but its header says {rate:,} Hz"):
            read(tmp_path / "a.wav")


def write_by_av(path, coding: str) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(coding, rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.sin(np.arange(96_000) / 20, dtype=np.float32)[None], "fltp", "mono")
        frame.sample_rate = 48_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.mark.parametrize(
    ("name", "coding"), [("a.m4a", "aac"), ("a.MP4", "aac"), ("a.webm", "libopus"), ("a.aac", "aac")]
)
def test_what_libsndfile_does_not_read(tmp_path, name, coding, monkeypatch):
    path = tmp_path / name
    write_by_av(tmp_path / name.lower(), coding)
    (tmp_path / name.lower()).rename(path)
    audio = read_both_lengths(path)
    assert abs(len(audio) - 32_000) <= 2_100 and 0.5 < audio.abs().max() < 1.5
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    fault_or_refusal(path)
    path.write_bytes(content)
    monkeypatch.setattr(reader, "av", None)
    with pytest.raises(UserError, match=r"pip install 'cald-speech\[formats\]'"):
        AudioSource.open(path)


def fault_or_refusal(path) -> None:
    with pytest.raises(UserError):
        read_audio(path)
    try:
        source = AudioSource.open(path)
    except UserError:
        return
    assert list(source.blocks(7_000)) and source.fault is not None
