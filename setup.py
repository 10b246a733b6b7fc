"""Build script; the metadata lives in pyproject.toml.

The recipes and experiments are top-level folders of the checkout, and data inside the package where it is installed
from a wheel: cald_speech/recipes/<corpus>/ and cald_speech/hparams/. Their one source is copied while building.
"""

from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("recipes", "hparams")


class BuildWithFolders(build_py):
    """Puts FOLDERS into the built package. An editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for source, target in self._shipped():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target), preserve_mode=False)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return super().get_outputs(include_bytecode) + [str(target) for _, target in self._shipped()]

    def get_source_files(self) -> list[str]:
        return super().get_source_files() + [str(source) for source, _ in self._shipped()]

    def _shipped(self) -> Iterator[tuple[Path, Path]]:
        package = Path(self.build_lib, "cald_speech")
        for folder in FOLDERS:
            for source in sorted(Path(folder).rglob("*")):
                if source.is_file() and source.suffix != ".pyc":
                    yield source, package / source


setup(cmdclass={"build_py": BuildWithFolders})
