"""A model as an ONNX file: what onnxruntime makes of it, and what is refused."""

import sys
from functools import partial

import pytest
import torch

from cald_speech import LayerMap, convert
from cald_speech.conversion import export, export_onnx
from cald_speech.errors import UserError
from cald_speech.families import families
from cald_speech.mixers import (
    Bidirectional,
    GatedDeltaNet,
    Hydra,
    Linformer,
    Mamba,
    Mamba2,
    NormalisedLinearAttention,
    WindowedAttention,
)
from tests.families.text import Case
from tests.helpers import tiny_model


@pytest.fixture
def onnxruntime():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    return sys.modules["onnxruntime"]


@pytest.fixture(scope="module")
def speech():
    model = tiny_model(families()["wav2vec2"], layers=1)
    convert(model, LayerMap(Bidirectional))
    return model


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("length", [None, 9_000])
def test_speech(speech, onnxruntime, tmp_path, length):
    """export_onnx itself compares outputs of several batches and lengths."""
    written = export_onnx(speech, tmp_path / "model.onnx", length=length)
    assert written.error <= export.TOLERANCE and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    inputs = onnxruntime.InferenceSession(str(written.path)).get_inputs()
    assert [v.name for v in inputs] == ["input_values", "attention_mask"]
    assert all(v.shape == ["batch", length or "samples"] for v in inputs)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("initial", [{}, {0: None}], ids=["converted", "attention kept"])
def test_text(onnxruntime, tmp_path, initial):
    """Padded on the left too, which moves rows."""
    model = Case(families()["llama"], {}).model("lm", num_hidden_layers=2)
    convert(model, LayerMap(Mamba2, initial), initialise="random")
    path = export_onnx(model, tmp_path / "model.onnx").path
    tokens, mask = torch.arange(1, 19).view(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    given = {"input_ids": (tokens * mask).numpy(), "attention_mask": mask.numpy()}
    actual = torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, given)[0])
    with torch.no_grad():
        expected = model(tokens * mask, attention_mask=mask).logits
    assert (actual - expected)[mask.bool()].abs().max() <= 1e-4 * expected.abs().max()


MIXERS = {
    "Hydra": Hydra,
    "Mamba": Mamba,
    "GatedDeltaNet": GatedDeltaNet,
    "NormalisedLinearAttention": NormalisedLinearAttention,
    "Linformer": partial(Linformer, k=4, max_length=200),
    "WindowedAttention": partial(WindowedAttention, window=4, position_bias=True, distance_keys=True),
}


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("name", MIXERS)
def test_mixers(onnxruntime, tmp_path, name):
    """One file takes inputs of less than a chunk, as export_onnx looks at, and of several."""
    model = Case(families()["bert"], {}).model("masked_lm", num_hidden_layers=1, max_position_embeddings=200)
    convert(model, LayerMap(MIXERS[name]), initialise="random")
    path = export_onnx(model, tmp_path / "model.onnx").path
    tokens, mask = torch.arange(2 * 150).view(2, 150) % 20 + 1, torch.ones(2, 150, dtype=torch.long)
    mask[1, 70:] = 0
    given = {"input_ids": (tokens * mask).numpy(), "attention_mask": mask.numpy()}
    actual = torch.from_numpy(onnxruntime.InferenceSession(str(path)).run(None, given)[0])
    with torch.no_grad():
        expected = model(tokens * mask, attention_mask=mask).logits
    assert (actual - expected)[mask.bool()].abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.wide
def test_a_window_beside_sums_needs_a_fixed_length(onnxruntime, tmp_path):
    """Its sums begin a window after the frames, so that there would have to be as many."""
    model = Case(families()["bert"], {}).model("masked_lm", num_hidden_layers=1)
    convert(model, LayerMap(partial(NormalisedLinearAttention, window=8)), initialise="random")
    with pytest.raises(UserError, match=r"cannot be traced.*with a fixed one"):
        export_onnx(model, tmp_path / "model.onnx")
    assert export_onnx(model, tmp_path / "model.onnx", length=60).error <= export.TOLERANCE


def test_without_the_extra(speech, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime.*pip install 'cald-speech\[onnx\]'"):
        export_onnx(speech, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("model.pt", {}, "ends in .onnx, got .*model.pt"),
        ("model.onnx", {"length": 5}, "length: expected at least [0-9]+ samples, got 5"),
    ],
)
def test_what_cannot_be_written(speech, onnxruntime, tmp_path, name, options, told):
    with pytest.raises(UserError, match=told):
        export_onnx(speech, tmp_path / name, **options)


def test_what_cannot_be_traced_or_differs_leaves_nothing(speech, onnxruntime, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise torch.onnx.OnnxExporterError("step 1/3") from ValueError("a mixer looked at values")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UserError, match="CaldWav2Vec2ForCTC cannot be traced: a mixer looked at values"):
        export_onnx(speech, tmp_path / "model.onnx")
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, path, **options: path.write_bytes(b""))
    monkeypatch.setattr(export, "_error", lambda *args: 0.5)
    with pytest.raises(UserError, match=r"5\.0e-01 from the model"):
        export_onnx(speech, tmp_path / "model.onnx")
    monkeypatch.setattr(export, "_error", lambda *args: onnxruntime.InferenceSession(b""))
    with pytest.raises(UserError, match=r"onnxruntime cannot run .* 2 inputs of \d+ samples.*Give a length"):
        export_onnx(speech, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
