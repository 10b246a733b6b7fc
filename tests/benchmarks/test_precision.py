"""The benchmark of dtypes on a model of a few kilobytes: what it tells of each."""

import json

import torch

from cald_speech.benchmarks import precision
from cald_speech.conversion import from_pretrained
from tests.training.miniature import write_model


def test_every_dtype_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "cpu_peak", lambda *arguments: None)  # a process for each, tested elsewhere
    folder = write_model(tmp_path / "model")
    assert precision.main([str(folder), "--seconds", "1", "--repeats", "2"]) == 0
    rows = {row["dtype"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])}
    assert tuple(rows) == precision.DTYPES and all(row["ms"] > 0 for row in rows.values())
    assert rows["float32"]["times float32"] == 1 and rows["int8"]["call MiB"] == "unknown"
    whole, half, quantised = (
        precision.weight_bytes(from_pretrained(folder, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    )
    assert half == whole / 2 and half < quantised < whole
