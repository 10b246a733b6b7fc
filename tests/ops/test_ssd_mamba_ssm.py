"""The mamba_ssm backend without a GPU: when it refuses, how it is imported, and its padding and reversal around a fake.

The fake stands for the upstream function, with its arguments and without lengths or direction; our recurrence is in it.
"""

import sys
from dataclasses import replace

import pytest
import torch

from cald_speech.ops.backends import Request, choose_backend
from cald_speech.ops.ssd import mamba_ssm
from cald_speech.ops.ssd.naive import ssd_naive
from tests.helpers import TOLERANCE, relative_error
from tests.ops.test_ssd import HEADS, make_inputs

CUDA = Request(torch.device("cuda"), torch.bfloat16, {"head_dim": 64, "d_state": 64, "elements": 1000})


def upstream_twin(
    x, dt, A, B, C, chunk_size, D=None, initial_states=None, dt_softplus=False, return_final_states=False
):
    assert not dt_softplus and return_final_states and B.dtype == C.dtype == x.dtype
    assert {v.dtype for v in (dt, A, D, initial_states) if v is not None} == {torch.float32}
    return ssd_naive(x, dt, A, B, C, D, initial_state=initial_states, return_final_state=True)


@pytest.fixture
def wrapped(monkeypatch):
    """The backend, around the fake."""
    monkeypatch.setattr(mamba_ssm, "upstream", lambda: upstream_twin)
    return mamba_ssm.ssd_mamba_ssm


@pytest.fixture
def installed(monkeypatch):
    """As if the package were there."""
    monkeypatch.setattr(mamba_ssm.importlib.util, "find_spec", lambda name: object())


def outputs_and_gradients(run, inputs, lengths, **options):
    leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
    y, state = run(**leaves, lengths=lengths, return_final_state=True, **options)
    g = torch.Generator().manual_seed(1)
    (y * torch.randn(y.shape, generator=g)).sum().add((state * torch.randn(state.shape, generator=g)).sum()).backward()
    return {"y": y.detach(), "state": state.detach()} | {f"gradient of {name}": v.grad for name, v in leaves.items()}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "with lengths"])
@pytest.mark.parametrize("groups", [1, 2, HEADS], ids=["one group", "two groups", "group per head"])
@pytest.mark.parametrize("left_out", [(), ("D",), ("initial_state",)], ids=["all", "without D", "without state"])
def test_equals_naive(wrapped, left_out, groups, padded, reverse):
    inputs = {name: v for name, v in make_inputs(20, groups=groups).items() if name not in left_out}
    lengths = torch.tensor([20, 7, 0]) if padded else None
    expected = outputs_and_gradients(ssd_naive, inputs, lengths, reverse=reverse)
    actual = outputs_and_gradients(wrapped, inputs, lengths, reverse=reverse)
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert all(error <= TOLERANCE["parity"] for error in errors.values()), errors


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_padding_is_never_read(wrapped, reverse):
    inputs, lengths = make_inputs(20), torch.tensor([20, 7, 0])
    poisoned = {name: v.clone() for name, v in inputs.items()}
    for name in ("x", "dt", "B", "C"):
        poisoned[name][1, 7:] = poisoned[name][2] = torch.nan
    clean = outputs_and_gradients(wrapped, inputs, lengths, reverse=reverse)
    result = outputs_and_gradients(wrapped, poisoned, lengths, reverse=reverse)
    assert [name for name in clean if not torch.equal(result[name], clean[name])] == []
    assert not result["y"][1, 7:].any() and not result["y"][2].any()
    assert torch.equal(result["state"][2], inputs["initial_state"][2])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_bfloat16_keeps_dtypes(wrapped, reverse):
    inputs = make_inputs(20)
    halves = {name: v.bfloat16() if name in ("x", "B", "C") else v for name, v in inputs.items()}
    y, state = wrapped(**halves, reverse=reverse, return_final_state=True)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected = ssd_naive(**{name: v.float() for name, v in halves.items()}, reverse=reverse)
    assert relative_error(y, expected) <= TOLERANCE["bfloat16"]


def test_no_frames(wrapped):
    inputs = make_inputs(0)
    y, state = wrapped(**inputs, return_final_state=True)
    assert y.shape == inputs["x"].shape and torch.equal(state, inputs["initial_state"])
    assert wrapped(**inputs).shape == inputs["x"].shape


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        pytest.param(replace(CUDA, device=torch.device("cpu")), "CUDA device, and the tensors are on cpu", id="cpu"),
        pytest.param(replace(CUDA, dtype=torch.float64), "float64", id="float64"),
        pytest.param(replace(CUDA, sizes={"elements": 2**31}), "2,147,483,648 elements.*2,147,483,647", id="too large"),
    ],
)
def test_refuses_with_the_way_out(installed, request_, named):
    with pytest.raises(ValueError, match=rf"^backend: ssd cannot run with 'mamba_ssm' here: .*{named}"):
        choose_backend("ssd", "mamba_ssm", {"mamba_ssm": mamba_ssm.BACKEND}, request_)


def test_refuses_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(mamba_ssm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"mamba-ssm is not installed: pip install"):
        choose_backend("ssd", "mamba_ssm", {"mamba_ssm": mamba_ssm.BACKEND}, CUDA)


def test_only_when_asked_for(installed):
    backends = {"mamba_ssm": mamba_ssm.BACKEND, "naive": replace(mamba_ssm.BACKEND, auto_on=("cuda",))}
    assert choose_backend("ssd", "mamba_ssm", backends, CUDA) == "mamba_ssm"
    assert choose_backend("ssd", "auto", backends, CUDA) == "naive"


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
    with pytest.raises(ValueError, match=rf"^backend: .*{named}.*2,147,483,647"):
        mamba_ssm.check_offsets(on_no_device(*shape), maps, maps, chunk_size)


def test_offsets_count_strides():
    maps = on_no_device(2, 2**10, 1, 16)
    narrow = on_no_device(2, 2**30, 4, 64)[:, : 2**10]
    mamba_ssm.check_offsets(narrow.contiguous(), maps, maps, 64)
    with pytest.raises(ValueError, match="x, as far as its strides reach"):
        mamba_ssm.check_offsets(narrow, maps, maps, 64)


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
    mamba_ssm.upstream.cache_clear()
    try:
        assert mamba_ssm.upstream()() == "upstream"
        assert ("selective_scan_cuda" in sys.modules) == extension
        assert getattr(sys.modules["mamba_ssm"].found, "real", False) == extension
    finally:
        mamba_ssm.upstream.cache_clear()
        for name in [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "selective_scan_cuda")]:
            del sys.modules[name]
