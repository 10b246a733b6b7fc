"""Windowed attention: attention with a band for a mask, the kept attention once the window is wide, linear in T."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cald_speech import LayerMap, convert, from_pretrained
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.longform import AudioSource, stream_logits
from cald_speech.mixers import WindowedAttention
from cald_speech.mixers.windowed_attention import LEAST_QUERIES
from tests.families.text import CASES
from tests.helpers import (
    SPEECH,
    SPEECH_CASES,
    TOLERANCE,
    audio_batch,
    padded_batch,
    parakeet_config,
    relative_error,
    tiny_model,
)

WIDTH, HEADS, HEAD_DIM = 32, 4, 8
FAMILIES = SPEECH
CONFORMERS = [
    (FAMILIES["wav2vec2-conformer"], "relative"),
    (families()["wav2vec2-bert"], "relative_key"),
    (families()["wav2vec2-bert"], "relative"),
    (families()["parakeet_ctc"], "relative"),
]
every_family = pytest.mark.parametrize("family", SPEECH_CASES)


def full_attention(mixer: WindowedAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention of one sequence (T, D) with a (T, T) mask for its band."""
    q, k, v = (p(x).unflatten(1, (HEADS, HEAD_DIM)).transpose(0, 1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    distance = torch.arange(len(x)) - torch.arange(len(x))[:, None]
    scores = q @ k.transpose(1, 2) / HEAD_DIM**0.5
    if mixer.position_bias is not None:
        scores = scores + mixer.position_bias.gates(x[None])[0] * mixer.position_bias.at(distance)
    if mixer.distance_keys is not None:
        own = mixer.distance_keys
        keys = own.by_distance[:, distance.clamp(-mixer.window, mixer.window) + mixer.window]
        scores = scores + torch.einsum("hd,hkd->hk", own.frame_bias, k)[:, None] / HEAD_DIM**0.5
        scores = scores + torch.einsum("hqd,hqkd->hqk", q + own.distance_bias[:, None], keys) / HEAD_DIM**0.5
    scores = scores.masked_fill(distance.abs() > mixer.window, -torch.inf)
    return mixer.out_proj((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))


def mixer_of(positions: str | None, window: int) -> WindowedAttention:
    """With ``position_bias``, ``distance_keys`` or neither; what starts at zero is random."""
    mixer = WindowedAttention(WIDTH, HEADS, window=window, **({positions: True} if positions else {}))
    if mixer.distance_keys is not None:
        for parameter in mixer.distance_keys.parameters():
            torch.nn.init.normal_(parameter)
    return mixer


every_kind = pytest.mark.parametrize("positions", [None, "position_bias", "distance_keys"], ids=str)


@every_kind
@pytest.mark.parametrize("window", [1, 7, 16, 64, 500])
@pytest.mark.parametrize("lengths", [(200, 31), (33, 32), (1, 0), (7, 5)], ids=str)
@torch.no_grad()
def test_is_attention_with_a_band_for_a_mask(window, lengths, positions):
    mixer = mixer_of(positions, window)
    x, lengths = padded_batch(lengths, WIDTH)
    y = mixer(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert relative_error(y[row, :length], full_attention(mixer, x[row, :length])) <= TOLERANCE["rounding"]
        assert not y[row, length:].any()


@pytest.mark.parametrize("positions", ["position_bias", "distance_keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 5, 40, 300])
@torch.no_grad()
def test_two_sweeps_are_the_whole(size, dtype, positions):
    """The scores are some 70 here, where numbers of half precision are half apart; past and future weigh exactly."""
    mixer = mixer_of(positions, window=20)
    mixer.q_proj.bias.fill_(5.0)
    mixer.k_proj.bias.fill_(5.0)
    mixer.to(dtype)
    x = padded_batch((160,), WIDTH)[0].to(dtype)
    past, future = mixer.sweeps()
    partial, state = [], None
    for block in x.split(size, 1):
        out, state = past.step(block, None, state)
        assert out.dtype == dtype and state.keys.size(2) <= 20
        partial.append(out)
    outputs, state = [], None
    for block, left in zip(reversed(x.split(size, 1)), reversed(partial), strict=True):
        out, state = future.step(block, left, state)
        assert out.dtype == dtype and state.keys.size(2) <= 20
        outputs.append(out)
    limit = TOLERANCE["rounding" if dtype == torch.float32 else "bfloat16"]
    assert relative_error(torch.cat(outputs[::-1], dim=1), mixer(x)) <= limit


class LargestTensor(TorchDispatchMode):
    """Counts the numbers in the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@every_kind
def test_memory_grows_with_the_length_and_not_with_its_square(positions):
    mixer = mixer_of(positions, window=10)
    for num_frames in (1_000, 4_000):
        x = torch.randn(1, num_frames, WIDTH, requires_grad=True)
        with LargestTensor() as made:
            mixer(x).sum().backward()
        # A block of 32 queries has 52 keys; rounded up to whole blocks.
        assert num_frames * WIDTH <= made.largest <= HEADS * (num_frames + LEAST_QUERIES) * 52


def outputs(model) -> list[torch.Tensor]:
    audio, mask = audio_batch((8000, 5000))
    frames = model._get_feat_extract_output_lengths(torch.tensor([8000, 5000])).tolist()
    with torch.no_grad():
        return [row[:length] for row, length in zip(model(audio, attention_mask=mask).logits, frames, strict=True)]


@pytest.mark.parametrize("norm", ["group", "layer"])
@pytest.mark.parametrize("layers", [(0, 1, 2), (1,), (0, 2)], ids=str)
@pytest.mark.parametrize("family", [case for case in SPEECH_CASES if case.id != "wav2vec2-conformer"])
def test_a_wide_window_is_the_kept_attention(family, layers, norm):
    model = tiny_model(family, norm)
    for layer in family.layers(model):
        torch.nn.init.normal_(layer.attention.q_proj.weight)  # scores that matter
    if family.model_type == "wavlm":
        for name, parameter in model.named_parameters():
            if "rel_attn" in name or "gru_rel" in name:
                torch.nn.init.normal_(parameter)
    expected = outputs(model)
    factory = partial(WindowedAttention, window=30, position_bias=family.model_type == "wavlm")
    report = convert(model, LayerMap(None, dict.fromkeys(layers, factory)))
    assert not report.new
    for got, wanted in zip(outputs(model), expected, strict=True):
        assert relative_error(got, wanted) <= TOLERANCE["rounding"]


QUERIES_AND_POSITIONS = ("linear_q.weight", "linear_pos", "pos_bias", "distance_embedding")
QUERIES_AND_POSITIONS += ("q_proj.weight", "relative_k_proj", "bias_u", "bias_v")


@pytest.mark.parametrize("layers", [(0, 1, 2), (1,)], ids=str)
@pytest.mark.parametrize(("family", "kind"), CONFORMERS, ids=lambda value: getattr(value, "model_type", value))
def test_a_wide_window_is_a_conformers_attention(family, kind, layers, tmp_path):
    """Relative positions are kept, alone and padded, by a folder and in long audio too."""
    model = conformer(family, kind)
    for name, parameter in model.named_parameters():
        if any(part in name for part in QUERIES_AND_POSITIONS):
            torch.nn.init.normal_(parameter)
    inputs, frames = hearing(family)
    with torch.no_grad():
        expected = model(*inputs).logits
    factory = partial(WindowedAttention, window=40, distance_keys=True)
    report = convert(model, LayerMap(None, dict.fromkeys(layers, factory)))
    assert not report.new
    model.save_pretrained(tmp_path)
    for one in (model, from_pretrained(tmp_path)):
        with torch.no_grad():
            logits = one(*inputs).logits
        for row, length in enumerate(frames):
            assert relative_error(logits[row, :length], expected[row, :length]) <= TOLERANCE["rounding"]
    if family.input_key == "input_values":
        parts = stream_logits(one, AudioSource.from_samples(inputs[0][0]), do_normalize=False)
        assert relative_error(torch.cat([part for _, part in parts]), expected[0]) <= TOLERANCE["rounding"]
    model(*inputs).logits[0].square().sum().backward()
    assert all(p.grad is not None for p in family.mixer(family.layers(model)[layers[-1]]).parameters())


def conformer(family, kind):
    if family.model_type == "parakeet_ctc":
        torch.manual_seed(0)
        return family.load(parakeet_config()).eval()
    if family.model_type == "wav2vec2-conformer":
        return tiny_model(family, position_embeddings_type=kind)
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    shape |= {"conv_depthwise_kernel_size": 5, "left_max_position_embeddings": 6, "right_max_position_embeddings": 3}
    torch.manual_seed(0)
    return family.load(family.config_class(**shape, vocab_size=32, position_embeddings_type=kind)).eval()


def hearing(family):
    """Samples or features with their mask, and how many frames each row has."""
    if family.input_key == "input_values":
        return audio_batch((8000, 5000)), (24, 15)
    channels, per_frame = (16, 8) if family.model_type == "parakeet_ctc" else (160, 1)
    mask = (torch.arange(30 * per_frame) < per_frame * torch.tensor([30, 17])[:, None]).long()
    return (torch.randn(*mask.shape, channels), mask), (30, 17)


def test_a_narrow_window_is_not():
    family = FAMILIES["hubert"]
    model = tiny_model(family)
    for layer in family.layers(model):
        torch.nn.init.normal_(layer.attention.q_proj.weight)
    expected = outputs(model)
    convert(model, LayerMap(partial(WindowedAttention, window=2)))
    assert relative_error(outputs(model)[0], expected[0]) > 1e-3


@torch.no_grad()
def test_wavlms_bias_far_beyond_its_table():
    """Beyond its maximum distance WavLM's bias is that of the maximum; the table ends there too."""
    family = FAMILIES["wavlm"]
    attention = family.layers(tiny_model(family, num_buckets=16, max_distance=20))[0].attention
    torch.nn.init.normal_(attention.rel_attn_embed.weight)
    torch.nn.init.normal_(attention.gru_rel_pos_linear.weight)
    x, _ = padded_batch((70,), 32)
    expected = attention(x)[0]
    model = tiny_model(family, num_buckets=16, max_distance=20)
    family.layers(model)[0].attention.load_state_dict(attention.state_dict())
    convert(model, LayerMap(None, {0: partial(WindowedAttention, window=70, position_bias=True)}))
    assert relative_error(family.mixer(family.layers(model)[0])(x), expected) <= TOLERANCE["rounding"]


def test_a_position_bias_without_a_place_is_named():
    with pytest.raises(UserError, match=r"layer 0: .*needs position_bias: True .*initialise: random"):
        convert(tiny_model(FAMILIES["wavlm"]), LayerMap(WindowedAttention))
    biased = partial(WindowedAttention, position_bias=True)
    with pytest.raises(UserError, match=r"layer 0: position_bias: .*Leave it False"):
        convert(tiny_model(FAMILIES["hubert"]), LayerMap(biased))


def test_positions_that_a_window_has_not_are_named():
    keyed, told = partial(WindowedAttention, distance_keys=True), r"layer 0: .*needs distance_keys: {}.*random"
    for positions, factory, message in (
        ("relative", WindowedAttention, told.format("True")),
        ("rotary", keyed, r"layer 0: .*have rotary positions.*keep .*initialise: random"),
        (None, keyed, told.format("False")),
    ):
        model = tiny_model(FAMILIES["wav2vec2-conformer"], layers=1, position_embeddings_type=positions)
        with pytest.raises(UserError, match=message):
            convert(model, LayerMap(factory))
        convert(model, LayerMap(factory), initialise="random")
    modernbert = next(case for name, case in CASES.items() if name.startswith("modernbert"))
    with pytest.raises(UserError, match=r"layer 0: .*have rotary positions.*keep .*initialise: random"):
        convert(modernbert.model(), LayerMap(WindowedAttention))


def test_a_window_of_nothing_is_named():
    with pytest.raises(ValueError, match="window: expected at least 1 frame"):
        WindowedAttention(WIDTH, HEADS, window=0)
