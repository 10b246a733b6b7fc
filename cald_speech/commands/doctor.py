"""``cald-speech doctor``: which backend each op gets on this machine and why, what is installed, and what is broken.

A package counts as whole when a fresh Python imports it: what the metadata promise is not enough (torchaudio beside
another torch is installed and cannot be loaded). Everything works with packages missing.
"""

import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import click
import torch

from cald_speech.commands.command import command
from cald_speech.ops import OPS, native
from cald_speech.ops.backends import Backend, Request, choose_backend
from cald_speech.ops.native.kept import NotBuilt
from cald_speech.shipped import hparams_folder, recipes_folder

# A batch of four half-minutes in a base-sized encoder, in the dtype that the device trains in.
SIZES = {"head_dim": 64, "d_state": 64, "width": 4, "elements": 4 * 1_500 * 768}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
IMPORT_SECONDS = 120
INSTALL = "pip install"
# torchaudio loads beside the torch of its own build: the ordinary ones from the index, on a machine without a GPU too.
TORCH = "pip install --force-reinstall torch==2.11.0 torchaudio==2.11.0"


@dataclass(frozen=True)
class Package:
    """A package by its name at the index.

    check : what a fresh Python runs to see whether it works.
    install : the command that installs it.
    needed_for : what does not work without it; an optional package that is missing is not a fault.
    required : one of cald-speech's own dependencies.
    """

    name: str
    check: str
    install: str
    needed_for: str
    required: bool = True

    @property
    def mend(self) -> str:
        """The command that puts it right where it is there and broken."""
        return self.install if self.install == TORCH else self.install.replace(INSTALL, f"{INSTALL} --force-reinstall")


PACKAGES = (
    Package("torch", "import torch", TORCH, "everything"),
    Package("torchaudio", "import torchaudio", TORCH, "reading and augmenting audio, and speechbrain"),
    Package("speechbrain", "import speechbrain", "pip install 'speechbrain>=1.1.2,<1.2'", "the recipes"),
    Package("transformers", "import transformers", "pip install 'transformers>=5.17,<6'", "pretrained encoders"),
    Package("triton", "import triton", "pip install 'triton>=3.6'", "our kernels on a GPU", required=False),
    Package(
        "mamba-ssm",
        "from cald_speech.benchmarks.peers import upstream; upstream()",
        "pip install --no-build-isolation --no-deps mamba-ssm einops",
        "a peer in the benchmark",
        required=False,
    ),
    Package(
        "causal-conv1d",
        "import causal_conv1d",
        "pip install --no-build-isolation --no-deps causal-conv1d",
        "a peer in the benchmark",
        required=False,
    ),
)


@dataclass(frozen=True)
class Finding:
    """Something that is broken, in words, with the command that mends it."""

    what: str
    mend: str
    required: bool


@command()
def doctor() -> int:
    """Which backend every op gets on this machine and why, the versions, and what is broken with what mends it.

    The exit status is 1 where something that is required is broken.
    """
    report, sound = diagnose()
    click.echo(report)
    return 0 if sound else 1


def diagnose() -> tuple[str, bool]:
    """The report, and whether all that is required works."""
    found = findings()
    lines = ["versions", *(f"  {name:14} {version}" for name, version in versions().items()), ""]
    lines += ["shipped", *(f"  {name:14} {told}" for name, told in shipped().items()), ""]
    lines += ["compiled kernels", f"  {compiled_kernels()}", ""]
    for device in devices():
        lines += [f"backends on {device} ({str(DTYPES[device]).removeprefix('torch.')})"]
        lines += [f"  {line}" for op, backends in OPS.items() for line in backend_lines(op, backends, device)]
    lines += ["", "broken" if found else "broken: nothing"]
    for finding in found:
        lines += [f"  {finding.what}{'' if finding.required else ' (optional)'}", f"    mend: {finding.mend}"]
    return "\n".join(lines), not any(finding.required for finding in found)


def versions() -> dict[str, str]:
    """Of Python and of every package; what is not installed says so."""
    return {"python": platform.python_version()} | {
        package.name: version_of(package.name) or f"not installed, for {package.needed_for}: {package.install}"
        for package in PACKAGES
    }


def shipped() -> dict[str, str]:
    """Where the experiments and the recipes are, and how many; `cald-speech train` takes them from there."""
    places = {"hparams": (hparams_folder(), "**/*.yaml"), "recipes": (recipes_folder(), "*/prepare.py")}
    return {name: f"{folder} ({len(list(folder.glob(what)))})" for name, (folder, what) in places.items()}


def compiled_kernels() -> str:
    """Where they are kept, what was wrong with those that were there before, or why there are none."""
    try:
        found = native.built()
    except NotBuilt as reason:
        return f"none: {reason}"
    return f"{found.path}" + (f", compiled anew: the file before {found.mended}" if found.mended else "")


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def backend_lines(op: str, backends: Mapping[str, Backend], device: str) -> list[str]:
    """What ``auto`` takes on a device, and of every other backend why it was not taken.

    Example
    -------
    >>> backends = {"fast": Backend("a", lambda request: "no GPU here."), "plain": Backend("b")}
    >>> print(*backend_lines("ssd", backends, "cpu"), sep="\\n")
    ssd: plain
      fast: no GPU here.
    """
    request = Request(torch.device(device), DTYPES[device], SIZES)
    taken = choose_backend(op, "auto", backends, request)
    lines, before = [f"{op}: {taken}"], True
    for name, backend in backends.items():
        before = before and name != taken
        if name == taken:
            continue
        reason = backend.why_not(request)
        if reason is None and device not in backend.auto_on:
            reason = f"runs here when it is asked for, backend={name!r}; auto does not take it."
        elif reason is None and not before:
            reason = f"runs here too, slower; backend={name!r} asks for it."
        lines.append(f"  {name}: {reason}")
    return lines


def findings() -> list[Finding]:
    """What is broken, each with the command that mends it; every package that is there is imported.

    All in one Python first, which is quick; where that fails, each in its own, three at a time.
    """
    installed = {package.name: version_of(package.name) for package in PACKAGES}
    present = [package for package in PACKAGES if installed[package.name]]
    errors = {}
    if present and import_error("\n".join(package.check for package in present)) is not None:
        with ThreadPoolExecutor(max_workers=3) as pool:
            errors = dict(
                zip([p.name for p in present], pool.map(import_error, [p.check for p in present]), strict=True)
            )
    found = []
    for folder in (hparams_folder(), recipes_folder()):
        if not folder.is_dir():
            what = f"there is no {folder}, where `cald-speech train` finds what is shipped"
            found.append(Finding(what, "pip install --force-reinstall --no-deps cald-speech", True))
    for package in PACKAGES:
        if not installed[package.name] and package.required:
            what = f"{package.name} is not installed: it is for {package.needed_for}"
            found.append(Finding(what, package.install, True))
        elif error := errors.get(package.name):
            found.append(Finding(*_explained(package, error, installed, errors), package.required))
    return found


def import_error(check: str) -> str | None:
    """The last line of what a fresh Python says when it runs a package's check, or None where it can."""
    try:
        done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"its import takes more than {IMPORT_SECONDS} s"
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _explained(
    package: Package, error: str, installed: Mapping[str, str | None], errors: Mapping[str, str | None]
) -> tuple[str, str]:
    what = f"{package.name} {installed[package.name]} cannot be imported: {error}"
    if package.name == "torchaudio" and not errors.get("torch"):
        return (
            f"{what}. It loads beside the torch of its own build alone, and torch is {installed['torch']}",
            TORCH,
        )
    if package.name == "speechbrain" and (not installed["torchaudio"] or errors.get("torchaudio")):
        return f"{what}. It imports torchaudio, which is broken itself: mend that first", TORCH
    return what, package.mend
