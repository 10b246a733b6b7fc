"""Corpora in every format give the same utterances; what is malformed is named with file and line."""

import csv
import gzip
import io
import json
import os
import sys
import tarfile
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from cald_speech.data import manifests
from cald_speech.data.audio import read_entry
from cald_speech.data.manifests import read_manifest
from cald_speech.data.readers import manifest_of, prepare_corpus, read_corpus
from cald_speech.errors import UserError
from tests.data.corpora import COLUMNS, FORMATS, miniature, write


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same(tmp_path, name):
    said = miniature()
    prepare_corpus(tmp_path / "out" / "a.json", write(name, tmp_path / "corpus", said), columns=COLUMNS.get(name))
    entries = read_manifest(tmp_path / "out" / "a.json")
    assert {key: entry["text"] for key, entry in entries.items()} == {u.id: u.text for u in said}
    for u in said:
        assert entries[u.id].get("speaker", u.speaker) == u.speaker and ("speaker" in entries[u.id]) == (
            name != "text beside"
        )
        assert entries[u.id]["duration_s"] == pytest.approx(u.duration_s, abs=1e-4)
        assert ("start_s" in entries[u.id]) == (name == "Kaldi")
        audio = read_entry(entries[u.id])
        assert torch.allclose(audio, torch.from_numpy(u.samples).float(), atol=1e-4)


def write_wav(path, seconds=0.5, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(round(seconds * rate)), rate)
    return path


def entries_of(folder, source, **how):
    prepare_corpus(folder / "made.json", source, **how)
    return read_manifest(folder / "made.json")


def test_columns_are_named_and_labels_are_joined(tmp_path):
    write_wav(tmp_path / "a.wav")
    (tmp_path / "a.csv").write_text("where;what;how;accent\na.wav;alarm;set;none\n")
    columns = {"audio": "where", "text": ["what", "how"], "dialect": "accent"}
    entry = entries_of(tmp_path, tmp_path / "a.csv", columns=columns)["a"]
    assert entry == {"audio": str(tmp_path / "a.wav"), "duration_s": 0.5, "text": "alarm set", "dialect": "none"}


def test_folders_as_labels(tmp_path):
    for label in ("yes", "no"):
        write_wav(tmp_path / "data" / label / "a.wav")
    entries = entries_of(tmp_path, tmp_path / "data", columns={"text": "folder"})
    assert {key: entry["text"] for key, entry in entries.items()} == {"yes/a": "yes", "no/a": "no"}


def test_parts_of_a_file_in_samples_and_in_seconds(tmp_path):
    write_wav(tmp_path / "a.wav", 2.0, rate=8_000)
    (tmp_path / "sb.csv").write_text("ID,wav,start,stop,wrd\nu,a.wav,4000,12000,YES\n")
    (tmp_path / "s.jsonl").write_text('{"id": "u", "audio": "a.wav", "start": 0.5, "end": 1.5, "text": "YES"}\n')
    first, second = (entries_of(tmp_path, tmp_path / name)["u"] for name in ("sb.csv", "s.jsonl"))
    assert first == second and (first["start_s"], first["duration_s"]) == (0.5, 1.0)


def test_work_is_done_once(tmp_path, monkeypatch):
    source, looked_up = write("CSV", tmp_path / "corpus", miniature()), []
    real = manifests.usable_s
    monkeypatch.setattr(manifests, "usable_s", lambda path, **how: looked_up.append(path) or real(path, **how))
    monkeypatch.setattr(manifests, "_MANY", 2)  # several at once
    for _ in range(2):
        entries_of(tmp_path, source)
    assert len(looked_up) == 3
    write_wav(tmp_path / "corpus" / "clips" / "3-7-0001.wav", 0.7)
    assert entries_of(tmp_path, source)["3-7-0001"]["duration_s"] == 0.7


def test_audio_in_archives_is_written_again_when_it_is_gone(tmp_path):
    source = write("WebDataset", tmp_path / "corpus", miniature())
    for entry in entries_of(tmp_path, source).values():
        Path(entry["audio"]).unlink()
    assert all(read_entry(entry).numel() for entry in entries_of(tmp_path, source).values())


def test_commands_keep_manifests_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CALD_SPEECH_CACHE", str(tmp_path / "cache"))
    source = write("NeMo", tmp_path / "corpus", miniature())
    path = manifest_of(source)
    assert path.stem == "a" and path.is_relative_to(tmp_path / "cache") and path == manifest_of(source)
    assert manifest_of(path) == path  # one of ours already
    relative = write("our JSON", tmp_path / "ours", miniature())
    assert manifest_of(relative) != relative and len(read_manifest(manifest_of(relative))) == 3


def test_archives_that_lost_something(tmp_path, caplog):
    """Cut off between two members, nothing but the archive's end is missing."""
    source = write("WebDataset", tmp_path / "corpus", miniature())
    last = sorted(source.glob("*.tar"))[-1]
    with tarfile.open(last) as archive:
        second = archive.getmembers()[1].offset
    last.write_bytes(last.read_bytes()[:second])
    with pytest.raises(UserError, match=r"000002\.tar: the archive is cut off"):
        entries_of(tmp_path, source)
    shards = write("lhotse shards", tmp_path / "shards", miniature())
    table = shards / "cuts.000000.jsonl.gz"
    table.write_bytes(gzip.compress(b"".join(gzip.decompress(table.read_bytes()).splitlines(keepends=True)[1:])))
    with pytest.raises(UserError, match=r"expected a cut in cuts\.000000\.jsonl\.gz for 3-7-0000"):
        entries_of(tmp_path, shards)
    folder = write("Kaldi", tmp_path / "kaldi", miniature())
    (folder / "wav.scp").write_text("rec all.flac\nother all.flac\n")
    assert entries_of(tmp_path, folder) and "no segment names 1 of 2 recordings" in caplog.text


def test_where_nemos_archives_are(tmp_path):
    """Shard by shard, elsewhere, as parts of one file; what no line names is passed over, what is not there is told."""
    said = miniature()
    folder = write("NeMo tarred", tmp_path / "corpus", said)
    shards = f"{folder}/sharded_manifests/manifest_{{0..1}}.json"
    assert list(entries_of(tmp_path, shards)) == [u.id for u in said[:2]]
    (tmp_path / "away").mkdir()
    for path in folder.glob("*.tar"):
        path.rename(tmp_path / "away" / path.name)
    manifest = folder / "tarred_audio_manifest.json"
    with pytest.raises(UserError, match=r"there is no \.tar beside the manifest.*\?tars="):
        entries_of(tmp_path / "none", folder)
    assert len(entries_of(tmp_path / "b", f"{manifest}?tars=../away/audio__OP_0..2_CL_.tar")) == 3
    with pytest.raises(UserError, match=r"manifest\.json:3: expected the audio 4-8-0000 in one of 2 archives"):
        entries_of(tmp_path / "c", f"{manifest}?tars=../away/audio__OP_0..1_CL_.tar")
    with pytest.raises(UserError, match=r"audio_3\.tar: expected NeMo's manifests and archives.* no such file"):
        entries_of(tmp_path / "d", f"{manifest}?tars=../away/audio__OP_0..3_CL_.tar")
    row = {"audio_filepath": "3-7-0000.flac", "duration": 0.2, "offset": 0.0, "text": "A"}
    parts = [row, row | {"audio_filepath": "3-7-0000-sub1.flac", "offset": 0.2, "text": "B"}]
    manifest.write_text("".join(json.dumps(part) + "\n" for part in parts))
    entries = entries_of(tmp_path / "e", f"{manifest}?tars=../away/audio__OP_0..2_CL_.tar")
    found = {key: (entry["text"], entry["start_s"], entry["duration_s"]) for key, entry in entries.items()}
    assert found == {"3-7-0000": ("A", 0.0, 0.2), "3-7-0000-sub1": ("B", 0.2, 0.2)}


def test_a_pattern_of_archives(tmp_path):
    source = write("WebDataset", tmp_path / "corpus", miniature())
    assert len(entries_of(tmp_path, f"{source}/{{000000..000001}}.tar")) == 2
    for wrong, told in (
        ("{000000..000007}", "there is no .*000003.tar"),
        ("{3..1}", "a range from a number to a higher"),
    ):
        with pytest.raises(UserError, match=told):
            entries_of(tmp_path, f"{source}/{wrong}.tar")


TABLES = {
    "commas": ("a.csv", 'a.wav,"x, y"\nb.wav,z\n', {"audio": 1, "text": 2}, ["x, y", "z"]),
    "semicolons": ("a.csv", "x, y;a.wav\nz, z, z;b.wav\n", {"audio": 2, "text": "1"}, ["x, y", "z, z, z"]),
    "tabs": ("a.tsv", 'a.wav\tx "y"\nb.wav\tz\n', {"audio": 1, "text": 2}, ['x "y"', "z"]),
    "two texts": ("a.csv", "a.wav,x,y\nb.wav,z,z\n", {"audio": 1, "text": [2, 3]}, ["x y", "z z"]),
    "names that are numbers": ("a.csv", "0,1\na.wav,x\nb.wav,z\n", {"audio": 0, "text": 1}, ["x", "z"]),
}


@pytest.mark.parametrize("case", TABLES)
def test_columns_by_number(tmp_path, case):
    name, content, columns, texts = TABLES[case]
    for audio in "ab":
        write_wav(tmp_path / f"{audio}.wav")
    entries = entries_of(tmp_path, plain(tmp_path, name, content), columns=columns)
    assert [entry["text"] for entry in entries.values()] == texts and list(entries) == ["a", "b"]


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({"audio": 0, "text": 1}, "a.csv:1: expected columns that are counted from 1.*got 0"),
        ({"audio": 1, "text": 3}, "a.csv:1: expected 3 fields or more.*got 2"),
        ({"audio": 1, "text": "said"}, "a.csv:2: expected the column '1', which `columns` names for audio"),
        ({"audio": True, "text": 2}, "columns: expected a key such as text and the name of a column, got audio: True"),
    ],
)
def test_numbers_that_are_no_columns(tmp_path, columns, told):
    with pytest.raises(UserError, match=told):
        entries_of(tmp_path, plain(tmp_path, "a.csv", "a.wav,x\nb.wav,z\n"), columns=columns)


def mixed(folder):
    """Two recordings one after the other, one channel of two, and a recording that goes on in silence."""
    lhotse = pytest.importorskip("lhotse")
    write_wav(folder / "a.wav")
    soundfile.write(folder / "two.wav", np.stack([np.zeros(8_000), np.full(8_000, 0.25)], 1), 16_000)
    one, two = (lhotse.Recording.from_file(folder / name, recording_id=name) for name in ("a.wav", "two.wav"))

    def said(recording, text):
        return [lhotse.SupervisionSegment(recording.id, recording.id, 0, 0.5, text=text, speaker="s")]

    first = lhotse.MonoCut("a", 0, 0.5, 0, said(one, "A"), recording=one)
    second = lhotse.MonoCut("two", 0, 0.5, 1, said(two, "B"), recording=two)
    cuts = lhotse.CutSet.from_cuts([first.append(second).with_id("both"), second, first.pad(0.7).with_id("padded")])
    cuts.to_file(folder / "cuts.jsonl.gz")
    return folder / "cuts.jsonl.gz"


def test_what_lhotse_makes(tmp_path):
    source = mixed(tmp_path)
    entries = entries_of(tmp_path / "out", source)
    found = {key: (entry["text"], entry["duration_s"], entry["speaker"]) for key, entry in entries.items()}
    assert found == {"both": ("A B", 1.0, "s"), "two": ("B", 0.5, "s"), "padded": ("A", 0.7, "s")}
    both = read_entry(entries["both"])
    assert torch.allclose(both, torch.cat([torch.zeros(8_000), torch.full((8_000,), 0.25)]), atol=1e-3)
    Path(entries["two"]["audio"]).unlink()
    assert read_entry(entries_of(tmp_path / "out", source)["two"]).numel() == 8_000


def test_lhotse_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lhotse.serialization", None)
    recording = {"sources": [{"type": "url", "source": "https://x.org/a.wav", "channels": [0]}]}
    cut = {"id": "u", "type": "MonoCut", "start": 0, "duration": 1, "channel": 0, "recording": recording}
    cut["supervisions"] = [{"text": "x"}]
    source = plain(tmp_path, "a.jsonl", json.dumps(cut))
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*a recording of type 'url', for which lhotse is needed: pip"):
        entries_of(tmp_path, source)


def test_several_sources_are_one_set(tmp_path):
    said = miniature()
    one, other = write("CSV", tmp_path / "a", said[:2]), write("Kaldi", tmp_path / "b", said[2:])
    prepare_corpus(tmp_path / "out.json", one, other)
    assert list(read_manifest(tmp_path / "out.json")) == [u.id for u in said]
    with pytest.raises(UserError, match=r"b/text:1.* '3-7-0000' is in .*a\.csv:2 too|a\.csv:2"):
        prepare_corpus(tmp_path / "out.json", one, write("Kaldi", tmp_path / "b", said))


def test_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_parquet(str(write("parquet", tmp_path / "corpus", miniature())))
    asked = []

    def load(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision, streaming))
        return table.to_iterable_dataset() if streaming else table

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = "hf://owner/name?split=test&config=en&limit=2"
    for address in (source, source + "&streaming=yes&revision=main"):
        assert sorted(entries_of(tmp_path, address)) == ["3-7-0000", "3-7-0001"]
    assert asked == [("owner/name", "en", "test", None, False), ("owner/name", "en", "test", "main", True)]
    for wrong in (
        "hf://owner/name",
        "hf://?split=test",
        "hf://owner/name?split=test&limit=0",
        "hf://o/n?split=a&slit=b",
    ):
        with pytest.raises(UserError, match=r"expected hf://owner/name\?split=train"):
            list(read_corpus(wrong))
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(UserError, match=r"which runs no code of a data set's, but 3.6.0 is installed"):
        list(read_corpus(source))


def test_classes_by_their_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"path": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"path": [str(write_wav(tmp_path / f"{name}.wav")) for name in "ab"], "label": [1, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    assert [entry["text"] for entry in entries_of(tmp_path, tmp_path / "a.parquet").values()] == ["yes", "no"]


def test_files_are_found_under_the_names_of_other_systems(tmp_path, monkeypatch):
    """A link before .., the home folder, an address of a file, Common Voice's folder, Windows, and macOS's letters."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "deep" / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "inside")
    accent = "\N{LATIN SMALL LETTER E WITH ACUTE}"
    places = {
        "link/../a.wav": "deep/a.wav",
        "~/b.wav": "home/b.wav",
        f"file://{tmp_path}/c%20d.wav": "c d.wav",
        "e.wav": "clips/e.wav",
        "sub\\f.wav": "sub/f.wav",
        f"{accent}.wav": unicodedata.normalize("NFD", f"{accent}.wav"),
    }
    for place in places.values():
        write_wav(tmp_path / place)
    source = plain(tmp_path, "a.csv", "id,path,label\n" + "".join(f"{n},{p},yes \n" for n, p in enumerate(places)))
    entries = entries_of(tmp_path, source)
    found = [Path(entry["audio"]).resolve() for entry in entries.values()]
    assert found == [tmp_path / place for place in places.values()]
    assert {entry["text"] for entry in entries.values()} == {"yes"}  # a blank makes no other label


def test_texts_beside_files_of_other_systems(tmp_path):
    accent = "\N{LATIN SMALL LETTER E WITH ACUTE}"
    for name, said in (("A.WAV", "A.TXT"), (unicodedata.normalize("NFD", f"{accent}.wav"), f"{accent}.txt")):
        write_wav(tmp_path / "data" / name)
        plain(tmp_path / "data", said, "hello")
    assert [entry["text"] for entry in entries_of(tmp_path, tmp_path / "data").values()] == ["hello", "hello"]
    plain(tmp_path / "data", "README.txt", "about")
    with pytest.raises(UserError, match=r"README\.txt: expected audio of that name.*elsewhere, or give a table"):
        entries_of(tmp_path, tmp_path / "data")
    (tmp_path / "data" / "README.txt").unlink()
    os.rename(tmp_path / "data" / "A.WAV", os.fsencode(tmp_path / "data") + b"/\xe9.wav")
    with pytest.raises(UserError, match=r"expected (names of files and folders in UTF-8|its transcript)"):
        entries_of(tmp_path, tmp_path / "data")
    with pytest.raises(UserError, match=r"expected names of files and folders in UTF-8.*Rename it"):
        entries_of(tmp_path, tmp_path / "data", columns={"text": "folder"})


def member(name, size, pax=None):
    made = tarfile.TarInfo(name)
    made.size, made.pax_headers = size, pax or {}
    return made


def test_archives_of_a_mac_and_of_an_enemy(tmp_path):
    sound = write_wav(tmp_path / "a.wav").read_bytes()
    with tarfile.open(tmp_path / "mac.tar", "w") as archive:
        for name, content in (("._a.b.WAV", b"\0\5\26\7"), ("a.b.WAV", sound), ("a.b.TXT", b"hello")):
            archive.addfile(member(name, len(content)), io.BytesIO(content))
    assert entries_of(tmp_path, tmp_path / "mac.tar")["a.b"]["text"] == "hello"
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.wav"}
    with tarfile.open(tmp_path / "bomb.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        nothing = member("a.wav", 512, sparse | {"GNU.sparse.realsize": str(2**40)})
        archive.addfile(nothing, io.BytesIO(b"1\n0\n0\n".ljust(512, b"\0")))
    with pytest.raises(UserError, match=r"bomb\.tar: a\.wav: expected up to 1,073,741,824 bytes"):
        entries_of(tmp_path, tmp_path / "bomb.tar")
    with gzip.open(tmp_path / "bomb.jsonl.GZ", "wb", 1) as file:
        for _ in range(65):
            file.write(bytes(2**20))
    with pytest.raises(UserError, match=r"bomb\.jsonl\.GZ:1: expected lines of up to 67,108,864 bytes"):
        entries_of(tmp_path, tmp_path / "bomb.jsonl.GZ")


def test_parquet_as_data_sets_write_it(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    sound = write_wav(tmp_path / "a.wav").read_bytes()
    inside = [{"bytes": sound, "path": f"speaker{n}/001.wav"} for n in range(2)]
    parquet.write_table(pyarrow.table({"audio": inside, "text": ["x", "y"]}), tmp_path / "a.parquet")
    assert list(entries_of(tmp_path, tmp_path / "a.parquet")) == ["speaker0/001", "speaker1/001"]
    decoded = [{"array": [0.5] * 8_000, "sampling_rate": 16_000, "path": None}]
    parquet.write_table(pyarrow.table({"audio": decoded, "text": ["x"]}), tmp_path / "b.parquet")
    (entry,) = entries_of(tmp_path, tmp_path / "b.parquet").values()
    assert torch.equal(read_entry(entry), torch.full((8_000,), 0.5))
    columns = [pyarrow.array(["a.wav"]), pyarrow.array(["x"]), pyarrow.array(["y"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["path", "text", "text"]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet: expected each column once, but 'text'"):
        entries_of(tmp_path, tmp_path / "c.parquet")


def plain(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


AS_PROGRAMS_WRITE_THEM = {
    "Excel's first line": ("a.csv", 'sep=;\npath;text\na.wav;HE SAID "NO"\n'),
    "a comma in a name": ("a.csv", 'path;text;"note, free"\na.wav;"HE SAID ""NO""";x\n'),
    "blanks after commas": ("a.csv", 'ID, duration, wav, wrd\na, 0.5, a.wav, "HE SAID ""NO"""\n'),
    "R's TSV": ("a.tsv", '"path"\t"text"\n"a.wav"\t"HE SAID ""NO"""\n'),
    "pandas' TSV": ("a.tsv", 'path\ttext\na.wav\t"HE SAID ""NO"""\n'),
    "quotes that are letters": ("a.tsv", 'path\ttext\na.wav\tHE SAID "NO"\n'),
    "UTF-32": ("a.csv", 'path,text\na.wav,"HE SAID ""NO"""\n'.encode("utf-32")),
    "line ends of Windows twice": ("a.csv", 'path,text\r\r\na.wav,"HE SAID ""NO"""\r\r\n'),
}  # fmt: skip


@pytest.mark.parametrize("name", AS_PROGRAMS_WRITE_THEM)
def test_tables_as_programs_write_them(tmp_path, name):
    write_wav(tmp_path / "a.wav")
    entry = entries_of(tmp_path, plain(tmp_path, *AS_PROGRAMS_WRITE_THEM[name]))["a"]
    assert entry["text"] == 'HE SAID "NO"' and entry["audio"] == str(tmp_path / "a.wav")


FAULTS = {
    "no file": ("none.csv", None, "no such manifest or folder. Formats: .*CSV.*Kaldi"),
    "unknown ending": ("a.xlsx", "x", "in one of the formats known"),
    "empty": ("a.csv", "", "a.csv: expected a first line with the names"),
    "no text": ("a.csv", "path,said\na.wav,hello\n", r"a.csv:2: expected a column with the text.*'said'.*--columns"),
    "fields": ("a.csv", "path,text\na.wav,one, two\n", "a.csv:2: expected 2 fields.*got 3.*quotes"),
    "open quote": ("a.csv", 'path,text\n"a.wav,one\nb.wav,two\n', r"a.csv:2: expected a line of a table, but"),
    "latin 1": ("a.csv", b"path,text\na.wav,na\xefve\n", r"a.csv:2: expected a table in UTF-8.*0xEF"),
    "half of UTF-16": ("a.csv", "path,text\na.wav,x\n".encode("utf-16")[:-1], r"a.csv:\d: expected a table"),
    "column twice": ("a.csv", "path,text,text\na,b,c\n", "'text' is there twice"),
    "duration": ("a.csv", "path,text,duration\na.wav,x,-1\n", "a.csv:2: expected seconds from 0 on as duration"),
    "milliseconds": ("a.csv", "path,text,duration\na.wav,x,500\n", "a.csv:2: expected the duration .* 0.50, got 500"),
    "not a number": ("a.jsonl", '{"audio": "a.wav", "text": "x", "duration": NaN}', "a.jsonl:1: expected seconds"),
    "stop": ("a.csv", "path,text,start,end\na.wav,x,2,1\n", "a.csv:2: expected start < stop"),
    "same id": ("a.csv", "id,path,text\nu,a.wav,x\nu,b.wav,y\n", "a.csv:3: expected each utterance once.*a.csv:2"),
    "same key": ("a.json", '{"u": {},\n "u": {}}', r"'u' is there twice \(lines 1 and 2\)"),
    "broken JSON": ("a.json", '{"u": {"audio"', "a.json: expected a JSON manifest.*cannot be parsed"),
    "deep JSON": ("a.json", "[" * 100_000, "a.json: expected a JSON manifest"),
    "no object": ("a.json", '{"u":\n 3}', "utterance 'u': expected an object"),
    "line of JSON": ("a.jsonl", '{"audio": "a.wav", "text": "x"}\n[]\n', "a.jsonl:2: expected an object in one line"),
    "surrogate": ("a.jsonl", '{"audio": "a.wav", "text": "\\ud800"}\n', "a.jsonl:1: expected text as text"),
    "address": ("a.csv", "path,text\nhttps://x.org/a.wav,x\n", "a.csv:2: .*Download it first"),
    "no path": ("a.csv", "path,text\n,x\n", "a.csv:2: expected the path of an audio file"),
    "no audio": ("a.csv", "path,text\nb.wav,x\n", r"1 that cannot be used: .*a.csv:2: .*b.wav: there is no such audio"),
    "beyond the end": ("a.csv", "path,text,start,end\na.wav,x,0.2,9\n", "a.csv:2: the segment ends at 9 s.* at 0.5 s"),
    "short": ("a.csv", "path,text,start,end\na.wav,x,0.2,0.21\n", "a.csv:2: .*shorter than one frame"),
    "mixed cut": ("a.jsonl", '{"id": "u", "type": "MixedCut"}\n', "a.jsonl:1: expected a (part of one|cut)"),
    "lines of JSON": ("a.json", '{"audio": "a.wav", "text": "x"}\n[]\n', "a.json:2: expected an object in one line"),
    "list of JSON": ("a.json", '[{"audio": "a.wav", "text": "x"}, 3]', "a.json: entry 2: expected an object"),
    "range": ("none/manifest__OP_0..3_CL_.json", None, "manifest_0.json: expected NeMo's manifests"),
    "gzip": ("a.jsonl.gz", b"\x1f\x8b\x08junk", "compressed with gzip"),
    "tar": ("a.tar", b"junk" * 200, "expected a tar archive"),
    "parquet": ("a.parquet", b"PAR1junk", "expected a parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_malformed_is_named(tmp_path, fault):
    name, content, told = FAULTS[fault]
    write_wav(tmp_path / "a.wav")
    source = tmp_path / name if content is None else plain(tmp_path, name, content)
    with pytest.raises(UserError, match=told) as caught:
        entries_of(tmp_path, source)
    assert "\n" not in str(caught.value) and "elete" not in str(caught.value) and "emove" not in str(caught.value)
    assert not (tmp_path / "made.json").exists()


FOLDERS = {
    "pipe": ({"wav.scp": "r sph2pipe -f wav x.sph |\n", "text": "r hello\n"}, "wav.scp:1: .*got a pipe"),
    "archive": ({"wav.scp": "r wav.ark:17\n", "text": "r hello\n"}, "wav.scp:1: .*part of an archive"),
    "no text": ({"wav.scp": "r a.wav\n", "text": ""}, "wav.scp:1: expected r in .*text too"),
    "no recording": ({"wav.scp": "r a.wav\n", "text": "r x\ns y\n"}, "text:2: expected s in wav.scp too"),
    "segment": ({"wav.scp": "r a.wav\n", "text": "u x\n", "segments": "u q 0 1\n"}, "segments:1: expected a recording"),
    "twice": ({"wav.scp": "r a.wav\nr b.wav\n", "text": "r x\n"}, "wav.scp:2: expected each name once.*wav.scp:1"),
    "no text beside": ({"b.txt": "hello"}, "a.wav: expected its transcript in a.txt"),
    "no audio beside": ({"a.txt": "hello", "b.txt": "hello"}, "b.txt: expected audio of that name"),
    "no transcript": ({"3.trans.txt": "b hello\n"}, "a.wav: expected a transcript in a .trans.txt"),
    "no utterance": ({"3.trans.txt": "a hello\nb hello\n"}, "3.trans.txt:2: expected audio beside it for b"),
    "utterance twice": ({"3.trans.txt": "a hello\na hello\n"}, "3.trans.txt:2: .*3.trans.txt:1 too"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOLDERS)
def test_folders_that_do_not_fit(tmp_path, fault):
    files, told = FOLDERS[fault]
    write_wav(tmp_path / "data" / "a.wav")
    for name, content in files.items():
        plain(tmp_path / "data", name, content)
    with pytest.raises(UserError, match=told):
        entries_of(tmp_path, tmp_path / "data")


def test_what_cannot_be_used_is_left_out_where_that_is_said(tmp_path, caplog):
    write_wav(tmp_path / "a.wav")
    plain(tmp_path, "b.wav", "no audio")
    source = plain(tmp_path, "a.csv", "path,text\na.wav,x\nb.wav,y\n")
    assert list(entries_of(tmp_path, source, drop_bad_audio=True)) == ["a"]
    assert "left out 1" in caplog.text and "a.csv:3" in caplog.text


def test_a_field_may_have_line_breaks(tmp_path):
    write_wav(tmp_path / "a.wav")
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "text"], ["a.wav", "one\ntwo"], ["c.wav", "x"]])
    with pytest.raises(UserError, match=r"a\.csv:4: .*c\.wav"):
        entries_of(tmp_path, tmp_path / "a.csv")


def test_our_manifest_in_other_encodings(tmp_path):
    rows = {"a": {"audio": "/a.wav", "duration_s": 1.0, "text": "É"}}
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / "m.json").write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)
        assert read_manifest(tmp_path / "m.json") == rows
