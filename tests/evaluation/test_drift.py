"""Drift: nothing moved means 0, waypoints lie between, and what cannot be compared is refused by name."""

import re
import shutil
from statistics import fmean

import numpy as np
import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from cald_speech import LayerMap, convert
from cald_speech.conversion import from_pretrained
from cald_speech.data.tokens import TokenSet
from cald_speech.errors import UserError
from cald_speech.evaluation.drift import measure_drift, tables
from cald_speech.families import families
from cald_speech.mixers import Bidirectional
from tests.evaluation.layerwise import DURATIONS_S, add_noise, rewrite, write_recordings, write_teacher
from tests.training.miniature import write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the teacher, the encoder it came from (without a head), two waypoints, and recordings."""
    place = tmp_path_factory.mktemp("drift")
    start = write_teacher(place / "start")
    rewrite(start, place / "source", lambda model: None, head="base")
    teacher = rewrite(start, place / "teacher", add_noise(0.2))
    rewrite(start, place / "waypoints" / "step-0000010", add_noise(0.05))
    shutil.copytree(teacher, place / "waypoints" / "step-0000020")
    write_recordings(place, teacher)
    return place


@pytest.fixture
def drift(place):
    """Measure the drift between folders of ``place``."""

    def run(teacher="teacher", source="source", *, manifest="manifest.json", **options):
        folders = [str(place / name) for name in (teacher, source)]
        return measure_drift(*folders, place / manifest, progress=False, **options)

    return run


def test_the_figures_of_a_drift(drift):
    found = drift()
    assert len(found["layers"]) == 3 and found["mean"] == pytest.approx(fmean(found["layers"]))
    assert all(0 < distance < 2 for distance in found["layers"])
    assert found["num_utterances"] == len(DURATIONS_S)


@pytest.mark.parametrize("hears", ["samples", "windows"])
def test_teachers_that_classify_have_no_tokenizer(hears, place, tmp_path):
    torch.manual_seed(0)
    if hears == "samples":
        write_model(tmp_path, head="classification")
        Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path)
    else:
        sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
        families()["whisper"].load(WhisperConfig(**sizes, max_source_positions=200)).save_pretrained(tmp_path)
        WhisperFeatureExtractor(chunk_length=4).save_pretrained(tmp_path)
    assert measure_drift(str(tmp_path), str(tmp_path), place / "manifest.json", progress=False)["mean"] < 1e-6


def test_equal_models_have_not_moved(drift):
    found = drift("start")
    assert found["mean"] < 1e-6 and found["suggestion"]["modes"][0] == "trajectory"


def test_waypoints_lie_on_the_way(drift, place):
    found = drift(waypoints=place / "waypoints")
    first, last = found["waypoints"]
    assert (first["step"], last["step"]) == (10, 20)
    assert 0 < fmean(first["from_source"]) < fmean(last["from_source"]) == pytest.approx(found["mean"])
    assert fmean(first["to_teacher"]) > 0 and fmean(last["to_teacher"]) < 1e-6


def test_what_people_read(drift, place):
    shown = tables(drift(waypoints=place / "waypoints"))
    assert [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("|")] == [
        *("layer", "-" * 7, "0", "1", "2", "mean"),
        *("step", "-" * 6, "10", "20"),
    ]


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_padding_does_not_count(drift, place, norm, request):
    teacher, source = f"teacher-{norm}", f"source-{norm}"
    if not (place / teacher).exists():
        write_teacher(place / source, norm=norm)
        rewrite(place / source, place / teacher, add_noise(0.2))
    alone, padded = (drift(teacher, source, max_batch_s=seconds) for seconds in (0, 60))
    assert alone["num_frames"] == padded["num_frames"]
    assert padded["layers"] == pytest.approx(alone["layers"], rel=1e-4)


def test_fewer_utterances_are_spread_over_the_manifest(drift, place):
    found = drift(utterances=2)
    assert found["num_utterances"] == 2
    frames = [int(seconds * 16_000) for seconds in (DURATIONS_S[0], DURATIONS_S[3])]
    front_end = families()["wav2vec2"].front_end(from_pretrained(place / "teacher"))
    assert found["num_frames"] == sum(map(front_end.num_frames, frames))


@pytest.fixture(scope="module")
def unlike(place):
    """Models that are not like the teacher."""
    write_model(place / "wider", hidden_size=48, layers=3)
    write_model(place / "deeper", layers=4)
    write_model(place / "hubert", "hubert", layers=3)
    write_model(place / "slower", layers=3, conv_stride=(8, 8, 8))

    def converted(model):
        convert(model, LayerMap(Bidirectional, {0: None}))

    rewrite(place / "teacher", place / "converted", converted)
    (place / "waypoints-of-another").mkdir()
    shutil.copytree(place / "deeper", place / "waypoints-of-another" / "step-10")
    return place


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wider", "wider differ in their width: expected the same, got 32 and 48"),
        ("deeper", "deeper differ in their layers: expected the same, got 3 and 4"),
        ("hubert", "hubert differ in their family: expected the same, got wav2vec2 and hubert"),
        ("slower", "slower differ in their frames"),
        ("converted", "converted: expected a model with attention in every layer, got a converted one (Bidirectional"),
        ("nowhere", "there is no folder"),
    ],
)
def test_models_that_cannot_be_compared(unlike, drift, source, message):
    with pytest.raises(UserError, match=re.escape(message)):
        drift("teacher", source)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"utterances": 0}, "--utterances: expected at least 1, got 0"),
        ({"waypoints": "."}, "--waypoints: expected folders called step-<number>"),
        ({"waypoints": "waypoints-of-another"}, "step-10 differ in their layers"),
        ({"device": "toaster"}, "device: expected cpu, cuda or a GPU's number such as cuda:1, got 'toaster'"),
        ({"manifest": "none.json"}, "there is no such manifest"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(unlike, drift, monkeypatch, options, message):
    monkeypatch.chdir(unlike)
    with pytest.raises(UserError, match=re.escape(message)):
        drift(**options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(drift):
    with pytest.raises(UserError, match="no CUDA device"):
        drift(device="cuda")


def test_drift_of_a_language_model(tmp_path):
    """By the same function, over tokens; against a literal evaluation."""
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50
    )
    models = {}
    for seed, name in enumerate(("source", "teacher")):
        torch.manual_seed(seed)
        models[name] = GPTNeoXForCausalLM(config).eval()
        models[name].save_pretrained(tmp_path / name)
    tokens = np.random.default_rng(0).integers(50, size=(6, 16)).astype("uint16")
    tokens.tofile(tmp_path / "t.bin")
    TokenSet(str(tmp_path / "t.bin"), tokens.size, 16).write(tmp_path / "t.json")
    folders = [str(tmp_path / name) for name in ("teacher", "source")]
    found = measure_drift(*folders, tmp_path / "t.json", progress=False, max_batch_tokens=40)
    rows = torch.from_numpy(tokens.astype("int64"))
    with torch.no_grad():
        states = [m.gpt_neox(rows, output_hidden_states=True).hidden_states[1] for m in models.values()]
    expected = 1 - torch.cosine_similarity(*states, dim=-1).mean()
    assert found["layers"][0] == pytest.approx(expected.item(), abs=1e-5)
    assert found["num_utterances"] == 6 and found["num_frames"] == 96
