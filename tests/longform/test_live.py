"""Live logits: exact for causal students, nearer to the whole with every second of lookahead for bidirectional ones."""

from functools import partial

import pytest
import torch

from cald_speech import LayerMap, convert
from cald_speech.errors import UserError
from cald_speech.longform import AudioSource, latency_s, stream
from cald_speech.longform.front_end import measure
from cald_speech.longform.live import Streamer
from cald_speech.mixers import Bidirectional, Mamba2
from tests.helpers import SPEECH, SPEECH_CASES, TOLERANCE, relative_error, tiny_model
from tests.longform.test_encoder import MAPS, audio, both_norms, make, whole

FAMILIES = SPEECH
NEVER_LIVE = ("sew", "wav2vec2-conformer")
every_live_family = pytest.mark.parametrize("family", [case for case in SPEECH_CASES if case.id not in NEVER_LIVE])
# Every head forgets within some ten frames, as heads do that have learnt what is near.
DECAYING = {"dt_range": (0.05, 0.1), "A_range": (2.0, 4.0)}
SHARED = partial(Bidirectional, share_projections=True)
CAUSAL = LayerMap(Mamba2)
BOTH_WAYS = {"separate": LayerMap(Bidirectional), "shared": LayerMap(SHARED), "mixed": LayerMap(SHARED, {1: Mamba2})}
BOTH_WAYS["normalised"] = MAPS["normalised"]
REACH = 8  # frames that the tiny models' positional convolution sees ahead
CHUNKS = {"10 ms": 160, "odd": 1_237, "a second": 16_000, "at once": 10**6}


def live(model, samples, chunk=3_200, **options) -> torch.Tensor:
    family = FAMILIES[model.config.model_type.removeprefix("cald_")]
    statistics = measure(AudioSource.from_samples(samples), family.front_end(model), normalise=True)
    return torch.cat(list(stream(model, samples.split(chunk), statistics=statistics, **options)))


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@both_norms
@every_live_family
def test_a_causal_student_is_exact(family, norm, chunk):
    model, samples = make(family, norm, CAUSAL), audio(20_011)
    assert relative_error(live(model, samples, chunk), whole(model, samples)) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("chunk", [1_237, 10**6], ids=["odd", "at once"])
@pytest.mark.parametrize("layer_map", BOTH_WAYS.values(), ids=BOTH_WAYS)
@both_norms
@every_live_family
def test_lookahead_to_the_end_is_the_whole(family, norm, layer_map, chunk):
    model, samples = make(family, norm, layer_map), audio(12_011)
    assert relative_error(live(model, samples, chunk, lookahead_s=2.0), whole(model, samples)) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("share_projections", [False, True], ids=["separate", "shared"])
def test_more_lookahead_is_nearer_to_the_whole(share_projections):
    layer_map = LayerMap(partial(Bidirectional, share_projections=share_projections, **DECAYING))
    model, samples = make(FAMILIES["wav2vec2"], "layer", layer_map), audio(64_000)
    expected = whole(model, samples)
    errors = [
        (live(model, samples, 1_600, lookahead_s=s) - expected).square().mean().sqrt().item()
        for s in (0.0, 0.1, 0.4, 1.6)
    ]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.05 * errors[0]


def test_frames_come_when_they_are_due():
    """Each frame as soon as its positions, and its lookahead, have been heard; all others when the audio ends."""
    for layer_map, lookahead_s, wait in ((CAUSAL, None, 0), (BOTH_WAYS["shared"], 0.4, 20)):
        model = make(FAMILIES["wav2vec2"], "layer", layer_map)
        assert latency_s(model, lookahead_s) == pytest.approx((REACH + wait) * 0.02)
        streamer, sent, heard = Streamer(model, wait, None, True), 0, 0
        for samples in audio(16_000).split(311):
            sent, heard = sent + len(streamer.push(samples)), heard + len(samples)
            assert sent == max(0, (heard - 400) // 320 + 1 - REACH - wait)
        assert sent + len(streamer.finish()) == 49


def test_what_is_remembered_does_not_grow():
    model = make(FAMILIES["wav2vec2"], "layer", BOTH_WAYS["separate"])
    streamer, sizes = Streamer(model, 10, None, True), []
    for samples in audio(160_000).split(1_600):
        streamer.push(samples)
        sizes.append(streamer.audio.samples.numel() + streamer.audio.projected.numel() + streamer.waiting.numel())
    assert max(sizes[50:]) <= max(sizes[10:50])


def test_without_statistics_what_was_heard_so_far_counts():
    """At the end that is all of it, so late frames of a model without memory are those of the whole."""
    model = make(FAMILIES["wav2vec2"], "layer", CAUSAL)
    samples = torch.randn(16_000).repeat(6)
    got = torch.cat(list(stream(model, samples.split(1_600))))
    expected = whole(model, samples)
    early, late = (relative_error(got[part], expected[part]) for part in (slice(0, 50), slice(-50, None)))
    assert 0 < late < 0.02 and late < early
    raw = torch.cat(list(stream(model, samples.split(1_600), do_normalize=False)))
    with torch.no_grad():
        assert relative_error(raw, model(samples[None]).logits[0]) <= TOLERANCE["rounding"]


@both_norms
def test_short_audio(norm):
    model = make(FAMILIES["wav2vec2"], norm, CAUSAL)
    assert len(live(model, audio(400))) == 1
    for chunks in ([], [torch.ones(399)], [torch.ones(0), torch.ones(200)]):
        statistics = measure(
            AudioSource.from_samples(audio(400)), FAMILIES["wav2vec2"].front_end(model), normalise=True
        )
        assert list(stream(model, chunks, statistics=statistics)) == []


@pytest.mark.parametrize(
    ("norm", "layer_map", "lookahead_s", "message"),
    [
        ("layer", MAPS["kept"], 1.0, r"need the whole audio: 0 \(attention\), 1 \(attention\)"),
        ("layer", LayerMap(Mamba2, {1: None}), None, r"need the whole audio: 1 \(attention\)"),
        ("layer", MAPS["one that cannot be cut"], None, r"0 \(Smoothing\)"),
        ("layer", BOTH_WAYS["shared"], None, "give lookahead_s"),
        ("group", CAUSAL, None, "feat_extract_norm: group.* give the statistics"),
    ],
    ids=["attention", "one attention", "a mixer that cannot be cut", "no lookahead", "GroupNorm without statistics"],
)
def test_what_cannot_run_live_is_refused_at_once(norm, layer_map, lookahead_s, message):
    with pytest.raises(UserError, match=message):
        stream(make(FAMILIES["wav2vec2"], norm, layer_map), [], lookahead_s=lookahead_s)


def test_layers_that_hear_what_is_to_come_are_refused_at_once():
    with pytest.raises(UserError, match=r"wav2vec2-conformer models cannot run live: .*Transcribe recorded audio"):
        stream(make(FAMILIES["wav2vec2-conformer"], "layer", CAUSAL), [])


def test_arguments_that_do_not_fit():
    model = make(FAMILIES["wav2vec2"], "layer", BOTH_WAYS["shared"])
    with pytest.raises(ValueError, match="lookahead_s: expected at least 0"):
        stream(model, [], lookahead_s=-1.0)
    with pytest.raises(ValueError, match=r"Call model\.eval\(\)"):
        stream(model.train(), [], lookahead_s=1.0)


def test_a_head_is_needed():
    model = tiny_model(FAMILIES["hubert"])
    convert(model, CAUSAL)
    with pytest.raises(UserError, match="expected a model with a CTC head"):
        stream(model.base_model.eval(), [])
