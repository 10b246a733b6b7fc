"""Peers: they compute what we compute, and say where they cannot; mamba-ssm's guards, without it and without a GPU."""

import sys
from dataclasses import replace

import pytest
import torch

from cald_speech.benchmarks import peers
from cald_speech.benchmarks.cases import Case
from cald_speech.benchmarks.contest import contestants
from cald_speech.benchmarks.peers import PEERS, check_offsets, of_transformers, upstream, why_not_mamba_ssm
from cald_speech.ops.backends import Request
from cald_speech.ops.ssd.naive import ssd_naive

CUDA = Request(torch.device("cuda"), torch.bfloat16, {"head_dim": 64, "d_state": 64, "elements": 1000})


@pytest.mark.parametrize("groups", [1, 2], ids=["one group", "group per head"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in PEERS for name in PEERS[op]])
def test_peers_compute_what_we_compute(op, name, groups):
    case = Case(op, batch=1, num_frames=1, heads=2, groups=1 if op == "selective_scan" else groups)
    if reason := PEERS[op][name].why_not(case.request):
        pytest.skip(reason)
    assert contestants(case)[name].fault() is None


FUNCTIONS = [
    ("mamba", "mamba_selective_scan"),
    ("mamba2", "mamba2_chunk_scan"),
    ("qwen3_next", "torch_chunk_gated_delta_rule"),
]


@pytest.mark.parametrize(("model", "name"), FUNCTIONS)
def test_the_peer_is_transformers_own_pytorch_path(model, name):
    function = of_transformers(model, name)
    assert function.__code__.co_filename.endswith(f"transformers/models/{model}/modeling_{model}.py")
    assert function.__code__.co_name != "wrapped"


@pytest.mark.parametrize("op", ["ssd", "ssd_bidirectional"])
def test_mamba_ssm_is_called_as_its_library_calls_it(op, monkeypatch):
    """Around a fake of the upstream function, with our recurrence in it."""

    def twin(x, dt, A, B, C, chunk_size, D=None, initial_states=None, dt_softplus=False, return_final_states=False):
        return ssd_naive(x, dt, A, B, C, D)

    monkeypatch.setattr(peers, "upstream", lambda: twin)
    monkeypatch.setitem(PEERS[op], "mamba-ssm", replace(PEERS[op]["mamba-ssm"], why_not=lambda request: None))
    case = Case(op, batch=1, num_frames=1, heads=2, groups=2)
    assert contestants(case)["mamba-ssm"].fault() is None


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        pytest.param(replace(CUDA, device=torch.device("cpu")), "CUDA device, and the tensors are on cpu", id="cpu"),
        pytest.param(replace(CUDA, dtype=torch.float64), "float64", id="float64"),
        pytest.param(replace(CUDA, sizes={"elements": 2**31}), "2,147,483,648 elements", id="too large"),
    ],
)
def test_mamba_ssm_says_what_it_cannot_run(request_, named, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: object())
    assert named in why_not_mamba_ssm(request_) and why_not_mamba_ssm(CUDA) is None
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    assert "mamba-ssm is not installed: pip install" in why_not_mamba_ssm(CUDA)


def on_no_device(*shape):
    return torch.empty(shape, device="meta")


@pytest.mark.parametrize(
    ("shape", "groups", "d_state", "chunk_size", "named"),
    [
        pytest.param((8, 2**16, 64, 64), 1, 64, 64, "x, as far", id="input"),
        pytest.param((1, 2**16, 1, 1), 1, 2**15, 64, "B, as far", id="maps"),
        pytest.param((1, 2**16, 128, 2), 1, 2, 256, "chunk_size comes to 2,147,483,648", id="scores"),
        pytest.param((1, 2**16, 64, 64), 1, 2**9, 64, "d_state comes to", id="gradient of the maps"),
        pytest.param((1, 2**15, 32, 256), 1, 128, 1, "head_dim x d_state comes to", id="states"),
    ],
)
def test_offsets_past_2_31_are_refused(shape, groups, d_state, chunk_size, named):
    maps = on_no_device(*shape[:2], groups, d_state)
    with pytest.raises(ValueError, match=rf"{named}.*2,147,483,647"):
        check_offsets(on_no_device(*shape), maps, maps, chunk_size)


def test_offsets_count_strides():
    maps = on_no_device(2, 2**10, 1, 16)
    narrow = on_no_device(2, 2**30, 4, 64)[:, : 2**10]
    check_offsets(narrow.contiguous(), maps, maps, 64)
    with pytest.raises(ValueError, match="x, as far as its strides reach"):
        check_offsets(narrow, maps, maps, 64)


def test_the_peer_is_called_with_no_offset_past_2_31(monkeypatch):
    monkeypatch.setattr(peers, "upstream", lambda: pytest.fail("called"))
    x, maps = on_no_device(8, 2**16, 64, 64), on_no_device(8, 2**16, 1, 64)
    with pytest.raises(ValueError, match="x, as far as its strides reach"):
        PEERS["ssd"]["mamba-ssm"].call(x, x[..., 0], x[0, 0, :, 0], maps, maps)


@pytest.mark.parametrize("extension", [False, True], ids=["without its extension", "with its extension"])
def test_upstream_is_imported_without_its_extension(extension, tmp_path, monkeypatch):
    """A release that imports its CUDA extension at the top; what stands in for it is gone afterwards."""
    package = tmp_path / "mamba_ssm" / "ops" / "triton"
    package.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("import selective_scan_cuda as found")
    (package / "ssd_combined.py").write_text("def mamba_chunk_scan_combined(): return 'upstream'")
    if extension:
        (tmp_path / "selective_scan_cuda.py").write_text("real = True")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")]:
        monkeypatch.delitem(sys.modules, name)
    upstream.cache_clear()
    try:
        assert upstream()() == "upstream"
        assert ("selective_scan_cuda" in sys.modules) == extension
        assert getattr(sys.modules["mamba_ssm"].found, "real", False) == extension
    finally:
        upstream.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")]:
            del sys.modules[name]
