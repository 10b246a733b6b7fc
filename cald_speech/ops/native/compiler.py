"""Compiling the C kernels: which compiler, which flags."""

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cald_speech.ops.native.kept import UNFINISHED, NotBuilt, cache_folder, compiling_alone, damage, keep, tidy

logger = logging.getLogger(__name__)

SHARED = Path(__file__).parent  # headers of all ops; an op's own sources lie beside the Python that calls them
# No -ffast-math: it would undo the rounding that exp2_of() relies on. Contraction to fused multiply-adds is wanted.
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
COMPILE_SECONDS = 120
ARCHITECTURE = {"x86_64": "-march=native", "AMD64": "-march=native"}  # elsewhere the flag is -mcpu=native


@dataclass(frozen=True)
class Built:
    """mended : what was wrong with the library that was kept before, where it had to be compiled anew for it."""

    library: ctypes.CDLL
    path: Path
    mended: str | None = None


def build() -> Built:
    """Load the kernels, compiling them first where the cache does not hold them whole."""
    if os.name != "posix":
        raise NotBuilt("It is compiled on Linux and macOS only.")
    compiler = find_compiler()
    path, mended = cache_folder() / f"kernels-{fingerprint(compiler)}.so", None
    try:
        tidy(path.parent)
        if damage(path):
            with compiling_alone(path.parent):
                mended = damage(path) if path.exists() else None
                if damage(path):
                    compile_to(path, compiler)
        if reason := damage(path):
            raise NotBuilt(f"{path} was compiled, and {reason}: set CALD_SPEECH_CACHE to another folder.")
    except OSError as error:
        raise NotBuilt(f"It cannot be kept in {path.parent} ({error}): set CALD_SPEECH_CACHE to a folder.") from error
    if mended:
        logger.warning("%s %s: compiled anew", path, mended)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        way_out = "remove it to try again"
        if "__kmpc_" in str(error):  # clang's calls of OpenMP; torch for Linux has gcc's runtime loaded
            way_out = "its compiler expects another OpenMP runtime than torch has loaded, so set CC to gcc"
        raise NotBuilt(f"{path} was compiled but cannot be loaded ({error}): {way_out}.") from error
    if missing := [name for name in symbols() if not hasattr(library, name)]:
        raise NotBuilt(f"{path} was compiled but has no {missing[0]}: remove it to try again.")
    return Built(library, path, mended)


def find_compiler() -> list[str]:
    """The C compiler as the start of a command: ``$CC``, which may be of several words, or the first of cc, gcc, clang.

    Example
    -------
    >>> os.environ["CC"] = "no-such-compiler"
    >>> find_compiler()
    Traceback (most recent call last):
    ...
    cald_speech.ops.native.kept.NotBuilt: It needs a C compiler, and CC names none: no-such-compiler.
    >>> del os.environ["CC"]
    """
    if named := os.environ.get("CC", "").strip():
        try:
            command = [named] if shutil.which(named) else shlex.split(named)  # a path may have blanks
        except ValueError as error:
            raise NotBuilt(f"It needs a C compiler, and CC cannot be read as a command ({error}): {named}.") from error
        if not command or not shutil.which(command[0]):
            raise NotBuilt(f"It needs a C compiler, and CC names none: {named}.")
        return command
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise NotBuilt("It needs a C compiler, and there is none: apt install gcc, or set CC.")


def sources(endings: str) -> list[Path]:
    """The C files of every op, in an order that does not depend on the machine."""
    return sorted(SHARED.parent.glob(f"**/native/*.[{endings}]"))


def symbols() -> list[str]:
    """What the sources export, by the macros of pass.h and fields.h."""
    found = (re.findall(r"^EXPORT_(PASS|FIELDS)\((\w+)", source.read_text(), re.M) for source in sources("c"))
    endings = {"PASS": ("", "_scratch"), "FIELDS": ("_fields",)}
    return [name + ending for each in found for kind, name in each for ending in endings[kind]]


def command_of(compiler: list[str]) -> list[str]:
    return [*compiler, ARCHITECTURE.get(platform.machine(), "-mcpu=native"), *FLAGS]


def fingerprint(compiler: list[str]) -> str:
    """Of all that the result depends on: sources, command, compiler, processor."""
    parts = [str(path.relative_to(SHARED.parent)).encode() + path.read_bytes() for path in sources("ch")]
    parts += [shlex.join(command_of(compiler)).encode(), output_of([*compiler, "--version"]), processor().encode()]
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


def compile_to(path: Path, compiler: list[str]) -> None:
    """Compile every source and link them, under a temporary name until it is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=UNFINISHED) as folder:
        objects = []
        for source in sources("c"):
            objects.append(f"{folder}/{len(objects)}.o")
            output_of([*command_of(compiler), f"-I{SHARED}", "-c", str(source), "-o", objects[-1]])
        # Linked without -fopenmp: the OpenMP calls find the runtime that torch has loaded, and its threads with it.
        undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        output_of([*compiler, "-shared", *undefined, *objects, "-o", f"{folder}/kernels.so"])
        keep(Path(folder) / "kernels.so", path)


def output_of(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True, timeout=COMPILE_SECONDS).stdout
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip().splitlines()
        reason = next((line for line in said if "error" in line), said[0] if said else error)
        raise NotBuilt(f"{shlex.join(command)} failed: {reason}.") from error
