"""Compiling the C kernels: which compiler, which flags, where the result is kept."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SHARED = Path(__file__).parent  # headers of all ops; an op's own sources lie beside the Python that calls them
# No -ffast-math: it would undo the rounding that exp2_of() relies on. Contraction to fused multiply-adds is wanted.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
COMPILE_SECONDS = 120
ARCHITECTURE = {"x86_64": "-march=native", "AMD64": "-march=native"}  # elsewhere the flag is -mcpu=native


class NotBuilt(RuntimeError):
    """The compiled kernels cannot be had here; the message says why and what would help."""


def build() -> ctypes.CDLL:
    """Load the kernels, compiling them first where the cache does not hold them yet."""
    if os.name != "posix":
        raise NotBuilt("It is compiled on Linux and macOS only.")
    compiler = find_compiler()
    command = [*compiler, ARCHITECTURE.get(platform.machine(), "-mcpu=native"), *FLAGS]
    path = cache_folder() / f"kernels-{fingerprint(command)}.so"
    try:
        if not path.exists():
            compile_to(path, command)
    except OSError as error:
        raise NotBuilt(f"It cannot be kept in {path.parent} ({error}): set CALD_SPEECH_CACHE to a folder.") from error
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NotBuilt(f"{path} was compiled but cannot be loaded ({error}): remove it to try again.") from error


def find_compiler() -> list[str]:
    """The C compiler as the start of a command: ``$CC``, or the first of cc, gcc and clang.

    Example
    -------
    >>> os.environ["CC"] = "no-such-compiler"
    >>> find_compiler()
    Traceback (most recent call last):
    ...
    cald_speech.ops.native.compiler.NotBuilt: It needs a C compiler, and CC names none: no-such-compiler.
    >>> del os.environ["CC"]
    """
    if named := os.environ.get("CC"):
        command = shlex.split(named)
        if not shutil.which(command[0]):
            raise NotBuilt(f"It needs a C compiler, and CC names none: {named}.")
        return command
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise NotBuilt("It needs a C compiler, and there is none: apt install gcc, or set CC.")


def cache_folder() -> Path:
    """Where compiled kernels are kept: nobody else may write there, since they are loaded from it."""
    try:
        if chosen := os.environ.get("CALD_SPEECH_CACHE"):
            folder = Path(chosen)
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cald_speech"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        raise NotBuilt(f"It has nowhere to be kept ({error}): set CALD_SPEECH_CACHE to a folder.") from error
    return folder


def sources(endings: str) -> list[Path]:
    """The C files of every op, in an order that does not depend on the machine."""
    return sorted(SHARED.parent.glob(f"**/native/*.[{endings}]"))


def fingerprint(command: list[str]) -> str:
    """Of all that the result depends on: sources, command, compiler, processor."""
    parts = [str(path.relative_to(SHARED.parent)).encode() + path.read_bytes() for path in sources("ch")]
    parts += [" ".join(command).encode(), output_of([*command[:1], "--version"]), processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def processor() -> str:
    """What ``-march=native`` looks at: a home folder may be shared by machines that differ in it."""
    try:
        lines: Iterator[str] = iter(Path("/proc/cpuinfo").read_text().splitlines())
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def compile_to(path: Path, command: list[str]) -> None:
    """Compile every source and link them, under a temporary name until it is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        objects = []
        for source in sources("c"):
            objects.append(f"{folder}/{len(objects)}.o")
            output_of([*command, f"-I{SHARED}", "-c", str(source), "-o", objects[-1]])
        # Linked without -fopenmp: the OpenMP calls find the runtime that torch has loaded, and its threads with it.
        undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        output_of([command[0], "-shared", *undefined, *objects, "-o", f"{folder}/kernels.so"])
        os.replace(f"{folder}/kernels.so", path)


def output_of(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        reason = next((line for line in said if "error" in line), said[0] if said else error)
        raise NotBuilt(f"{shlex.join(command)} failed: {reason}.") from error
