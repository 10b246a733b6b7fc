"""A layer whose attention does nothing costs nothing, and the ranking, the memory and the yaml say what they mean."""

import json
import math
import re

import pytest
import torch
import yaml
from torch.nn import functional as F

from cald_speech import LayerMap, convert
from cald_speech.errors import UserError
from cald_speech.evaluation.effective_memory import MemoryMeter, metered
from cald_speech.evaluation.layer_importance import (
    converted_alone,
    mixers_of,
    overrides_yaml,
    rank_layers,
    tables,
    with_mixer_of,
)
from cald_speech.families import family_of
from cald_speech.mixers import Bidirectional, Hydra, Mamba, Mamba2, Mixer, NormalisedLinearAttention
from tests.evaluation.layerwise import DURATIONS_S, rewrite, write_recordings, write_teacher
from tests.helpers import SPEECH, audio_batch, padded_batch, relative_error, tiny_model, wide_unless_usual
from tests.training.miniature import write_model

FAMILIES = SPEECH
NEEDED = 1


def only_one_layer_attends(model):
    """Attention that does nothing but in layer NEEDED, where it does much."""
    for index, layer in enumerate(family_of(model).layers(model)):
        scale = 5.0 if index == NEEDED else 0.0
        layer.attention.out_proj.weight.mul_(scale)
        layer.attention.out_proj.bias.mul_(scale)


def convert_all_but(*kept):
    return lambda model: convert(model, LayerMap(Bidirectional, dict.fromkeys(kept)))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("importance")
    teacher = rewrite(write_teacher(place / "plain"), place / "teacher", only_one_layer_attends)
    rewrite(teacher, place / "student", convert_all_but())
    rewrite(teacher, place / "hybrid", convert_all_but(0))
    write_recordings(place, teacher)
    return place


@pytest.fixture
def importance(place):
    """Rank the layers of a folder of ``place``."""

    def run(teacher, *, manifest="manifest.json", **options):
        return rank_layers(str(place / teacher), place / manifest, progress=False, **options)

    return run


@pytest.mark.parametrize("by", ["wer", "kl", "distance"])
@pytest.mark.parametrize("student", [False, True], ids=["untrained", "student"])
def test_the_only_layer_that_attends_is_the_one_to_keep(importance, place, by, student):
    found = importance("teacher", rank_by=by, student=str(place / "student") if student else None)
    first, *others = found["layers"]
    assert found["teacher_wer"] == 0 and found["num_words"] > 0
    assert first["layer"] == NEEDED and first["kl"] > 1e-3 and first["distance_after_layer"] > 1e-4
    assert first["wer_added"] > 0 and first["wer_added"] == first["wer"]
    assert sorted(row["layer"] for row in found["layers"]) == [0, 1, 2]
    for row in others:
        assert row["wer"] == 0 and row["kl"] < 1e-6 and row["distance_at_end"] < 1e-6
    assert found["keep"] == [NEEDED]
    assert overrides_yaml([NEEDED]) in tables(found) and ("untrained" in found["caveat"]) == (not student)


def test_layers_that_words_do_not_tell_apart(importance):
    found = importance("teacher", keep=2)
    assert found["num_utterances"] == len(DURATIONS_S) and NEEDED in found["keep"] and len(found["keep"]) == 2
    # two layers that cost nothing: their order is no finding, and the report says so
    assert found["border"]["interval"] == [0, 0] and NEEDED not in (found["border"][k] for k in ("kept", "converted"))
    shown = tables(found)
    assert "do not tell them apart" in shown
    assert len([line for line in shown.splitlines() if line.startswith("|")]) == 2 + 3


def test_a_student_that_keeps_attention_in_a_layer(importance, place):
    found = importance("teacher", student=str(place / "hybrid"))
    assert sorted(row["layer"] for row in found["layers"]) == [1, 2]
    assert "keeps attention there: 0." in tables(found)
    assert found["student"]["distances"][0] < 1e-6 < found["student"]["distances"][-1]


def test_up_to_its_first_layer_the_student_is_the_teacher_with_that_layer_converted(importance, place):
    found = importance("teacher", student=str(place / "student"))
    first = next(row for row in found["layers"] if row["layer"] == 0)
    assert first["distance_after_layer"] == pytest.approx(found["student"]["distances"][0], abs=1e-6)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_padding_does_not_count(importance, place, norm):
    teacher = f"teacher-{norm}"
    if not (place / teacher).exists():
        write_teacher(place / teacher, norm=norm)
    # of a short memory: what a start costs by default is hardly more than rounding
    short = '{"mixer": "Bidirectional", "arguments": {"share_projections": true, "dt_range": [0.05, 0.1]}}'
    alone, padded = (importance(teacher, max_batch_s=s, mixer=short) for s in (0, 60))
    for one, other in zip(alone["layers"], padded["layers"], strict=True):
        assert one["layer"] == other["layer"] and one["wer"] == other["wer"]
        for key in ("kl", "distance_after_layer", "distance_at_end"):
            assert other[key] == pytest.approx(one[key], rel=1e-3)
        for direction, heads in one["memory_frames"].items():
            assert other["memory_frames"][direction] == pytest.approx(heads, rel=1e-4)


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("name", [pytest.param(name, marks=wide_unless_usual(name)) for name in FAMILIES])
def test_a_layer_alone_is_what_a_layer_map_makes(name, index):
    """WavLM's first layer too, which computes the position bias of the others; and the teacher stays what it was."""
    family = FAMILIES[name]
    teacher, whole = tiny_model(family), tiny_model(family)
    audio, mask = audio_batch((8000, 5000))
    frames = teacher._get_feat_extract_output_lengths(mask.sum(-1)).tolist()

    def logits(model):  # a converted model's are blank in the padding
        rows = model(audio, attention_mask=mask).logits
        return torch.cat([row[:length] for row, length in zip(rows, frames, strict=True)])

    with torch.no_grad():
        before = logits(teacher)
        alone = converted_alone(teacher, index, Bidirectional, seed=3)
        torch.manual_seed(3)
        convert(whole, LayerMap(None, {index: Bidirectional}))
        expected = logits(whole.eval())
        assert torch.equal(logits(alone), expected)
        assert torch.equal(logits(with_mixer_of(whole, teacher, index)), expected)
        assert torch.equal(logits(teacher), before)
    own = {parameter.data_ptr() for parameter in teacher.parameters()}
    new = [key for key, parameter in alone.named_parameters() if parameter.data_ptr() not in own]
    assert new and all(".mixer." in key for key in new)


@pytest.mark.parametrize("share", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("d_conv", [4, 0])
def test_memory_is_that_of_the_mean_decay_over_valid_frames(share, d_conv):
    mixer = Bidirectional(32, 4, share_projections=share, d_conv=d_conv).eval()
    x, lengths = padded_batch((9, 4), 32)
    x[1, 4:] = torch.nan
    with torch.no_grad(), metered({5: mixer}) as meters:
        mixer(x[:1], None)
        mixer(x[1:], lengths[1:])
        valid = torch.cat([x[0], x[1, :4]])
        past = mixer.forwards
        sides = {"forwards": (past, past.scan)}
        sides["backwards"] = (past, mixer.backward_scan) if share else (mixer.backwards, mixer.backwards.scan)
        for direction, (part, scan) in sides.items():
            dt = F.softplus(part.in_proj(valid)[:, -4:] + scan.dt_bias)
            mean = (dt * scan.A_log.exp()).mean(0)
            # the state that is left after so many such frames
            left = torch.exp(-mean * torch.tensor(meters[5].frames()[direction]))
            torch.testing.assert_close(left, torch.full((4,), 0.01), rtol=1e-4, atol=0)
    assert set(meters[5].frames()) == {"forwards", "backwards"}
    assert not mixer._forward_hooks


@torch.no_grad()
@pytest.mark.parametrize("mixer", [Hydra(32, 4), Bidirectional(32, 4, mixer=Mamba)], ids=["Hydra", "Mamba"])
def test_memory_by_hand_where_the_steps_are_constant(mixer):
    scans = {"forwards": getattr(mixer, "forwards", mixer).scan}
    scans["backwards"] = mixer.backwards.scan if isinstance(mixer, Bidirectional) else mixer.backward_scan
    for weight in [p for name, p in mixer.named_parameters() if name.endswith(("in_proj.weight", "dt_proj.weight"))]:
        weight.zero_()
    for bias in [p for name, p in mixer.named_parameters() if name.endswith("in_proj.bias")]:
        bias.zero_()
    with metered({0: mixer}) as meters:
        mixer(*padded_batch((9, 4), 32))
    for direction, scan in scans.items():
        slowest = scan.A_log.exp() if scan.A_log.dim() == 1 else scan.A_log.exp().min(-1).values
        expected = math.log(100) / (F.softplus(scan.dt_bias) * slowest)
        torch.testing.assert_close(torch.tensor(meters[0].frames()[direction]), expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_memory_by_hand_where_steps_come_from_the_projection():
    mixer = Bidirectional(32, 4, mixer=NormalisedLinearAttention, share_projections=True)
    mixer.forwards.step_proj.weight.zero_()  # which leaves its bias, a step of 1
    with metered({0: mixer}) as meters:
        mixer(*padded_batch((9, 4), 32))
    for direction, scan in {"forwards": mixer.forwards.scan, "backwards": mixer.backward_scan}.items():
        expected = math.log(100) / scan.A_log.exp()
        torch.testing.assert_close(torch.tensor(meters[0].frames()[direction]), expected, rtol=1e-4, atol=0)


@torch.no_grad()
def test_a_causal_mixer_has_one_direction_and_one_without_a_scan_none():
    x = torch.randn(1, 5, 32)
    causal, other = MemoryMeter(), MemoryMeter()
    causal(Mamba2(32, 4), (x, None), x)
    other(Mixer(), (x, None), x)
    assert list(causal.frames()) == ["forwards"] and other.frames() == {}
    assert all(math.isfinite(frames) and frames > 0 for frames in causal.frames()["forwards"])


def test_every_layer_draws_the_same_and_nothing_is_drawn_from_outside():
    teacher = tiny_model(FAMILIES["wav2vec2"])
    state = torch.get_rng_state()
    decays = [mixers_of(converted_alone(teacher, i, Bidirectional))[i].forwards.scan.A_log for i in (0, 2)]
    assert torch.equal(*decays) and torch.equal(torch.get_rng_state(), state)
    other = mixers_of(converted_alone(teacher, 0, Bidirectional, seed=1))[0].forwards.scan.A_log
    assert relative_error(other, decays[0]) > 0


def test_the_yaml_is_a_layer_maps_overrides():
    assert yaml.safe_load(overrides_yaml([2, 7])) == {"layer_map": {"overrides": {2: None, 7: None}}}


@pytest.fixture(scope="module")
def unlike(place):
    """Models that do not fit, and a manifest without words."""
    write_model(place / "wider", hidden_size=48, layers=3)
    write_model(place / "letters", letters="ABCDEFG", layers=3)
    rewrite(place / "teacher", place / "headless", lambda model: None, head="base")
    entries = json.loads((place / "manifest.json").read_text())
    (place / "silent.json").write_text(json.dumps({key: {**entry, "text": ""} for key, entry in entries.items()}))
    return place


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "student"}, "expected a model with attention in every layer, got a converted one"),
        ({"teacher": "headless"}, "expected a model with a CTC head"),
        ({"student": "teacher"}, "expected a converted model, got one with attention in every layer"),
        ({"student": "wider"}, "wider differ in their width"),
        ({"student": "letters"}, "differ in their vocabulary"),
        ({"keep": 4}, "--keep: expected from 1 to 3"),
        ({"keep": 0}, "--keep: expected from 1 to 3"),
        ({"mixer": "Transformer"}, "--mixer: mixer 'Transformer' is not known"),
        ({"mixer": "{"}, "--mixer: "),
        ({"mixer": '{"mixer": "Mamba2", "arguments": 3}'}, "expected keys and values, got 3"),
        ({"mixer": '{"mixer": "Mamba2", "arguments": {"depth": 3}}'}, "cannot build the mixer of layer 0"),
        ({"normaliser": "polite"}, "expected a text normaliser"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(unlike, importance, monkeypatch, options, message):
    monkeypatch.chdir(unlike)
    with pytest.raises(UserError, match=re.escape(message)):
        importance(**{"teacher": "teacher"} | options)


def test_without_words_layers_are_not_ranked_by_them(unlike, importance):
    with pytest.raises(UserError, match="not one word"):
        importance("teacher", rank_by="wer", manifest="silent.json")
    found = importance("teacher", manifest="silent.json")
    assert found["keep"] == [NEEDED] and found["layers"][0]["wer"] is None and "unknown" in tables(found)
