"""The addresses of the server, and the server itself."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cald_speech.errors import UserError
from cald_speech.longform import Recogniser
from cald_speech.serving.asked import Refused, check_model, read_fields
from cald_speech.serving.transcripts import answer, transcript
from cald_speech.serving.upload import ClientLeft, read_form
from cald_speech.serving.work import Line

logger = logging.getLogger(__name__)

# A page that loads nothing from elsewhere, and cannot.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; "
    "connect-src 'self' ws: wss:; media-src blob:; worker-src blob:; img-src data:"
}
SHUTDOWN_S = 2


@dataclass(frozen=True)
class Settings:
    """How a model is served.

    Arguments
    ---------
    model_name : what clients call the model.
    language : what the model writes, such as en; None where that is not known.
    max_queue : recordings that may wait beside the one that is read.
    max_upload_mb : megabytes that a recording may have.
    upload_folder : where recordings are while they are read, without a name; None is the system's.
    options : of :func:`~cald_speech.longform.transcribe`: decoding, margins, chunk_s, dtype, storage.
    """

    model_name: str
    language: str | None = None
    max_queue: int = 32
    max_upload_mb: float = 4096
    upload_folder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)


def create_app(recogniser: Recogniser, settings: Settings) -> Any:
    """The server as an ASGI application (a FastAPI).

    Raises: UserError where the extra `serve` is not installed.
    """
    check_installed()
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from starlette.exceptions import HTTPException

    line = Line(settings.max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        line.close()

    # Without the pages about itself, which load scripts from elsewhere.
    app = FastAPI(title="cald-speech", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.line = line

    @app.exception_handler(Refused)
    def refused(request: Request, error: Refused) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ClientLeft)
    def left(request: Request, error: ClientLeft) -> Response:
        return Response(status_code=499)  # nobody hears it

    @app.exception_handler(HTTPException)
    def no_such_address(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:80]}: {error.detail}: see /openapi.json for what there is"
        return JSONResponse(Refused(error.status_code, message).body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    def failed(request: Request, error: Exception) -> Response:
        message = "the server failed at this request, by its own fault: its log says how"
        return JSONResponse(Refused(500, message).body, 500)

    @app.get("/health")
    async def health() -> dict:
        """Whether the server is up, and how busy."""
        waiting = line.inside - line.running
        counts = {"running": line.running, "waiting": waiting, "served": line.served, "ended": line.ended}
        return {"status": "ok", "model": settings.model_name, "max_queue": settings.max_queue} | counts

    described = {"id": settings.model_name, "object": "model", "created": 0, "owned_by": "cald-speech"}

    @app.get("/v1/models")
    async def models() -> dict:
        """The one model that is served."""
        return {"object": "list", "data": [described]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict:
        check_model(name, settings.model_name)
        return described

    @app.post("/v1/audio/transcriptions", openapi_extra=TRANSCRIPTIONS)
    async def transcriptions(request: Request) -> Response:
        """The words of a recording."""
        check_origin(request.headers)
        with line.place():
            form = await read_form(
                request.headers,
                request.receive,
                folder=settings.upload_folder,
                max_bytes=int(settings.max_upload_mb * 1e6),
            )
            try:
                asked = read_fields(form.fields, settings.model_name, settings.language)
                work = partial(transcript, recogniser, form.path, form.name, **settings.options)
                found = await line.run(work, partial(_left, request.receive))
            finally:
                form.close()
        text, verbose = answer(found, asked, settings.language)
        headers = {"X-Warning": quoted("; ".join(found.told))} if found.told else {}
        if verbose is not None:
            return JSONResponse(verbose, headers=headers)
        return PlainTextResponse(text, headers=headers)

    return app


def run_server(recogniser: Recogniser, settings: Settings, listening: socket.socket) -> None:
    """Serve until Ctrl-C. ``listening`` is bound already (:func:`bind`)."""
    app = create_app(recogniser, settings)
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_S,
        ws_max_size=2**20,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[listening])


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address; port 0 is one that is free. Raises UserError where there can be none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen()  # who comes while the model is loaded waits
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"expected an address to serve at, but {host}:{port} cannot be had ({getattr(error, 'strerror', error)}). "
            "Give another --port or --host; --port 0 takes a free one"
        ) from error
    return listening


def check_installed() -> None:
    """Raise UserError where the extra `serve` is not installed."""
    missing = [name for name in ("fastapi", "uvicorn", "python_multipart") if find_spec(name) is None]
    if missing:
        raise UserError(f"serving needs the package {missing[0]}: `pip install 'cald-speech[serve]'` brings it")


def check_origin(headers: Any) -> None:
    """Raise Refused for what the page of another site asks for: a browser lets it speak to this machine."""
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise Refused(403, f"expected a client, or the server's own page, got the page of {origin[:80]!r}")


def quoted(told: str) -> str:
    """A text as a header's value, which has one line of ASCII."""
    return " ".join(told.split()).encode("ascii", "backslashreplace").decode()


async def _left(receive: Any) -> None:
    """Returns once the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        await asyncio.sleep(0)


_STRING = {"type": "string"}
TRANSCRIPTIONS = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "model"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "model": _STRING,
                        "response_format": {"type": "string", "enum": ["json", "text", "srt", "vtt", "verbose_json"]},
                        "timestamp_granularities[]": {
                            "type": "array",
                            "items": {"type": "string", "enum": ["word", "segment"]},
                        },
                        "language": _STRING,
                        "prompt": _STRING,
                        "temperature": {"type": "number"},
                        "stream": {"type": "boolean"},
                    },
                }
            }
        },
    }
}
