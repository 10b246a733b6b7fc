"""Long form is the whole-utterance forward pass, for every family, front end and layer map, however it is cut up."""

import math
from functools import partial

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor

from cald_speech import LayerMap, convert
from cald_speech.data.audio import read_audio
from cald_speech.errors import UserError
from cald_speech.longform import AudioSource, encode_long, layers, predicted_peak_bytes, stream_logits
from cald_speech.longform.encoder import BlockSizes
from cald_speech.mixers import (
    Bidirectional,
    GatedLinearAttention,
    Hydra,
    Linformer,
    Mamba,
    Mamba2,
    Mixer,
    NormalisedLinearAttention,
    WindowedAttention,
)
from tests.helpers import (
    SPEECH,
    SPEECH_CASES,
    TOLERANCE,
    one_frame,
    relative_error,
    tiny_config,
    tiny_model,
    wide_unless_usual,
)

FAMILIES = SPEECH
SHARED = partial(Bidirectional, share_projections=True)
NORMALISED = partial(SHARED, mixer=NormalisedLinearAttention)


class Smoothing(Mixer):
    """A mixer that cannot be cut: every frame becomes the mean of all, added to itself."""

    def __init__(self, d_model: int, num_heads: int = 1):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.randn(d_model))

    def forward(self, x, lengths=None):
        return (x + x.mean(1, keepdim=True)) * self.scale


MAPS = {
    "kept": LayerMap(),
    "separate projections": LayerMap(Bidirectional),
    "shared projections": LayerMap(SHARED),
    "shared, no convolution": LayerMap(partial(SHARED, d_conv=0)),
    "shared, expanded": LayerMap(partial(SHARED, expand=2)),
    "causal": LayerMap(Mamba2),
    "one that cannot be cut": LayerMap(Smoothing),
    "all sorts": LayerMap(None, {0: SHARED, 2: Mamba2, 3: Bidirectional}),
    "first kept": LayerMap(partial(SHARED, expand=2), {0: None}),
    "windowed attention": LayerMap(partial(WindowedAttention, window=6)),
    "normalised": LayerMap(NORMALISED, {0: partial(NORMALISED, window=5)}),
    "one of each": LayerMap(
        partial(Bidirectional, mixer=Mamba),
        {
            0: Hydra,
            1: partial(WindowedAttention, window=6),
            2: partial(SHARED, mixer=GatedLinearAttention),
            3: Linformer,
        },
    ),
}
# Convolutions, positions, layers; the positional convolution of the tiny models reaches 8 frames to either side.
SIZES = {"one frame": (1, 1, 1), "odd": (3, 7, 5), "between": (20, 17, 30), "a computer's": (50, 2048, 512)}

every_family = pytest.mark.parametrize("family", SPEECH_CASES)
both_norms = pytest.mark.parametrize("norm", ["group", "layer"])
# The families differ in their layers and front ends, not in their mixers: every map in one of them, and in the others
# the maps that go through all that is theirs.
EVERYWHERE = ("kept", "all sorts", "one of each")
MODELS = [
    pytest.param(FAMILIES[family], MAPS[name], id=f"{family}-{name}", marks=wide_unless_usual(family))
    for family in FAMILIES
    for name in (MAPS if family == "wav2vec2" else EVERYWHERE)
]
every_model = pytest.mark.parametrize(("family", "layer_map"), MODELS)


def make(family, norm="group", layer_map=MAPS["shared projections"], layers=2, **options):
    model = tiny_model(family, norm, max(layers, 1 + max(layer_map.overrides, default=0)), **options)
    convert(model, layer_map, initialise="random")
    return model.eval()


def audio(num_samples, seed=0) -> torch.Tensor:
    """Noise that swells, with an offset: what normalising has to deal with."""
    generator = torch.Generator().manual_seed(seed)
    swell = torch.linspace(0.1, 1.0, num_samples)
    return 0.05 + 0.2 * swell * torch.randn(num_samples, generator=generator)


def normalised(samples) -> torch.Tensor:
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    return extractor(samples.numpy(), sampling_rate=16_000, return_tensors="pt").input_values


@torch.no_grad()
def whole(model, samples) -> torch.Tensor:
    return model(normalised(samples)).logits[0]


def long(model, samples, **options) -> torch.Tensor:
    parts = list(stream_logits(model, AudioSource.from_samples(samples), **options))
    assert [first for first, _ in parts] == [sum(len(p) for _, p in parts[:i]) for i in range(len(parts))]
    return torch.cat([logits for _, logits in parts])


@pytest.fixture
def block_sizes(monkeypatch):
    def choose(sizes):
        monkeypatch.setattr(BlockSizes, "of", lambda *arguments: BlockSizes(*sizes))

    return choose


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@both_norms
@every_model
def test_long_form_equals_the_whole(family, norm, layer_map, sizes, block_sizes):
    model, samples = make(family, norm, layer_map), audio(12_011)
    block_sizes(sizes)
    assert relative_error(long(model, samples), whole(model, samples)) <= TOLERANCE["rounding"]


@both_norms
@every_model
def test_short_audio(family, norm, layer_map):
    model = make(family, norm, layer_map)
    for num_samples, num_frames in ((400, 1), (719, 1), (720, 2), (3_000, 9)):
        if num_samples < one_frame(model):
            continue
        samples = audio(num_samples)
        got, expected = long(model, samples), whole(model, samples)
        assert len(got) == len(expected) == num_frames
        # One frame of a pre-norm layer is little more than its rounding, where the norm's input hardly varies.
        assert relative_error(got, expected) <= TOLERANCE["parity"]


@every_family
def test_audio_without_a_frame_gives_none(family):
    model = make(family)
    for num_samples in (0, 1, 399):
        source = AudioSource.from_samples(torch.ones(num_samples))
        assert list(stream_logits(model, source)) == [] and encode_long(model, source).shape == (0, 32)


@pytest.mark.parametrize("chunk_s", [0.001, 0.02, 0.117, 1.0, 100.0])
@both_norms
def test_the_chunk_does_not_matter(norm, chunk_s):
    model, samples = make(FAMILIES["wav2vec2"], norm), audio(30_000)
    got = encode_long(model, AudioSource.from_samples(samples), chunk_s=chunk_s)
    with torch.no_grad():
        expected = model.base_model(normalised(samples)).last_hidden_state[0]
    assert relative_error(got, expected) <= TOLERANCE["rounding"]


@both_norms
@every_family
def test_hidden_states_are_those_behind_the_final_norm(family, norm):
    model, samples = make(family, norm), audio(9_000)
    got = encode_long(model.base_model, AudioSource.from_samples(samples))  # a model without a head will do
    with torch.no_grad():
        logits = family.head(model)(got[None])[0]
        assert relative_error(logits, whole(model, samples)[: len(logits)]) <= TOLERANCE["rounding"]
        got = model.base_model.encoder.upsample(got[None])[0] if family.model_type == "sew" else got
        expected = model.base_model(normalised(samples)).last_hidden_state[0, : len(got)]
        assert relative_error(got, expected) <= TOLERANCE["rounding"]


@pytest.mark.parametrize(
    "options",
    [
        {"conv_bias": True},
        {"conv_kernel": (8, 5, 4), "conv_stride": (4, 3, 2), "conv_dim": (8, 12, 16)},
        {"num_conv_pos_embeddings": 15},
        {"num_conv_pos_embeddings": 1},
        {"conv_dim": (16,), "conv_kernel": (10,), "conv_stride": (5,)},
    ],
    ids=["convolution bias", "three convolutions", "odd positions", "no positions beside", "one convolution"],
)
@both_norms
@every_family
def test_other_front_ends(family, norm, options, block_sizes):
    if "conv_dim" in options:
        options = options | {"num_feat_extract_layers": len(options["conv_dim"])}
    model, samples = make(family, norm, **options), audio(4_001)
    block_sizes((7, 20, 33))
    assert relative_error(long(model, samples), whole(model, samples)) <= TOLERANCE["rounding"]


def test_hubert_with_batch_norm_before_its_positions(block_sizes):
    model, samples = make(FAMILIES["hubert"], conv_pos_batch_norm=True), audio(9_000)
    batch_norm = model.base_model.encoder.pos_conv_embed.batch_norm
    torch.nn.init.uniform_(batch_norm.running_mean)
    torch.nn.init.uniform_(batch_norm.bias)
    block_sizes((5, 9, 11))
    assert relative_error(long(model, samples), whole(model, samples)) <= TOLERANCE["rounding"]


@both_norms
def test_without_normalising(norm):
    model, samples = make(FAMILIES["wav2vec2"], norm), audio(9_000)
    with torch.no_grad():
        expected = model(samples[None]).logits[0]
    assert relative_error(long(model, samples, do_normalize=False), expected) <= TOLERANCE["rounding"]
    if norm == "layer":  # GroupNorm takes scale and offset out again
        assert relative_error(whole(model, samples), expected) > 0.01


@both_norms
def test_silence_and_a_large_offset(norm):
    model = make(FAMILIES["wav2vec2"], norm)
    assert relative_error(long(model, torch.zeros(9_000)), whole(model, torch.zeros(9_000))) <= TOLERANCE["parity"]
    samples = 0.5 + 0.01 * audio(9_000)
    assert relative_error(long(model, samples), whole(model, samples)) <= TOLERANCE["parity"]


def test_a_padded_batch_before_it_leaves_no_trace():
    model, samples = make(FAMILIES["wav2vec2"]), audio(9_000)
    expected = long(model, samples)
    mask = torch.ones(2, 9_000, dtype=torch.long)
    mask[1, 4_000:] = 0
    with torch.no_grad():
        model(torch.randn(2, 9_000), attention_mask=mask)
    assert torch.equal(long(model, samples), expected)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_teachers_with_either_attention(attention):
    model, samples = make(FAMILIES["wav2vec2"], layer_map=MAPS["kept"]), audio(9_000)
    model.set_attn_implementation(attention)
    assert relative_error(long(model, samples), whole(model, samples)) <= TOLERANCE["rounding"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_family
def test_sixteen_bits(family, dtype):
    model, samples = make(family), audio(9_000)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    got = encode_long(model, AudioSource.from_samples(samples), dtype=dtype)
    expected = encode_long(model, AudioSource.from_samples(samples))
    assert got.dtype == dtype and relative_error(got, expected) <= TOLERANCE["bfloat16 layer"]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())  # the model is as it was
    cast = encode_long(model.to(dtype), AudioSource.from_samples(samples), dtype=dtype)
    assert torch.equal(cast, got)


@every_model
def test_buffers_on_disk_change_nothing_and_leave_nothing(family, layer_map, tmp_path):
    model, samples = make(family, layer_map=layer_map), audio(9_000)
    expected = long(model, samples)
    parts = stream_logits(model, AudioSource.from_samples(samples), storage=tmp_path)
    assert list(tmp_path.iterdir()) == []  # while they are in use
    assert torch.equal(torch.cat([logits for _, logits in parts]), expected)
    hidden = encode_long(model, AudioSource.from_samples(samples), storage=str(tmp_path))
    assert torch.equal(hidden, encode_long(model, AudioSource.from_samples(samples)))
    assert list(tmp_path.iterdir()) == []


def test_the_result_is_an_ordinary_tensor(tmp_path):
    for storage in (None, tmp_path):
        hidden = encode_long(make(FAMILIES["hubert"]), AudioSource.from_samples(audio(9_000)), storage=storage)
        hidden.requires_grad_().sum().backward()
        assert hidden.grad is not None


def test_a_disk_that_is_too_small_is_named_with_what_is_needed(tmp_path, monkeypatch):
    model, source = make(FAMILIES["hubert"]), AudioSource.from_samples(audio(9_000))
    monkeypatch.setattr(layers.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1_000}))
    with pytest.raises(UserError, match=r"needs 0\.00 GiB free for this audio and has 0\.00"):
        encode_long(model, source, storage=tmp_path)
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(layers.errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(layers.os, "posix_fallocate", full)
    with pytest.raises(UserError, match="GiB free for this audio"):
        encode_long(model, source, storage=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_refuses_more_than_it_holds(tmp_path):
    """No file system of this world has 40 PB free; nothing is left of the attempt."""
    made = layers.Buffers(torch.float32, torch.device("cpu"), tmp_path)
    for attempt in (made.reserve, made.new):
        with pytest.raises(UserError, match=r"needs 37252902\.98 GiB free"):
            attempt(10**12, 10**4)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none_is_named(tmp_path):
    model, source = make(FAMILIES["hubert"]), AudioSource.from_samples(audio(9_000))
    with pytest.raises(UserError, match=r"storage: expected a folder that can be written, got .*nowhere"):
        encode_long(model, source, storage=tmp_path / "nowhere")


def test_progress_goes_from_zero_to_one():
    for layer_map in (MAPS["all sorts"], MAPS["one that cannot be cut"]):
        seen = []
        model = make(FAMILIES["wav2vec2"], layer_map=layer_map)
        encode_long(model, AudioSource.from_samples(audio(40_000)), progress=seen.append)
        assert seen == sorted(seen) and 0 < min(filter(None, seen)) < 0.5 and math.isclose(seen[-1], 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chunk_s": 0.0}, "chunk_s: expected"), ({"dtype": torch.float64}, "dtype: expected one of torch.float32")],
)
def test_arguments_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        encode_long(make(FAMILIES["hubert"]), AudioSource.from_samples(audio(9_000)), **options)


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"Call model\.eval\(\)"):
        encode_long(make(FAMILIES["hubert"]).train(), AudioSource.from_samples(audio(9_000)))


def test_a_model_without_a_head_is_refused_before_any_work():
    with pytest.raises(UserError, match="expected a model with a CTC head"):
        stream_logits(make(FAMILIES["hubert"]).base_model, None)


def test_convolutions_behind_the_layers_are_refused():
    family = FAMILIES["wav2vec2"]
    model = family.classes["ctc"](tiny_config(family, add_adapter=True, output_hidden_size=32)).eval()
    with pytest.raises(UserError, match="add_adapter"):
        encode_long(model, AudioSource.from_samples(audio(9_000)))


def test_audio_that_shrinks_between_the_passes_is_told():
    class Shrinking(AudioSource):
        def read(self, start, stop):
            return super().read(start, stop)[:-1]

    source = Shrinking(AudioSource.from_samples(audio(20_000))._reader)
    with pytest.raises(UserError, match="the audio has become shorter"):
        encode_long(make(FAMILIES["wav2vec2"]), source)


def test_a_damaged_file_gives_the_frames_before_the_damage(tmp_path):
    import soundfile

    samples = audio(100_000)
    soundfile.write(tmp_path / "a.flac", samples.numpy(), 16_000, subtype="PCM_24")
    content = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(content[: len(content) // 2])
    source, model = AudioSource.open(tmp_path / "a.flac"), make(FAMILIES["wav2vec2"])
    hidden = encode_long(model, source)
    assert source.fault is not None and len(hidden) == (source.num_samples - 400) // 320 + 1
    expected = encode_long(model, AudioSource.from_samples(source.read(0, 10**6)))
    assert relative_error(hidden, expected) <= TOLERANCE["rounding"]


@both_norms
@every_family
def test_real_speech(family, norm, shared_data):
    path = next(iter(sorted((shared_data / "librispeech" / "LibriSpeech" / "test-clean").rglob("*.flac"))))
    model = make(family, norm, MAPS["all sorts"])
    got = torch.cat([logits for _, logits in stream_logits(model, AudioSource.open(path))])
    assert relative_error(got, whole(model, read_audio(path))) <= TOLERANCE["parity"]


def test_predicted_memory_is_that_of_the_buffers(monkeypatch):
    """What grows with the audio is what is allocated, column by column."""
    made, new = [], layers.Buffers.new
    monkeypatch.setattr(layers.Buffers, "new", lambda self, n, width: (made.append(width), new(self, n, width))[1])
    for layer_map, columns in (
        (MAPS["kept"], 3 * 32),
        (MAPS["causal"], 32),
        (MAPS["separate projections"], 2 * 32),
        (MAPS["shared, expanded"], 32 + 64),
        (MAPS["first kept"], 32 + 64 + 32),
        (MAPS["windowed attention"], 32 + 32 + 2 * 2),
    ):
        model = make(FAMILIES["wav2vec2"], layer_map=layer_map)
        short, long = (predicted_peak_bytes(model, s) for s in (20.0, 40.0))
        assert long - short == 1000 * columns * 4
        made.clear()
        encode_long(model, AudioSource.from_samples(audio(9_000)))
        assert sum(made) == columns
        assert predicted_peak_bytes(model, 40.0, storage="folder") == predicted_peak_bytes(model, 0.0)
        assert predicted_peak_bytes(model, 40.0, dtype=torch.bfloat16) * 2 == predicted_peak_bytes(model, 40.0)
