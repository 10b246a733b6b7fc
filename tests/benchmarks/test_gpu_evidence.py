"""The programs for a GPU run at tiny sizes on a CPU, so that no typing error costs a device's time."""

import json
import os
import subprocess

import pytest
import torch

from cald_speech.benchmarks import gpu_evidence, gpu_pieces
from cald_speech.benchmarks.gpu_pieces import PIECES, SIZES
from cald_speech.benchmarks.stopwatch import Limits
from cald_speech.shipped import hparams_folder

ROOT = hparams_folder().parent
DRY = ["--device", "cpu", "--size", "tiny"]


def run_here(case, limit_s):
    """A piece in this process: one of its own imports the libraries again, which takes seconds."""
    return "ok", list(map(json.loads, map(json.dumps, PIECES[case["piece"]](case["device"], SIZES[case["size"]]))))


@pytest.fixture
def quick(monkeypatch):
    """What is slow on a CPU and has its own tests is not measured."""
    limits = Limits(1e9, {torch.bfloat16: 1e9, torch.float32: 1e9})
    monkeypatch.setattr(gpu_pieces, "measure_limits", lambda device, dtypes: limits)
    monkeypatch.setattr(gpu_pieces, "parity_fault", lambda case, backend: None)


def test_every_piece_gives_its_figures(tmp_path, capsys, quick):
    pieces = [name for name in PIECES if name != "bars"]
    assert gpu_evidence.main([*DRY, "--output_folder", str(tmp_path), "--pieces", *pieces], run_here) == 0
    evidence = json.loads((tmp_path / "evidence.json").read_text())
    found = {piece["piece"]: piece["rows"] for piece in evidence["pieces"]}
    assert list(found) == pieces and not any("fault" in row for rows in found.values() for row in rows)
    for step in (found["training step"][0], found["training step, gated DeltaNet"][0]):
        assert step["days"] == pytest.approx(90_000 * step["seconds"] / 86_400)
        assert step["operations of matrix products"] > 0
    errors = [row["relative error"] for row in found["parity"] if "relative error" in row]
    assert len(errors) == 4 and max(errors) < 1e-4
    read = [row for row in found["length"] if row["what"] == "reading"]
    assert len(read) == 3 * len(SIZES["tiny"].durations_s)
    assert all(row["audio s per s"] == pytest.approx(row["duration_s"] / row["seconds"]) for row in read)
    short, long = (found["language model"][i]["cache MiB"] for i in (2, -1))
    assert short == long > 0  # every layer is converted: a state does not grow
    assert "== day: ok" in capsys.readouterr().out


def test_what_fails_is_a_row_and_the_next_one_runs(tmp_path, capsys, monkeypatch, quick):
    def no_kernel(*arguments, **options):
        raise RuntimeError("a kernel that does not compile\nand its source")

    monkeypatch.setattr(gpu_pieces, "measured_step", no_kernel)
    words = ["--output_folder", str(tmp_path), "--pieces", "training step", "day"]
    assert gpu_evidence.main([*DRY, *words], run_here) == 1
    step, day = json.loads((tmp_path / "evidence.json").read_text())["pieces"]
    assert step["rows"][0]["fault"] == "RuntimeError: a kernel that does not compile"
    assert day["rows"][0]["seconds"] > 0 and "training step failed" in capsys.readouterr().out


def test_a_step_that_is_too_large_is_halved(monkeypatch):
    def too_large(device, size, mixer, recipe, batch_s, batches):
        if batch_s > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"seconds": 1.0}

    monkeypatch.setattr(gpu_pieces, "measured_step", too_large)
    rows = list(gpu_pieces.training_step("cpu", SIZES["tiny"]))
    assert [(row["batch_s"], row["batches"]) for row in rows] == [(3, 2), (1.5, 4), (0.75, 8)]
    assert [row.get("fault") for row in rows] == ["out of memory", "out of memory", None]


def test_what_there_is_no_time_for_is_skipped_and_said(tmp_path, capsys):
    words = ["--device", "cuda", "--size", "full", "--budget", "50", "--output_folder", str(tmp_path)]
    answers = {
        "parity": ("ok", []),
        "training step": ("failed with exit status 1: killed", [{"what": "training step"}]),
    }
    assert gpu_evidence.main(words, lambda case, limit_s: answers.get(case["piece"], ("ok", []))) == 1
    said = capsys.readouterr().out
    assert "== day: skipped: 50 s are left" in said and "killed" in said
    kept = json.loads((tmp_path / "evidence.json").read_text())["pieces"]
    assert [piece["piece"] for piece in kept] == list(PIECES) and kept[1]["rows"] == [{"what": "training step"}]


def test_a_cpu_is_not_asked_for_the_full_size(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_evidence.main(["--device", "cpu", "--output_folder", str(tmp_path)])
    assert "expected --size tiny" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.wide  # a dozen Python processes that import the libraries
@pytest.mark.parametrize("script", ["gpu_check.sh", "gpu_evidence.sh"])
def test_the_scripts_run_dry(script, tmp_path):
    environment = os.environ | {"DRY_RUN": "1", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([ROOT / "scripts" / script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) <= 8 and all(json.loads((tmp_path / f).read_text()) for f in files if f.endswith("json"))
