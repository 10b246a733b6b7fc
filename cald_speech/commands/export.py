"""``cald-speech export``: a model as a file for other runtimes."""

from pathlib import Path

import click

from cald_speech import conversion
from cald_speech.commands.options import ModelSource, command
from cald_speech.errors import UserError
from cald_speech.families import family_of


@command()
@click.argument("model", type=ModelSource())
@click.option("--onnx", "path", type=Path, required=True, metavar="FILE", help="Where to, such as model.onnx.")
@click.option("--length", type=int, help="Samples or tokens of every input. Default: any number.")
@click.option("--head", help="Which of its heads to keep; default: ctc for speech, masked_lm or lm for text.")
def export(model: str, path: Path, length: int | None, head: str | None) -> None:
    """Write MODEL (a folder or hub id), converted or not, as an ONNX file for inference.

    What onnxruntime makes of the file is compared with the model, and a file that differs is not kept. It takes what
    the model's processor makes, and a mask: docs/howto/compile_and_export.md has an example.
    """
    conversion.check_onnx()
    head = head or family_of(conversion.load_config(model)).default_head
    loaded = conversion.from_pretrained(model, head=head)
    try:
        written = conversion.export_onnx(loaded, path, length=length)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}. Make room, or give another file") from error
    megabytes = written.path.stat().st_size / 1e6
    click.echo(f"{path}: opset {written.opset}, {megabytes:.1f} MB, within {written.error:.1e} of the model")
