"""Live reading with enough lookahead reads what one pass reads; with attention there is no live reading."""

import pytest
import torch

from cald_speech import LayerMap, convert
from cald_speech.data.audio import SAMPLE_RATE, write_audio
from cald_speech.data.manifests import write_manifest
from cald_speech.errors import UserError
from cald_speech.evaluation import lookahead
from cald_speech.families import families
from cald_speech.families.hub import load_processor
from cald_speech.mixers import Bidirectional
from tests.training.miniature import write_model


@pytest.fixture
def manifest(tmp_path):
    generator, entries = torch.Generator().manual_seed(0), {}
    for n in range(4):
        path = tmp_path / f"{n}.flac"
        write_audio(path, 0.1 * torch.randn(SAMPLE_RATE, generator=generator))
        entries[f"u{n}"] = {"audio": path, "duration_s": 1.0, "text": "AB CD"}
    write_manifest(tmp_path / "m.json", entries)
    return tmp_path / "m.json"


def student(folder):
    family = families()["wav2vec2"]
    model = family.load(str(write_model(folder)))
    convert(model, LayerMap(Bidirectional), initialise="random")
    processor = load_processor(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_table_of_lookaheads(manifest, tmp_path):
    options = {"lookaheads_s": [0.0, 30.0], "join": 2, "utterances": 4}
    found = lookahead.evaluate_lookaheads(str(student(tmp_path / "student")), manifest, **options)
    rows = {row["lookahead"]: row for row in found}
    assert list(rows) == ["whole", "0 s", "30 s"] and rows["whole"]["latency s"] is None
    assert rows["30 s"]["latency s"] == rows["0 s"]["latency s"] + 30
    # It hears all of the audio before it begins, and so normalises by all of it.
    assert {k: v for k, v in rows["30 s"].items() if k not in ("lookahead", "latency s")} == {
        k: v for k, v in rows["whole"].items() if k not in ("lookahead", "latency s")
    }


def test_a_teacher_cannot_run_live(manifest, tmp_path):
    teacher = str(write_model(tmp_path / "teacher"))
    with pytest.raises(UserError, match=r"need the whole audio: 0 \(attention\)"):
        lookahead.evaluate_lookaheads(teacher, manifest, lookaheads_s=[0.0], join=2, utterances=4)
