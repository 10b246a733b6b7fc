"""Generators of damaged input, and what becomes of it: ``python -m tests.faults --minutes 30``.

A module here with a ``GENERATORS`` is found by itself: by the name of what it damages, a function that gets a seeded
``random.Random`` and an empty folder, makes one damaged thing there, and uses it as a user would. A UserError is what
should come of it, or that it can be used after all; whatever else it raises is a fault, and so is a case that does not
end. :func:`run` is one case of one generator.
"""

import random
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from cald_speech.errors import UserError

LIMIT_S = 30  # for one case; most take some 0.05 s
Generator = Callable[[random.Random, Path], None]


def kinds() -> dict[str, dict[str, Generator]]:
    """The generators of each module here that has some, by what they damage."""
    modules = {m.name: import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__) if m.name[0] != "_"}
    return {kind: module.GENERATORS for kind, module in modules.items() if hasattr(module, "GENERATORS")}


def generators() -> dict[str, Generator]:
    """All of them."""
    return {name: of for of_kind in kinds().values() for name, of in of_kind.items()}


def run(generator: Generator, seed: str) -> tuple[str, str]:
    """What became of one case (``used``, ``refused``, ``traceback`` or ``hang``), and what was said.

    A generator whose cases take longer says so by its ``limit_s``.
    """
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    try:
        with _limited(getattr(generator, "limit_s", LIMIT_S)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            generator(random.Random(seed), folder)
        return "used", ""
    except UserError as error:
        return "refused", str(error)
    except TimeoutError as error:
        return "hang", str(error)
    except Exception:
        return "traceback", traceback.format_exc()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*args) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
