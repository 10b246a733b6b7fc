"""``cald-speech serve``: a model behind HTTP."""

from pathlib import Path

import click
import torch
from click.core import ParameterSource

from cald_speech.commands import options
from cald_speech.commands.stream import STATISTICS, measured
from cald_speech.commands.transcribe import DECODING, MARGINS, RUN
from cald_speech.errors import UserError
from cald_speech.longform import Recogniser, latency_s
from cald_speech.longform.words import Margins
from cald_speech.serving import LiveSettings, Settings, run_server
from cald_speech.serving.app import bind, check_installed
from cald_speech.serving.live import fault_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@options.command()
@click.argument("model", type=options.ModelSource())
@click.option("--host", default="127.0.0.1", show_default=True, help="Address; 0.0.0.0 is all of this machine's.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8000, show_default=True, help="0 takes one that is free."
)
@click.option("--model_name", help="What clients call the model. Default: the last part of MODEL.")
@click.option("--language", help="What the model writes, such as en: requests that name another are refused.")
@click.option(
    "--max_queue",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    help="Recordings that may wait beside the one that is read; further ones get a 503.",
)
@click.option(
    "--max_upload_mb",
    type=click.FloatRange(min=0, min_open=True),
    default=4096,
    show_default=True,
    help="Megabytes that a recording may have.",
)
@click.option(
    "--upload_folder",
    type=click.Path(exists=True, file_okay=False, writable=True, path_type=Path),
    help="Where recordings are while they are read; they leave no file. Default: the system's for temporary files.",
)
@click.option(
    "--lookahead_s",
    "--lookahead",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Of live audio: seconds that a bidirectional model hears beyond a frame; a causal model needs none.",
)
@click.option(
    "--live_chunk_s",
    type=click.FloatRange(min=0.01, max=10),
    default=0.5,
    show_default=True,
    help="Of live audio: seconds read at once.",
)
@STATISTICS
@click.option(
    "--max_live", type=click.IntRange(min=0), default=8, show_default=True, help="Clients who may speak at once."
)
@DECODING
@MARGINS
@RUN
def serve(
    model: str,
    host: str,
    port: int,
    model_name: str | None,
    language: str | None,
    max_queue: int,
    max_upload_mb: float,
    upload_folder: Path | None,
    lookahead_s: float,
    live_chunk_s: float,
    statistics: Path | None,
    max_live: int,
    decoding: str,
    beam_width: int,
    lead_s: float,
    tail_s: float,
    target_lang: str | None,
    device: str,
    dtype: torch.dtype,
    chunk_s: float,
    storage: Path | None,
    force: bool,
) -> None:
    """Serve MODEL, a folder or hub id with a CTC head, until Ctrl-C.

    POST /v1/audio/transcriptions takes recordings of any length as OpenAI's clients send them, and answers with json,
    text, srt, vtt or verbose_json. The WebSocket /v1/live takes audio while it is spoken, and gives words. GET
    /v1/models and /health tell about the server. It serves this machine alone unless --host says otherwise: nothing
    asks who a client is.

    \b
        curl http://127.0.0.1:8000/v1/audio/transcriptions -F file=@talk.flac -F model=NAME
    """
    options.refuse_idle(beam_width=(decoding == "beam", "--decoding beam"))
    check_installed()
    listening = bind(host, port)
    recogniser = Recogniser.of(model, dtype=dtype, device=device, force=force, target_lang=target_lang)
    live = LiveSettings(lookahead_s, live_chunk_s, measured(recogniser, statistics), max_live)
    _check_live(recogniser, live)
    how = {"decoding": decoding, "beam_width": beam_width, "margins": Margins(lead_s, tail_s)}
    settings = Settings(
        model_name=model_name or Path(model).resolve().name,
        language=language,
        max_queue=max_queue,
        max_upload_mb=max_upload_mb,
        upload_folder=upload_folder,
        decoding=how,
        options={"chunk_s": chunk_s, "dtype": dtype, "storage": storage},
        live=live,
    )
    address = f"[{host}]" if ":" in host else host
    click.echo(
        f"serving {settings.model_name} at http://{address}:{listening.getsockname()[1]}/ until Ctrl-C", err=True
    )
    if host not in LOOPBACK:
        click.echo("warning: nothing asks who a client is: let only those reach this address who may", err=True)
    run_server(recogniser, settings, listening)


def _check_live(recogniser: Recogniser, live: LiveSettings) -> None:
    """Raise for options of live audio that cannot act; without any, a model that cannot read live serves recordings."""
    fault = fault_of(recogniser, live)
    given = click.get_current_context().get_parameter_source
    names = ("lookahead_s", "live_chunk_s", "statistics", "max_live")
    if fault is not None and any(given(name) is ParameterSource.COMMANDLINE for name in names):
        raise UserError(fault)
    if fault is not None:
        click.echo(f"live audio is refused: {fault}", err=True)
        return
    waits = latency_s(recogniser.model, 1.0) > latency_s(recogniser.model, 0.0)
    options.refuse_idle(lookahead_s=(waits, "a model whose mixers scan backwards too"))
