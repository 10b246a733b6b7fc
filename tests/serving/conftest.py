"""A real server of a miniature, on a free port of this machine, in a thread of the tests' process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest

from cald_speech.longform import Recogniser
from cald_speech.serving import Settings, create_app
from cald_speech.serving.app import bind
from tests.longform.recognisers import causal, model, talk

__all__ = ["causal", "model", "talk"]

PACKAGES = ("fastapi", "uvicorn", "python_multipart")


@contextmanager
def served(recogniser, settings) -> Iterator[SimpleNamespace]:
    """``url``, ``app`` and ``client`` of a server that runs until the block is left."""
    uvicorn = pytest.importorskip("uvicorn")
    listening = bind("127.0.0.1", 0)
    app = create_app(recogniser, settings)
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, ws_max_size=2**20)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            yield SimpleNamespace(url=url, app=app, client=client, line=app.state.line, recogniser=recogniser)
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


@pytest.fixture(scope="session")
def settings(tmp_path_factory) -> Settings:
    for package in PACKAGES:
        pytest.importorskip(package)
    return Settings("mini", language="en", upload_folder=tmp_path_factory.mktemp("uploads"))


@pytest.fixture(scope="session")
def server(model, settings):
    with served(Recogniser.of(model), settings) as running:
        yield running


@pytest.fixture
def small_server(model, settings):
    """Nobody may wait, and 1 MB is all that a recording may have."""
    with served(Recogniser.of(model), replace(settings, max_queue=0, max_upload_mb=1.0)) as running:
        yield running
