"""Where the experiments and the recipes are: beside the package in a checkout, inside it where it was installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def hparams_folder() -> Path:
    """The folder of the experiments' yamls, with ``guidance/`` in it."""
    return _shipped("hparams")


def recipes_folder() -> Path:
    """The folder with a folder for each corpus."""
    return _shipped("recipes")


def experiment_file(path: str | Path) -> Path:
    """``path`` where there is such a file, else the shipped experiment of that name, else ``path`` as it is.

    Example
    -------
    >>> experiment_file("hparams/mamba.yaml").name, experiment_file("nowhere.yaml")
    ('mamba.yaml', PosixPath('nowhere.yaml'))
    """
    path = Path(path)
    shipped = hparams_folder().parent / path
    is_shipped = not path.is_absolute() and path.parts[:1] == ("hparams",) and shipped.is_file()
    return shipped if is_shipped and not path.exists() else path


def _shipped(name: str) -> Path:
    checkout = PACKAGE.parent
    return (checkout if (checkout / "pyproject.toml").is_file() else PACKAGE) / name
