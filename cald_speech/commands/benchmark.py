"""``cald-speech benchmark``: how fast ops and models are on this machine."""

from importlib import import_module

import click

from cald_speech.benchmarks import long_audio as long_audio_benchmark
from cald_speech.benchmarks import ops as ops_benchmark
from cald_speech.benchmarks import serve_load
from cald_speech.commands.options import Command, Listed
from cald_speech.errors import UserError
from cald_speech.evaluation.report import format_table
from cald_speech.ops.backends import interpreted

# The benchmarks have parsers of their own, --help included, since they are modules to run as well.
AS_IT_IS = {"ignore_unknown_options": True, "help_option_names": []}


@click.group()
def benchmark() -> None:
    """How fast every op is, what long audio costs, what a server takes, and what the GPU kernels compile to."""


@benchmark.command(cls=Command, context_settings=AS_IT_IS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def ops(arguments: tuple[str, ...]) -> int:
    """Every backend of every op, beside its peers."""
    return ops_benchmark.main(arguments)


@benchmark.command("long-audio", cls=Command, context_settings=AS_IT_IS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def long_audio(arguments: tuple[str, ...]) -> int:
    """Time, memory and WER against the length."""
    return long_audio_benchmark.main(arguments)


@benchmark.command(cls=Command, context_settings=AS_IT_IS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> int:
    """Many clients at once, an hour in one upload, clients that are killed."""
    return serve_load.main(arguments)


@benchmark.command(cls=Command)
@click.option("--capability", type=Listed(click.INT), default="90,80", show_default=True, help="Of the GPUs.")
@click.option(
    "--dtype",
    type=Listed(click.Choice(["float32", "bfloat16", "float16"])),
    default="float32,bfloat16,float16",
    show_default=True,
)
@click.option("--sizes", type=Listed(click.STRING), default="64x64,64x128,128x128", show_default=True, help="P x N.")
@click.option(
    "--scans",
    "--directions",
    type=Listed(click.Choice(["one", "both", "pair", "delta", "delta-channels"])),
    default="one,both,pair,delta,delta-channels",
    show_default=True,
    help="SSD in one direction, in both, a pair; the gated delta rule with a decay a head, or a channel.",
)
def kernels(capability: tuple[int, ...], dtype: tuple[str, ...], sizes: tuple[str, ...], scans: tuple[str, ...]) -> int:
    """What the kernels of SSD and the gated delta rule compile to, GPU or no GPU.

    Registers, spilled bytes and shared memory of each. P is the head_dim and N the d_state. The exit status is 1 where
    a kernel needs more shared memory than the GPU has.
    """
    if interpreted():
        raise UserError("TRITON_INTERPRET=1 compiles nothing: expected it unset")
    try:
        compile_check = import_module("cald_speech.ops.triton.compile_check")  # triton is optional
    except ImportError as error:
        raise UserError(f"triton cannot be imported ({error}): expected it, `pip install 'triton>=3.6'`") from error
    rows, fits = zip(*compile_check.check_all(capability, dtype, sizes, scans), strict=True)
    click.echo(format_table(rows))
    return 0 if all(fits) else 1
