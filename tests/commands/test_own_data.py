"""Commands read a corpus in any format in the place of a recipe's manifest."""

import json

import pytest
import soundfile

from cald_speech.data.manifests import read_manifest
from tests.commands.conftest import place  # noqa: F401


@pytest.fixture
def corpus(place, tmp_path, monkeypatch):  # noqa: F811
    """The utterances of the manifest as a CSV, and as segments of one recording."""
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path / "cache"))
    entries = read_manifest(place / "manifest.json")
    lines = [f'{key};{entry["audio"]};"{entry["text"]}"' for key, entry in entries.items()]
    (tmp_path / "a.csv").write_text("\n".join(["name;file;said", *lines]), encoding="utf-8-sig")
    return tmp_path


COLUMNS = ["--columns", "id=name,audio=file,text=said"]


def test_evaluate_a_table(call, place, corpus):  # noqa: F811
    summaries = []
    for source, more in ((place / "manifest.json", []), (corpus / "a.csv", COLUMNS)):
        done = call("evaluate", place / "student", source, *more, "--output_folder", corpus / "out", "--quiet")
        summaries.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = summaries
    assert first["wer"] == second["wer"] > 0 and first["manifest_hash"] == second["manifest_hash"]
    assert (corpus / "out" / "a.json").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "student", "a.csv"], r"a.csv:2: expected a column with the text"),
        (["evaluate", "student", "a.csv", "--columns", "text"], "--columns: expected such as audio=path"),
        (["evaluate", "student", "a.csv", "--columns", "text=x"], "expected the column 'x'"),
        (["transcribe", "--model", "student"], "expected FILE..., or --manifest"),
        (["transcribe", "--model", "student", "--columns", "text=x", "a.wav"], "--columns: expected a manifest"),
        (["align", "--model", "student", "a.wav"], "expected FILE and TEXT, or --manifest"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(call, place, corpus, monkeypatch, words, told):  # noqa: F811
    monkeypatch.chdir(corpus)
    (corpus / "student").symlink_to(place / "student")
    assert told in call(*words, status=2).stderr


def test_transcribe_and_align_a_manifest(call, place, corpus):  # noqa: F811
    """Without texts, where none are needed; a segment as its audio alone."""
    entries = read_manifest(place / "manifest.json")
    key, entry = next(iter(entries.items()))
    samples, rate = soundfile.read(entry["audio"])
    (corpus / "parts.jsonl").write_text(
        json.dumps({"id": "part", "audio": entry["audio"], "offset": 0.0, "duration": 0.5})
        + "\n"
        + json.dumps({"id": "far/../whole", "audio": entry["audio"]})
    )
    soundfile.write(corpus / "part.wav", samples[: rate // 2], rate)
    how = ["--model", place / "student"]
    call("transcribe", "--manifest", corpus / "parts.jsonl", *how, "--output_folder", corpus / "texts")
    alone = [call("transcribe", path, *how).stdout for path in (corpus / "part.wav", entry["audio"])]
    assert [(corpus / "texts" / name).read_text() for name in ("part.txt", "far%2F..%2Fwhole.txt")] == alone
    call(
        "align",
        "--manifest",
        corpus / "a.csv",
        *COLUMNS,
        *how,
        "--unknown",
        "drop",
        "--format",
        "ctm",
        "--output_folder",
        corpus / "times",
    )
    names = {path.stem: path.read_text().split()[0] for path in (corpus / "times").iterdir()}
    assert len(names) == len(entries) and names[key] == key
