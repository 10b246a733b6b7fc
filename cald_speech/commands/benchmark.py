"""``cald-speech benchmark``: how fast ops and models are on this machine."""

import click

from cald_speech.benchmarks import long_audio as long_audio_benchmark
from cald_speech.benchmarks import ops as ops_benchmark
from cald_speech.commands.options import Command

# The benchmarks have parsers of their own, --help included, since they are modules to run as well.
AS_IT_IS = {"ignore_unknown_options": True, "help_option_names": []}


@click.group()
def benchmark() -> None:
    """How fast every backend of every op is, and how long audio costs time and memory.

    `cald-speech benchmark ops --help` and `cald-speech benchmark long-audio --help` tell their options.
    """


@benchmark.command(cls=Command, context_settings=AS_IT_IS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def ops(arguments: tuple[str, ...]) -> None:
    """Every backend of every op, beside peers and the device's limit."""
    ops_benchmark.main(arguments)


@benchmark.command("long-audio", cls=Command, context_settings=AS_IT_IS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def long_audio(arguments: tuple[str, ...]) -> None:
    """Time, memory and WER of models against the length of the audio."""
    long_audio_benchmark.main(arguments)
