"""``cald-speech``: one group with every job, each loaded when it is called (floor F8).

The exit status of every command is 0 where all was done, 1 where a part of it was not (a file that cannot be read to
its end, something required that is broken), 2 where nothing could be done, with one paragraph that says why, and 130
after Ctrl-C.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import NamedTuple

import click


class Job(NamedTuple):
    """Where a command is, as ``module:name``, and what it does in one line."""

    place: str
    summary: str


_HERE = "cald_speech.commands"
JOBS: Mapping[str, Mapping[str, Job]] = {
    "Make a model": {
        "train": Job(f"{_HERE}.train:train", "Train and distil what an experiment's yaml says."),
        "convert": Job(f"{_HERE}.convert:convert", "Convert a pretrained model, without any training."),
        "export": Job(f"{_HERE}.export:export", "Write a model as an ONNX file, checked in onnxruntime."),
    },
    "Read audio": {
        "transcribe": Job(f"{_HERE}.transcribe:transcribe", "Transcribe audio of any length, in one exact pass."),
        "align": Job(f"{_HERE}.transcribe:align", "Find when the words of a known text are said."),
        "stream": Job(f"{_HERE}.stream:stream", "Write words while the audio arrives."),
        "serve": Job(f"{_HERE}.serve:serve", "Serve a model: OpenAI's transcriptions, live words, a page."),
    },
    "Measure a model": {
        "evaluate": Job(f"{_HERE}.evaluate:evaluate", "WER and CER on the utterances of a manifest."),
        "labels": Job(f"{_HERE}.evaluate:labels", "Accuracy of a classifier of audio."),
        "perplexity": Job(f"{_HERE}.evaluate:perplexity", "Perplexity of a language model, and what it generates."),
        "by-length": Job(f"{_HERE}.evaluate:by_length", "WER against duration, and under stress."),
        "lookahead": Job(f"{_HERE}.evaluate:lookahead", "WER of live reading against the lookahead."),
        "word-times": Job(
            "cald_speech.recipes.digits.word_times:main", "How far the times of words are off, on digits."
        ),
        "report": Job(f"{_HERE}.evaluate:report", "Compare evaluations, and look at them and at runs in one page."),
    },
    "Choose what to convert": {
        "drift": Job(f"{_HERE}.layers:drift", "How far fine-tuning moved each layer, and the guidance for that."),
        "layers": Job(f"{_HERE}.layers:layers", "Which layers need their attention most."),
    },
    "This machine": {
        "benchmark": Job(f"{_HERE}.benchmark:benchmark", "How fast ops are, and long audio."),
        "doctor": Job(f"{_HERE}.doctor:doctor", "Which backend every op gets, what is broken and what mends it."),
    },
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called: its own help needs none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for jobs in JOBS.values() for name in jobs]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        for jobs in JOBS.values():
            if name in jobs:
                module, _, attribute = jobs[name].place.partition(":")
                return getattr(import_module(module), attribute)
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        widest = max(map(len, self.list_commands(ctx)))
        for title, jobs in JOBS.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(widest), job.summary) for name, job in jobs.items()])


@click.group(cls=LazyGroup)
@click.version_option(package_name="cald-speech")
def main() -> None:
    """Convert pretrained transformers of speech and text to linear-time models.

    `cald-speech COMMAND --help` tells a command's options. The exit status is 0 where all was done, 1 where a part was
    not, 2 where nothing could be done, and 130 after Ctrl-C.
    """
