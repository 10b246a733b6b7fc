"""What every command is: it ends as all do, and what it was given may be read once it runs. Imports no library."""

from abc import ABC, abstractmethod
from functools import partial
from pathlib import Path
from typing import Any

import click

from cald_speech.errors import error_epilogue
from cald_speech.files import from_home
from cald_speech.shipped import model_folder


class Later(ABC):
    """The value of an option that is read when the command runs, so that its faults end as the command's do."""

    @abstractmethod
    def read(self) -> Any:
        """The value that the command gets."""


class ModelSource(click.ParamType):
    """A model's folder or hub id; one that ships, recipes/demo/teacher, wherever the command is started."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return model_folder(value)


class Command(click.Command):
    """A command that ends as all do (`cald_speech.errors.error_epilogue`); a number that it returns is its status."""

    def invoke(self, ctx: click.Context) -> None:
        with error_epilogue():
            given = ctx.params.items()
            ctx.params = {name: value.read() if isinstance(value, Later) else _path(value) for name, value in given}
            status = super().invoke(ctx)
        ctx.exit(status or 0)


def _path(value: Any) -> Any:
    """Paths from the user's home: a shell leaves the ``~`` of ``--output_folder=~/results`` as it is."""
    if isinstance(value, tuple):
        return tuple(map(_path, value))
    return Path(from_home(str(value))) if isinstance(value, Path) else value


command = partial(click.command, cls=Command)
"""``@command()``: `click.command` for everything that a user calls."""
