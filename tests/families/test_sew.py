"""What SEW has of its own: layers at a lower rate than the output. The contract is in test_contract.py."""

import pytest
import torch

from cald_speech import LayerMap, convert
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.longform import AudioSource, predicted_peak_bytes, stream
from cald_speech.longform.encoder import encode_long
from cald_speech.mixers import Bidirectional, Mamba2
from tests.families.contract import captured_layers
from tests.helpers import TOLERANCE, audio_batch, relative_error, tiny_model

FAMILY = families()["sew"]


@torch.no_grad()
def test_the_layers_see_whole_pairs_alone():
    """Hugging Face's see the last frame of an odd number in a batch, and not alone."""
    model = tiny_model(FAMILY)
    convert(model, LayerMap(Bidirectional, {1: None}))
    model.eval()
    audio, mask = audio_batch((8000, 5000))
    with captured_layers(model, FAMILY) as states:
        logits = model(audio, attention_mask=mask).logits
    assert FAMILY.context(model).frames.tolist() == [12, 7] and len(logits[0]) == 24
    assert all(x.size(1) == 12 for x, _ in states)
    alone = model(audio[1:, :5000]).logits[0]
    assert len(alone) == 15
    assert relative_error(logits[1, :15], alone) <= TOLERANCE["rounding"]
    assert relative_error(alone[14], model.lm_head.bias) <= TOLERANCE["rounding"], "the odd frame is heard by no layer"


@torch.no_grad()
def test_long_audio_takes_room_for_the_layers_frames():
    model = tiny_model(FAMILY)
    assert encode_long(model, AudioSource.from_samples(torch.randn(8320))).shape == (12, 32)
    hour, two = (predicted_peak_bytes(model, s) for s in (3600, 7200))
    # Input at 50 frames a second, keys and values at half of that.
    assert two - hour == pytest.approx(3600 * 50 * (32 + 2 * 32 / 2) * 4, rel=1e-3)


def test_what_has_no_frame_and_what_arrives_is_refused():
    model = tiny_model(FAMILY)
    with pytest.raises(UserError, match=r"expected audio with a frame for the layers, .*, got 719 samples"):
        model(torch.zeros(1, 719))
    convert(model, LayerMap(Mamba2))
    with pytest.raises(UserError, match="sew models cannot run live: their layers run at a lower rate"):
        next(stream(model.eval(), [torch.zeros(1000)]))
