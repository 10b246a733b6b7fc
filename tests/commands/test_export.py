"""`cald-speech export`: a file of ONNX, and one sentence where there is none."""

import sys

import pytest


@pytest.mark.slow
@pytest.mark.wide
def test_a_file_is_written(call, place, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    told = call("export", place / "causal", "--onnx", tmp_path / "model.onnx", "--length", 8_000).output
    assert "model.onnx: opset 20, " in told and (tmp_path / "model.onnx").is_file()


def test_the_extra_is_named_before_a_model_is_looked_for(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    told = call("export", "nowhere", "--onnx", tmp_path / "model.onnx", status=2).stderr
    assert "pip install 'cald-speech[onnx]'" in told
