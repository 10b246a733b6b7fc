"""What commands and the recipes' scripts share: how they end, and the options that mean the same in all of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from cald_speech.commands.command import Command as Command
from cald_speech.commands.command import Later
from cald_speech.commands.command import ModelSource as ModelSource
from cald_speech.commands.command import command as command
from cald_speech.data.readers import manifest_of
from cald_speech.data.text import NORMALISERS
from cald_speech.files import clear, locked, whole_file
from cald_speech.output import unwritable

DTYPES = ("float32", "bfloat16", "float16")
Decorator = Callable[[Callable], Callable]


def together(*decorators: Decorator) -> Decorator:
    """One decorator for several options, which --help lists in this order."""
    return lambda function: reduce(lambda inner, decorate: decorate(inner), reversed(decorators), function)


class Listed(click.ParamType):
    """Values with commas between them, such as ``1,2,4``, each of the type ``of``.

    Example
    -------
    >>> Listed(click.INT).convert("1,2,4", None, None)
    (1, 2, 4)
    """

    def __init__(self, of: click.ParamType):
        self.of, self.name = of, f"{of.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple:
        if isinstance(value, tuple):
            return value
        return tuple(self.of.convert(part.strip(), param, ctx) for part in value.split(","))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        choices = getattr(self.of, "choices", None)
        return self.name.upper() if choices is None else f"[{','.join(choices)}]"


def device() -> Decorator:
    """``--device``; the argument ``device`` is a name of torch's."""
    return click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:1.")


def dtype(meaning: str = "Of the weights.", *, int8: bool = False) -> Decorator:
    """``--dtype``; the argument ``dtype`` is a torch.dtype, with ``int8`` one more."""
    return click.option(
        "--dtype",
        type=click.Choice([*DTYPES, "int8"] if int8 else DTYPES),
        default="float32",
        show_default=True,
        callback=lambda ctx, param, name: getattr(torch, name),
        help=meaning,
    )


def output_folder(default: str, *older: str) -> Decorator:
    """``--output_folder`` with a fixed default; ``older`` names are understood too."""
    return click.option(
        "--output_folder", *older, "output_folder", type=Path, default=default, show_default=True, help="For files."
    )


def evaluation_folder(of: str = "folder") -> Decorator:
    """``--output_folder``, by default :func:`reports_of` the model; ``of`` names the model's argument."""
    return click.option(
        "--output_folder",
        type=Path,
        callback=lambda ctx, param, given: given or reports_of(ctx.params[of], ctx.params.get("dtype", torch.float32)),
        help=f"Default: results/evaluation/ and the path of {of.upper()} (and a --dtype), joined by --.",
    )


def manifest(
    *names: str, meaning: str | None = None, required: bool = True, or_tokens: bool = False, texts: bool = True
) -> Decorator:
    """The argument MANIFEST, or with ``names`` such as ``--manifest`` the option, and ``--columns``.

    A corpus in any format that `cald_speech.data.readers` knows is given on as the path of a manifest made of it.
    ``or_tokens``: a JSON file may also be a set of tokens, and is given on as it is.
    Without ``texts`` a corpus needs none.
    """

    def later(ctx: click.Context, param: click.Parameter, source: str | None) -> Path | _Corpus | None:
        columns = ctx.meta["columns"]
        if source is None and columns:
            raise click.UsageError("--columns: expected a manifest with columns, but none was given")
        if source is None or (or_tokens and source.endswith(".json") and not columns):
            return source and Path(source)
        return _Corpus(source, columns if texts else {"text": [], **columns})

    if names:
        argument = click.option(*names, callback=later, required=required, help=meaning)
    else:
        argument = click.argument("manifest", callback=later, required=required)
    columns = click.option(
        "--columns",
        is_eager=True,
        expose_value=False,
        callback=lambda ctx, param, given: ctx.meta.update(columns=_columns(given)),
        metavar="KEY=NAME,...",
        help="Which columns of it hold what, where their names do not tell: audio=path,text=sentence.",
    )
    return together(argument, columns)


@dataclass(frozen=True)
class _Corpus(Later):
    """What was given as a manifest; it is read when the command runs."""

    source: str
    columns: Mapping[str, str | list[str]]

    def read(self) -> Path:
        return manifest_of(self.source, self.columns)


def _columns(given: str | None) -> dict[str, str | list[str]]:
    """{"text": ["a", "b"]} of ``text=a+b``. Raises UsageError for what is no such list."""
    found: dict[str, str | list[str]] = {}
    for part in (given or "").split(",") if given else ():
        key, _, name = part.partition("=")
        if not key.strip() or not name.strip():
            raise click.UsageError(f"--columns: expected such as audio=path,text=sentence, got {given!r}")
        names = name.strip().split("+")
        found[key.strip()] = names if len(names) > 1 else names[0]
    return found


def beam_search() -> Decorator:
    """``--beam`` and ``--kenlm``, the arguments ``beam_size`` and ``kenlm_path``."""
    return together(
        click.option("--beam", "beam_size", type=int, help="Beam search of this width; greedy where it is not given."),
        click.option("--kenlm", "kenlm_path", type=Path, help="An n-gram model for the beam search (.arpa or binary)."),
    )


def normaliser(
    default: str | None = "librispeech",
    meaning: str = "How references and hypotheses are written before they are compared.",
) -> Decorator:
    """``--normaliser``, a name of `cald_speech.data.text`: of every command and script that compares or takes texts.

    The default None is that of the model's training.
    """
    shown = default or "that of the model's training, else librispeech"
    return click.option(
        "--normaliser", type=click.Choice(list(NORMALISERS)), default=default, show_default=shown, help=meaning
    )


def refuse_idle(**options: tuple[bool, str]) -> None:
    """Raise UsageError for an option that was given where it does not act: each with whether it does, and what for.

    Called in a command: ``refuse_idle(beam_width=(decoding == "beam", "--decoding beam"))``.
    """
    context = click.get_current_context()
    names = {param.name: param.opts[0] for param in context.command.params}
    for name, (acts, needed) in options.items():
        if not acts and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"{names[name]}: does nothing here: expected it with {needed}. Leave it out")


def progress() -> Decorator:
    """``--quiet``; the argument is ``progress``, True unless it is given."""
    return click.option("--quiet", "progress", is_flag=True, default=True, flag_value=False, help="No progress bar.")


def reports_of(model: str, dtype: torch.dtype = torch.float32) -> Path:
    """Where the reports on a model with weights of this dtype go. Two models never share a folder.

    Example
    -------
    >>> reports_of("results/a/model").as_posix()
    'results/evaluation/results--a--model'
    """
    name = model.strip("/.").replace("/", "--")
    return Path("results/evaluation") / (name if dtype is torch.float32 else f"{name}--{dtype}".replace("torch.", ""))


def target_lang() -> Decorator:
    """``--target_lang``, of models with an adapter for each language."""
    return click.option("--target_lang", help="The language of an MMS model, such as fra. Default: the checkpoint's.")


def max_batch_s() -> Decorator:
    """``--max_batch_s``, of audio."""
    return click.option(
        "--max_batch_s", default=60.0, show_default=True, help="Seconds of audio in a batch, padding counted."
    )


def max_batch_tokens(default: int = 8192) -> Decorator:
    """``--max_batch_tokens``, of text."""
    return click.option(
        "--max_batch_tokens", default=default, show_default=True, help="Tokens of text in a batch, padding counted."
    )


def check_writable(folder: Path) -> None:
    """Make the folder: it may take an hour until there is something to write. Raises UserError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def write_found(folder: Path, name: str, found: Any, draw: Callable[[Any, Path], Any] | None = None) -> None:
    """Write <name>.json and, with ``draw``, <name>.png into the folder, each whole or absent.

    Raises UserError where the folder cannot be written.
    """
    try:
        with locked(folder, name, wait=True):  # both are of one process
            clear(folder / name)
            with whole_file(folder / f"{name}.json") as unfinished:
                unfinished.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            if draw is not None:
                draw(found, folder / f"{name}.png")
    except OSError as error:
        raise unwritable(folder, error) from error
