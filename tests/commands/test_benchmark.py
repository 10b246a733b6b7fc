"""`cald-speech benchmark`: what follows goes to the benchmark as it stands."""

import pytest

from cald_speech.benchmarks import long_audio, ops, serve_load


@pytest.mark.parametrize(("name", "module"), [("ops", ops), ("long-audio", long_audio), ("serve", serve_load)])
def test_arguments_go_through(call, monkeypatch, name, module):
    given = []
    monkeypatch.setattr(module, "main", lambda arguments: given.extend(arguments))
    call("benchmark", name, "--device", "cpu", "--dtypes", "float32")
    assert given == ["--device", "cpu", "--dtypes", "float32"]


@pytest.mark.parametrize("name", ["ops", "long-audio"])
def test_the_benchmarks_tell_their_own_options(call, name):
    assert "--device" in call("benchmark", name, "--help").stdout
    assert "unrecognized arguments: --depth" in call("benchmark", name, "--depth", 3, status=2).stderr


def test_kernels_are_not_compiled_by_the_interpreter(call, monkeypatch):
    """That they compile is tested with them."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "expected it unset" in call("benchmark", "kernels", status=2).stderr
    assert "'three' is not one of" in call("benchmark", "kernels", "--directions", "one,three", status=2).stderr


def test_what_is_no_benchmark(call):
    assert "No such command 'cooking'" in call("benchmark", "cooking", status=2).stderr
