"""`cald-speech` called in this process."""

from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from cald_speech.commands import main


@pytest.fixture
def call() -> Callable[..., Result]:
    """``call("evaluate", folder, ..., status=2)``: what the command printed; its exit status must be ``status``."""

    def run(*words: object, status: int = 0) -> Result:
        done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
        assert done.exit_code == status, done.output
        return done

    return run
