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
from cald_speech.serving.live import LiveSettings, Speaker, check_start, fault_of, ready
from cald_speech.serving.transcripts import answer, transcript, word_times
from cald_speech.serving.upload import ClientLeft, read_form
from cald_speech.serving.work import Line

logger = logging.getLogger(__name__)

# A page that loads nothing from elsewhere, and cannot.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline' blob:; style-src 'unsafe-inline'; "
    "connect-src 'self' ws: wss:; media-src blob:; worker-src blob:; img-src data:"
}
SHUTDOWN_S = 2
FIRST_MESSAGE_S = 30.0
# Of RFC 6455 and its registry: a message that is refused, a fault of the server, too many clients.
REFUSED, FAILED, TRY_AGAIN = 1008, 1011, 1013


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
    decoding : how words are found, live too: decoding, beam_width, margins.
    options : of :func:`~cald_speech.longform.transcribe`: chunk_s, dtype, storage.
    live : how live audio is read.
    """

    model_name: str
    language: str | None = None
    max_queue: int = 32
    max_upload_mb: float = 4096
    upload_folder: Path | None = None
    decoding: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    live: LiveSettings = field(default_factory=LiveSettings)


def create_app(recogniser: Recogniser, settings: Settings) -> Any:
    """The server as an ASGI application (a FastAPI).

    Raises: UserError where the extra `serve` is not installed.
    """
    check_installed()
    from fastapi import FastAPI, Request, WebSocket
    from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.exceptions import HTTPException

    line, not_live = Line(settings.max_queue), fault_of(recogniser, settings.live)
    speakers: set[Speaker] = set()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        line.close()
        for speaker in speakers:
            speaker.leave()

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
        counts["live"] = len(speakers)
        return {"status": "ok", "model": settings.model_name, "max_queue": settings.max_queue} | counts

    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def front() -> Response:
        return HTMLResponse(page, headers=PAGE_HEADERS)

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
                work = partial(transcript, recogniser, form.path, form.name, **settings.decoding, **settings.options)
                found = await line.run(work, partial(_left, request.receive))
            finally:
                form.close()
        text, verbose = answer(found, asked, settings.language)
        headers = {"X-Warning": quoted("; ".join(found.told))} if found.told else {}
        if verbose is not None:
            return JSONResponse(verbose, headers=headers)
        return PlainTextResponse(text, headers=headers)

    @app.websocket("/v1/live")
    async def live(client: WebSocket) -> None:
        """Audio in, words out; docs/howto/serve.md has the messages."""
        await client.accept()
        try:
            check_origin(client.headers)
            if not_live is not None:
                raise Refused(400, " ".join(not_live.split()))
            check_start(await _first_message(client), settings.model_name)
            if len(speakers) >= settings.live.max_live:
                raise Refused(503, f"{len(speakers)} clients speak, as many as may at once (--max_live): try later")
            speaker = Speaker(recogniser, settings.live, **settings.decoding)
            speakers.add(speaker)
            try:
                await client.send_json(ready(recogniser, settings.live))
                await _converse(client, speaker)
            finally:
                speaker.leave()
                speakers.discard(speaker)
        except ClientLeft:
            return
        except Refused as error:
            await _say_last(client, {"type": "error", **error.body}, TRY_AGAIN if error.status == 503 else REFUSED)
        except Exception:
            logger.exception("a live client's audio could not be read")
            message = "the server failed at this audio, by its own fault: its log says how"
            await _say_last(client, {"type": "error", **Refused(500, message).body}, FAILED)

    return app


async def _first_message(client: Any) -> str | None:
    """The text of a client's first message, None where it is bytes."""
    try:
        message = await asyncio.wait_for(client.receive(), FIRST_MESSAGE_S)
    except TimeoutError:
        raise Refused(408, f"expected a first message, but nothing came for {FIRST_MESSAGE_S:g} s") from None
    if message["type"] == "websocket.disconnect":
        raise ClientLeft
    return message.get("text")


async def _converse(client: Any, speaker: Speaker) -> None:
    """Until the client says that it has ended and has all words, or leaves (ClientLeft)."""

    async def listen() -> None:
        ended = False
        while (message := await client.receive())["type"] != "websocket.disconnect":
            data, text = message.get("bytes"), message.get("text")
            if ended:
                raise Refused(400, "expected nothing more after the end, got another message")
            if data is not None:
                await speaker.hear(data)
            elif text is not None and "".join(text.split()) == '{"type":"end"}':
                speaker.end()
                ended = True
            else:
                raise Refused(400, f'expected samples as bytes, or {{"type": "end"}}, got {(text or "")[:40]!r}')
        raise ClientLeft

    async def tell() -> None:
        async for word in speaker.words():
            await client.send_json({"type": "word", **word_times(word), "joined": word.joined})
        await _say_last(client, {"type": "done"}, 1000)

    tasks = [asyncio.create_task(listen()), asyncio.create_task(tell())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in sorted(done, key=tasks.index, reverse=True):
        task.result()


async def _say_last(client: Any, message: dict, code: int) -> None:
    """Send it and close the connection, unless the client has done so."""
    try:
        await client.send_json(message)
        await client.close(code)
    except (RuntimeError, OSError):  # starlette and uvicorn, of a connection that is closed
        logger.debug("a live client left before its last message")


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
