"""`cald-speech` called in this process, and a place with miniatures that all commands may read."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from cald_speech import LayerMap, convert
from cald_speech.commands import main
from cald_speech.mixers import Bidirectional, Mamba2
from tests.evaluation.layerwise import add_noise, rewrite, write_recordings, write_teacher
from tests.longform.recognisers import causal, kept, model, talk

__all__ = ["call", "causal", "kept", "model", "place", "talk"]


@pytest.fixture
def call() -> Callable[..., Result]:
    """``call("evaluate", folder, ..., status=2)``: what the command printed; its exit status must be ``status``."""

    def run(*words: object, status: int = 0, heard: bytes | None = None) -> Result:
        done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False, input=heard)
        assert done.exit_code == status, done.output
        return done

    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory) -> Path:
    """source, teacher, student (bidirectional), causal and manifest.json, whose texts are what the teacher reads."""
    place = tmp_path_factory.mktemp("place")
    source = write_teacher(place / "source")
    teacher = rewrite(source, place / "teacher", add_noise(0.2))
    rewrite(teacher, place / "student", lambda model: convert(model, LayerMap(Bidirectional)))
    rewrite(teacher, place / "causal", lambda model: convert(model, LayerMap(Mamba2)))
    write_recordings(place, teacher)
    return place
