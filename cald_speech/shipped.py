"""Where the experiments and the recipes are: beside the package in a checkout, inside it where it was installed."""

import difflib
from pathlib import Path

from cald_speech.errors import UserError
from cald_speech.files import from_home

PACKAGE = Path(__file__).parent


def hparams_folder() -> Path:
    """The folder of the experiments' yamls, with ``guidance/`` in it."""
    return _shipped("hparams")


def recipes_folder() -> Path:
    """The folder with a folder for each corpus."""
    return _shipped("recipes")


def experiment_file(path: str | Path) -> Path:
    """``path`` where there is such a file, else the shipped experiment of that name.

    Raises: UserError, where there is neither, naming the shipped files that are called alike.

    Example
    -------
    >>> experiment_file("hparams/mamba.yaml").name
    'mamba.yaml'
    """
    path = Path(path)
    shipped = hparams_folder().parent / path
    if path.is_file():
        return path
    if not path.is_absolute() and path.parts[:1] == ("hparams",) and shipped.is_file():
        return shipped
    alike = ", ".join(experiments_called_like(path)) or "hparams/mamba.yaml"
    raise UserError(f"no experiment file {path}: expected a yaml of yours, or one that ships, such as {alike}")


def model_folder(name: str) -> str:
    """``name`` where there is such a folder, or none that ships: recipes/demo/teacher, the demo's own model.

    Example
    -------
    >>> model_folder("facebook/wav2vec2-base")
    'facebook/wav2vec2-base'
    """
    name = from_home(name)
    shipped = recipes_folder().parent / name
    ships = name.startswith("recipes/") and not Path(name).exists() and shipped.is_dir()
    return str(shipped) if ships else name


def experiments_called_like(path: str | Path) -> list[str]:
    """The shipped experiments whose file, folder, or folder and file together have about the name of ``path``.

    Example
    -------
    >>> experiments_called_like("hparams/digits/teacher.yaml")
    ['hparams/digits/teacher.yaml']
    """
    wanted = "_".join(Path(path).with_suffix("").parts[-2:]).removeprefix("hparams_")
    names: dict[str, list[str]] = {}
    for file in sorted(hparams_folder().rglob("*.yaml")):
        place = file.relative_to(hparams_folder())
        folder = place.parent.as_posix()
        if folder != "guidance":
            for name in {file.stem} if folder == "." else {file.stem, folder, f"{folder}_{file.stem}"}:
                names.setdefault(name, []).append(f"hparams/{place.as_posix()}")
    alike = [wanted] if wanted in names else difflib.get_close_matches(wanted, names, n=2)
    return [file for name in alike for file in names[name]]


def _shipped(name: str) -> Path:
    checkout = PACKAGE.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else PACKAGE) / name
