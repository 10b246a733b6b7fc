"""``cald-speech doctor``: what it says of backends and packages, on machines that are faked here."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cald_speech.commands import doctor, main
from cald_speech.ops.backends import Backend
from cald_speech.ops.native.compiler import Built

HERE = {
    "torch": "2.11.0+cpu",
    "torchaudio": "2.11.0",
    "speechbrain": "1.1.2",
    "transformers": "5.23.0",
    "triton": "3.6.0",
}


@pytest.fixture
def machine(monkeypatch):
    """A machine with these packages, of which some break when they are imported."""

    real = subprocess.run

    def fake(installed: dict[str, str], broken: dict[str, str] | None = None) -> None:
        def version(name: str) -> str:
            if name not in installed:
                raise importlib.metadata.PackageNotFoundError(name)
            return installed[name]

        def run(command, **options):
            if command[0] != sys.executable:  # the compiler's
                return real(command, **options)
            modules = re.findall(r"^(?:import|from) (\w+)", command[-1], re.MULTILINE)
            names = [{"cald_speech": "mamba-ssm"}.get(module, module).replace("_", "-") for module in modules]
            error = next((error for name, error in (broken or {}).items() if name in names), None)
            stderr = f"Traceback (most recent call last):\n  File ...\n{error}\n" if error else ""
            return subprocess.CompletedProcess(command, 1 if error else 0, "", stderr)

        monkeypatch.setattr(doctor.importlib.metadata, "version", version)
        monkeypatch.setattr(doctor.subprocess, "run", run)

    return fake


def report_of() -> tuple[str, int]:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.output, result.exit_code


def test_compiled_kernels_that_were_damaged_are_told(machine, monkeypatch):
    machine(HERE)
    found = Built(None, Path("/cache/kernels.so"), "is not what was compiled")
    monkeypatch.setattr(doctor.native, "built", lambda: found)
    said = "  /cache/kernels.so, compiled anew: the file before is not what was compiled\n"
    assert f"compiled kernels\n{said}" in report_of()[0]


def test_a_sound_machine(machine):
    machine(HERE)
    report, status = report_of()
    assert status == 0 and "broken: nothing" in report
    for name, version in HERE.items():
        assert re.search(rf"^  {name} +{re.escape(version)}$", report, re.MULTILINE)
    assert re.search(r"^  mamba-ssm +not installed, for .*: pip install", report, re.MULTILINE)


def test_every_op_has_its_backend_and_the_others_reasons(machine):
    machine(HERE)
    report, _ = report_of()
    for op, backends in doctor.OPS.items():
        block = re.search(rf"^  {op}: (\w+)\n((?:    .+\n)*)", report, re.MULTILINE)
        assert block[1] in backends
        assert re.findall(r"^    (\w+): .+$", block[2], re.MULTILINE) == [name for name in backends if name != block[1]]


def test_what_is_shipped_is_found(machine, repository, monkeypatch, tmp_path):
    machine(HERE)
    report, _ = report_of()
    for name in ("hparams", "recipes"):
        assert re.search(rf"^  {name} +{re.escape(str(repository / name))} \(\d+\)$", report, re.MULTILINE)
    monkeypatch.setattr(doctor, "hparams_folder", lambda: tmp_path / "hparams")
    report, status = report_of()
    assert status == 1 and f"there is no {tmp_path / 'hparams'}" in report.split("\nbroken\n")[1]


@pytest.mark.parametrize(
    "error",
    [
        "OSError: libtorch_cuda.so: cannot open shared object file: No such file or directory",
        "OSError: Could not load this library: libtorchaudio.abi3.so: undefined symbol",
    ],
    ids=["beside a CPU-only torch", "beside torch 2.15"],
)
def test_torchaudio_beside_another_torch(machine, error):
    machine(HERE, {"torchaudio": error, "speechbrain": error})
    report, status = report_of()
    assert status == 1
    broken = report.split("\nbroken\n")[1]
    assert f"torchaudio 2.11.0 cannot be imported: {error}" in broken and "torch is 2.11.0+cpu" in broken
    assert "speechbrain 1.1.2 cannot be imported" in broken and "mend that first" in broken
    assert broken.count("mend: pip install --force-reinstall torch==2.11.0 torchaudio==2.11.0") == 2


def test_speechbrain_broken_by_itself(machine):
    machine(HERE, {"speechbrain": "ImportError: its own"})
    report, status = report_of()
    assert status == 1 and "mend: pip install --force-reinstall 'speechbrain>=1.1.2,<1.2'" in report


@pytest.mark.parametrize("name", ["torchaudio", "speechbrain", "transformers"])
def test_a_required_package_is_missing(machine, name):
    machine({key: version for key, version in HERE.items() if key != name})
    report, status = report_of()
    assert status == 1
    assert re.search(rf"^  {name} is not installed: .*\n    mend: pip install .*{name}", report, re.MULTILINE)


@pytest.mark.parametrize("name", ["triton", "mamba-ssm", "causal-conv1d"])
def test_a_broken_optional_package_is_said_and_no_failure(machine, name):
    machine(HERE | {name: "1.0"}, {name: "ImportError: undefined symbol"})
    report, status = report_of()
    assert status == 0
    assert f"{name} 1.0 cannot be imported: ImportError: undefined symbol (optional)" in report


def test_nothing_installed_at_all(machine):
    machine({})
    report, status = report_of()
    broken = re.findall(r"^  (\S+) is not installed", report, re.MULTILINE)
    assert status == 1 and broken == ["torch", "torchaudio", "speechbrain", "transformers"]


def test_an_import_that_hangs_is_broken(machine, monkeypatch):
    machine(HERE)

    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    assert "its import takes more than" in doctor.import_error(doctor.PACKAGES[0].check)


def test_an_import_is_tried_for_real():
    missing = "ModuleNotFoundError: No module named 'no_such_module_anywhere'"
    assert doctor.import_error("import json\nimport no_such_module_anywhere") == missing
    assert doctor.import_error("import json") is None


def test_a_gpu_is_listed_with_its_own_backends(machine, monkeypatch):
    machine(HERE)
    backends = {
        "triton": Backend("a", auto_on=("cuda",)),
        "other": Backend("b", auto_on=()),
        "torch": Backend("a"),
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "OPS", {"ssd": backends})
    report, _ = report_of()
    on_cpu, on_cuda = re.findall(r"^  ssd: (\w+)$", report, re.MULTILINE)
    assert (on_cpu, on_cuda) == ("torch", "triton")
    assert "other: runs here when it is asked for" in report and "torch: runs here too, slower" in report
