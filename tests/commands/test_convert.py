"""`cald-speech convert`: a folder that loads as what it has become."""

import json
import re
import shutil

import pytest
import soundfile
import torch

import cald_speech
from cald_speech import from_pretrained
from cald_speech.conversion.model_card import read_facts
from cald_speech.data.audio import write_audio
from cald_speech.families import family_of
from cald_speech.families.hub import load_processor
from cald_speech.mixers import Bidirectional
from tests.training.test_faults import no_file_grows_past


def test_a_model_is_converted_but_for_the_layers_that_are_kept(call, place, tmp_path):
    told = call("convert", place / "teacher", tmp_path / "new", "--keep", 0, "--keep", 2, "--separate").output
    model = from_pretrained(tmp_path / "new")
    mixers = [family_of(model).mixer(layer) for layer in family_of(model).layers(model)]
    assert [type(mixer) for mixer in mixers] == [type(None), Bidirectional, type(None)]
    assert not mixers[1].share_projections and "layer" in told
    tokenizers = [load_processor(folder).tokenizer for folder in (tmp_path / "new", place / "teacher")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    facts = read_facts(tmp_path / "new")
    assert facts["teacher"] == str(place / "teacher") and facts["guidance"] == "none: not trained yet"
    assert facts["version"] == cald_speech.__version__ and facts["layers"] == "1 of 3 layers converted: Bidirectional"
    assert facts["parameters"].startswith(f"{sum(p.numel() for p in model.parameters()):,} (")


def test_padding_is_heard_as_the_tokenizers_blank(call, place, tmp_path):
    """Whatever the teacher's config calls it; transformers' pipeline reads letters out of the padding otherwise."""
    shutil.copytree(place / "teacher", tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))
    call("convert", tmp_path / "teacher", tmp_path / "new")
    model, processor = from_pretrained(tmp_path / "new"), load_processor(tmp_path / "new")
    heard = processor([torch.randn(n).numpy() for n in (9_000, 24_000)], sampling_rate=16_000, padding=True)
    with torch.no_grad():
        tokens = model(**heard.convert_to_tensors("pt")).logits.argmax(-1)
    assert config["pad_token_id"] == 0 and (tokens[0, -30:] == processor.tokenizer.pad_token_id).all()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["teacher", "--keep", "7"], "--keep: expected layers from 0 to 2, got 7"),
        (["nowhere"], "there is no folder"),
        (["teacher", "--head", "lm"], "head: expected one of base, ctc, classification"),
        (["teacher", "--initialise", "ones"], "'ones' is not one of 'attention', 'random'"),
    ],
    ids=["no such layer", "no such model", "no such head", "no such start"],
)
def test_what_cannot_be_converted(call, place, tmp_path, monkeypatch, words, told):
    monkeypatch.chdir(place)
    model, *options = words
    assert told in call("convert", model, tmp_path / "new", *options, status=2).stderr
    assert not (tmp_path / "new").exists()


def test_calibration_brings_slots_nearer_and_the_report_says_by_how_much(call, place, tmp_path):
    generator = torch.Generator().manual_seed(0)
    for number in range(16):
        sound = 0.1 * torch.randn(9_000 + 1_000 * number, generator=generator)
        write_audio(tmp_path / f"audio/{number:02}.wav", sound.cumsum(0) / 20)
    words = (place / "teacher", tmp_path / "new", "--keep", 1)
    told = call("convert", *words, "--calibrate", tmp_path / "audio").output
    slots = re.findall(r"layer (\d), \w+: error ([\d.]+) to ([\d.]+), norm ([\d.]+) to ([\d.]+); (.+)", told)
    assert [layer for layer, *_ in slots] == ["0", "2"]
    assert all(float(after) <= float(before) and float(after) < 0.95 for _, before, after, *_ in slots)
    calibrated = from_pretrained(tmp_path / "new").state_dict()
    assert "calibration" not in call("convert", *words).output
    plain = from_pretrained(tmp_path / "new").state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], calibrated[name])}
    assert {name for name in changed if not name.endswith(("A_log",))} == {
        name for name in plain if ".mixer." in name and ".out_proj." in name
    }


@pytest.mark.parametrize(
    ("fill", "told"),
    [
        (lambda folder: None, "expected a folder of audio, and there is none"),
        (lambda folder: folder.mkdir(), "expected audio files of up to 40 s"),
        (lambda folder: write_some(folder, 3), "at least 8 utterances that are not silent, got 3 (0 silent)"),
        (lambda folder: write_some(folder, 9, scale=0.0), "got 0 (9 silent)"),
        (lambda folder: write_some(folder, 9, scale=torch.nan), "samples are NaN or infinite"),
    ],
    ids=["no folder", "no audio", "too little", "silence", "NaN"],
)
def test_audio_that_cannot_calibrate(call, place, tmp_path, fill, told):
    fill(tmp_path / "audio")
    words = ("convert", place / "teacher", tmp_path / "new", "--calibrate", tmp_path / "audio")
    error = call(*words, status=2).stderr
    assert told in error and "Traceback" not in error and not (tmp_path / "new").exists()


def write_some(folder, count: int, scale: float = 0.1) -> None:
    folder.mkdir()
    for number in range(count):
        sound = scale * torch.randn(8_000, generator=torch.Generator().manual_seed(number)).numpy()
        soundfile.write(folder / f"{number}.wav", sound, 16_000, subtype="FLOAT")


@pytest.mark.parametrize("there", [False, True], ids=["a new folder", "one that is there"])
def test_a_full_disk_leaves_nothing_half(call, place, tmp_path, there):
    if there:
        call("convert", place / "teacher", tmp_path / "new", "--keep", 0)
        (tmp_path / "new/notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with no_file_grows_past(20_000):
        told = call("convert", place / "teacher", tmp_path / "new", status=2).stderr
    assert f"error: cannot write {tmp_path / 'new'}: " in told and "make room" in told and "Traceback" not in told
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["new"] if there else [])
    call("convert", place / "teacher", tmp_path / "new")
    assert (tmp_path / "new/notes.txt").exists() == there
    from_pretrained(tmp_path / "new")
