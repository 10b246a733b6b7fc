"""The same utterances in every format that is read, written as other tools write them."""

import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from cald_speech.data.manifests import write_manifest


class Utterance(NamedTuple):
    id: str  # <speaker>-<chapter>-<number>
    samples: np.ndarray  # 16 kHz
    text: str

    @property
    def duration_s(self) -> float:
        return len(self.samples) / 16_000

    @property
    def speaker(self) -> str:
        return self.id.split("-")[0]


def miniature() -> list[Utterance]:
    generator = np.random.default_rng(0)
    texts = {"3-7-0000": "HELLO, WORLD", "3-7-0001": "IT'S ME", "4-8-0000": 'SAID "NO"'}
    return [Utterance(k, 0.1 * generator.standard_normal(8_000 + 160 * n), t) for n, (k, t) in enumerate(texts.items())]


def _audio(folder: Path, utterances: Sequence[Utterance], ending: str = "flac") -> dict[str, Path]:
    (folder / "clips").mkdir(parents=True)
    places = {u.id: folder / "clips" / f"{u.id}.{ending}" for u in utterances}
    for u in utterances:
        soundfile.write(places[u.id], u.samples, 16_000)
    return places


def write_sphere(path: Path, samples: np.ndarray, *, coding: str = "pcm") -> None:
    """NIST SPHERE at 16 kHz whose header says ``coding``; the samples are PCM whatever it says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, 16_000, format="NIST", subtype="PCM_16")
    said = f"sample_coding -s{len(coding)} {coding}\n".encode()
    header, sound = path.read_bytes()[:1024], path.read_bytes()[1024:]
    path.write_bytes(header.replace(b"sample_coding -s3 pcm\n", said)[:1024].ljust(1024) + sound)


def _ours(folder: Path, utterances: Sequence[Utterance]) -> Path:
    places = _audio(folder, utterances)
    rows = {
        u.id: {
            "audio": places[u.id].relative_to(folder),
            "duration_s": u.duration_s,
            "text": u.text,
            "speaker": u.speaker,
        }
        for u in utterances
    }
    write_manifest(folder / "ours.json", rows)
    return folder / "ours.json"


def _csv(folder: Path, utterances: Sequence[Utterance]) -> Path:
    places = _audio(folder, utterances, "wav")
    quoted = [
        '{},clips/{},{},"{}"'.format(u.id, places[u.id].name, u.speaker, u.text.replace('"', '""')) for u in utterances
    ]
    (folder / "a.csv").write_text("\n".join(["id,path,speaker,sentence", *quoted, ""]), encoding="utf-8-sig")
    return folder / "a.csv"


def _tsv(folder: Path, utterances: Sequence[Utterance]) -> Path:
    _audio(folder, utterances)
    lines = [f"clips/{u.id}.flac\t{u.text}\t{u.id}\t{u.speaker}" for u in utterances]
    (folder / "a.tsv").write_text("\r\n".join(["path\tsentence\tutt_id\tclient_id", *lines]), encoding="utf-16")
    return folder / "a.tsv"


def _speechbrain_csv(folder: Path, utterances: Sequence[Utterance]) -> Path:
    _audio(folder, utterances)
    quoted = [
        '{},{},{{data_root}}/clips/{}.flac,{},"{}"'.format(
            u.id, u.duration_s, u.id, u.speaker, u.text.replace('"', '""')
        )
        for u in utterances
    ]
    (folder / "a.csv").write_text("\n".join(["ID,duration,wav,spk_id,wrd", *quoted, ""]))
    return folder / "a.csv"


def _speechbrain_json(folder: Path, utterances: Sequence[Utterance]) -> Path:
    """All of one speaker's utterances are parts of one file, told in samples."""
    places = _audio(folder, utterances)
    rows = {
        u.id: {
            "wav": {"file": str(places[u.id]), "start": 0, "stop": len(u.samples)},
            "length": u.duration_s,
            "words": u.text,
            "spk_id": u.speaker,
        }
        for u in utterances
    }
    (folder / "a.json").write_text(json.dumps(rows, indent=2))
    return folder / "a.json"


def _nemo(folder: Path, utterances: Sequence[Utterance]) -> Path:
    _audio(folder, utterances)
    rows = [
        {
            "audio_filepath": f"clips/{u.id}.flac",
            "duration": u.duration_s,
            "text": u.text,
            "id": u.id,
            "speaker": u.speaker,
            "offset": 0.0,
        }
        for u in utterances
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "a.jsonl"


def _nemo_json(folder: Path, utterances: Sequence[Utterance]) -> Path:
    """NeMo calls its lines .json."""
    return _nemo(folder, utterances).rename(folder / "manifest.json")


def _nemo_tarred(folder: Path, utterances: Sequence[Utterance]) -> Path:
    """As convert_to_tarred_audio_dataset.py writes them: a manifest beside all archives, and one for each of them."""
    (folder / "sharded_manifests").mkdir(parents=True)
    rows = []
    for number, u in enumerate(utterances):
        row = {"audio_filepath": f"{u.id}.flac", "duration": u.duration_s, "text": u.text, "speaker": u.speaker}
        rows.append(json.dumps(row | {"shard_id": number}) + "\n")
        (folder / "sharded_manifests" / f"manifest_{number}.json").write_text(rows[-1])
        with tarfile.open(folder / f"audio_{number}.tar", "w") as archive:
            _add(archive, f"{u.id}.flac", _flac(u))
    (folder / "tarred_audio_manifest.json").write_text("".join(rows))
    return folder


def _list(folder: Path, utterances: Sequence[Utterance]) -> Path:
    rows = [json.loads(line) for line in _nemo(folder, utterances).read_text().splitlines()]
    (folder / "list.json").write_text(json.dumps(rows, indent=1))
    return folder / "list.json"


def _table_without_names(folder: Path, utterances: Sequence[Utterance]) -> Path:
    _audio(folder, utterances)
    said = [u.text.replace('"', '""') for u in utterances]
    lines = [f'{u.id}|{u.speaker}|clips/{u.id}.flac|"{text}"' for u, text in zip(utterances, said, strict=True)]
    (folder / "a.csv").write_text("\n".join(lines))
    return folder / "a.csv"


def _kaldi(folder: Path, utterances: Sequence[Utterance]) -> Path:
    """The utterances lie one after the other in one recording, cut by segments."""
    folder.mkdir(parents=True)
    soundfile.write(folder / "all.flac", np.concatenate([u.samples for u in utterances]), 16_000)
    ends = np.cumsum([len(u.samples) for u in utterances]) / 16_000
    starts = [0.0, *ends[:-1]]
    files = {
        "wav.scp": ["rec all.flac"],
        "segments": [f"{u.id} rec {start} {end}" for u, start, end in zip(utterances, starts, ends, strict=True)],
        "text": [f"{u.id} {u.text}" for u in utterances],
        "utt2spk": [f"{u.id} {u.speaker}" for u in utterances],
    }
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def _librispeech(folder: Path, utterances: Sequence[Utterance]) -> Path:
    for u in utterances:
        speaker, chapter, _ = u.id.split("-")
        place = folder / speaker / chapter
        place.mkdir(parents=True, exist_ok=True)
        soundfile.write(place / f"{u.id}.wav", u.samples, 16_000)
        with (place / f"{speaker}-{chapter}.trans.txt").open("a", encoding="utf-8-sig") as file:
            file.write(f"{u.id} {u.text}\n")
    return folder


def _pairs(folder: Path, utterances: Sequence[Utterance]) -> Path:
    places = _audio(folder, utterances)
    for u in utterances:
        places[u.id].with_suffix(".txt").write_text(u.text + "\n", encoding="utf-8-sig")
        (places[u.id].parent / f"._{u.id}.flac").write_bytes(b"\0\5\26\7")  # what macOS leaves on foreign disks
    return folder / "clips"


def _audiofolder(folder: Path, utterances: Sequence[Utterance]) -> Path:
    _audio(folder, utterances)
    rows = [
        {"file_name": f"clips/{u.id}.flac", "transcription": u.text, "id": u.id, "speaker_id": u.speaker}
        for u in utterances
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _flac(u: Utterance) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, u.samples, 16_000, format="FLAC")
    return content.getvalue()


def _parquet(folder: Path, utterances: Sequence[Utterance]) -> Path:
    from datasets import Audio, Dataset, Features, Value

    rows = {
        "audio": [{"bytes": _flac(u), "path": f"{u.id}.flac"} for u in utterances],
        "text": [u.text for u in utterances],
        "speaker_id": [u.speaker for u in utterances],
    }
    file = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"audio": file, "text": Value("string"), "speaker_id": Value("string")})
    folder.mkdir(parents=True)
    table = Dataset.from_dict(rows, features=features).cast_column("audio", Audio(decode=False))
    table.to_parquet(str(folder / "a.parquet"))
    return folder / "a.parquet"


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _webdataset(folder: Path, utterances: Sequence[Utterance]) -> Path:
    folder.mkdir(parents=True)
    for number, u in enumerate(utterances):  # a shard each
        with tarfile.open(folder / f"{number:06d}.tar", "w") as archive:
            _add(archive, f"{u.id}.flac", _flac(u))
            _add(archive, f"{u.id}.txt", u.text.encode())
            _add(archive, f"{u.id}.json", json.dumps({"speaker": u.speaker}).encode())
    return folder


def _cut(u: Utterance, recording: dict | None) -> dict:
    said = {"id": u.id, "recording_id": u.id, "start": 0.0, "duration": u.duration_s, "channel": 0, "text": u.text}
    cut = {
        "id": u.id,
        "start": 0.0,
        "duration": u.duration_s,
        "channel": 0,
        "supervisions": [said | {"speaker": u.speaker}],
    }
    return cut | ({} if recording is None else {"recording": recording}) | {"type": "MonoCut"}


def _recording(u: Utterance, source: dict) -> dict:
    facts = {"sampling_rate": 16_000, "num_samples": len(u.samples), "duration": u.duration_s, "channel_ids": [0]}
    return {"id": u.id, "sources": [{"channels": [0], **source}], **facts}


def _cuts(folder: Path, utterances: Sequence[Utterance]) -> Path:
    places = _audio(folder, utterances)
    rows = [_cut(u, _recording(u, {"type": "file", "source": str(places[u.id])})) for u in utterances]
    with gzip.open(folder / "cuts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder / "cuts.jsonl.gz"


def _shar(folder: Path, utterances: Sequence[Utterance]) -> Path:
    folder.mkdir(parents=True)
    with gzip.open(folder / "cuts.000000.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(_cut(u, None)) + "\n" for u in utterances)
    with tarfile.open(folder / "recording.000000.tar", "w") as archive:
        for u in utterances:
            _add(archive, f"{u.id}.flac", _flac(u))
            _add(archive, f"{u.id}.json", json.dumps(_recording(u, {"type": "shar", "source": ""})).encode())
    return folder


FORMATS: dict[str, Callable[[Path, Sequence[Utterance]], Path]] = {
    "our JSON": _ours,
    "CSV": _csv,
    "TSV": _tsv,
    "SpeechBrain CSV": _speechbrain_csv,
    "SpeechBrain JSON": _speechbrain_json,
    "NeMo": _nemo,
    "NeMo .json": _nemo_json,
    "NeMo tarred": _nemo_tarred,
    "JSON list": _list,
    "table without names": _table_without_names,
    "Kaldi": _kaldi,
    "LibriSpeech": _librispeech,
    "text beside": _pairs,
    "audiofolder": _audiofolder,
    "parquet": _parquet,
    "WebDataset": _webdataset,
    "lhotse cuts": _cuts,
    "lhotse shards": _shar,
}
"""name -> (a folder that is not there yet, utterances) -> what a user gives as the source."""
COLUMNS: dict[str, dict[str, int]] = {"table without names": {"id": 1, "speaker": 2, "audio": 3, "text": 4}}
"""What a user says beside it."""


def write(name: str, folder: Path, utterances: Sequence[Utterance]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return FORMATS[name](folder, utterances)
