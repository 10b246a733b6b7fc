"""Manifests: written sorted and whole, checked when read, and hashed without their paths."""

import json

import pytest
from speechbrain.dataio.dataset import DynamicItemDataset

from cald_speech.data.manifests import manifest_hash, read_manifest, total_duration_s, write_manifest
from cald_speech.errors import UserError


def entry(audio="/data/a.flac", duration_s=1.25, text="HELLO", **more):
    return {"audio": audio, "duration_s": duration_s, "text": text, **more}


def test_round_trip_is_sorted_and_rounded(tmp_path):
    path = tmp_path / "manifests" / "a.json"
    write_manifest(path, {"b": entry(text="ÜBER"), "a": entry(duration_s=1.234567, speaker="7", start_s=3.00004)})
    assert list(read_manifest(path)) == ["a", "b"]
    assert read_manifest(path)["a"] == entry(duration_s=1.2346, speaker="7", start_s=3.0)
    assert total_duration_s(path) == pytest.approx(2.4846)
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_speechbrain_loads_it(tmp_path):
    write_manifest(tmp_path / "a.json", {"a": entry()})
    dataset = DynamicItemDataset.from_json(tmp_path / "a.json", output_keys=["id", "text"])
    assert dataset[0] == {"id": "a", "text": "HELLO"}


def test_hash_is_of_the_data_not_of_the_place(tmp_path):
    def hash_of(**entries):
        write_manifest(tmp_path / "a.json", entries)
        return manifest_hash(tmp_path / "a.json")

    base = hash_of(a=entry(), b=entry(text="YOU"))
    assert base == hash_of(b=entry(text="YOU", audio="/elsewhere/b.flac"), a=entry(speaker="1", duration_s=1.25001))
    segments = [hash_of(a=entry(start_s=start_s), b=entry(text="YOU")) for start_s in (0.0, 2.5, 2.50001)]
    assert len({base, *segments}) == 3 and segments[1] == segments[2]
    others = [hash_of(a=entry()), hash_of(a=entry(), c=entry(text="YOU")), hash_of(a=entry(), b=entry(text="ME"))]
    assert len({base, hash_of(a=entry(duration_s=1.3), b=entry(text="YOU")), *others}) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such manifest"),
        ('{"a": {"audio"', "cannot be parsed"),
        ("[]", "at least one utterance"),
        ("{}", "at least one utterance"),
        ({"utt7": 3}, "utt7: expected an object"),
        ({"utt7": {"audio": "a", "duration_s": 1}}, 'utt7: expected a string as "text"'),
        ({"utt7": entry(audio=None)}, 'utt7: expected a string as "audio"'),
        ({"utt7": entry(duration_s="1")}, "utt7: expected a positive number"),
        ({"utt7": entry(duration_s=float("nan"))}, "utt7: expected a positive number"),
        ({"utt7": entry(duration_s=0)}, "utt7: expected a positive number"),
        ({"utt7": entry(start_s=-0.1)}, "utt7: expected a number of seconds from 0 on"),
        ({"utt7": entry(start_s=None)}, "utt7: expected a number of seconds from 0 on"),
        ({"utt7": entry(start_s=float("inf"))}, "utt7: expected a number of seconds from 0 on"),
    ],
)
def test_malformed_is_named(tmp_path, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
