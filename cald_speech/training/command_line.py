"""The words after an experiment's file: keys of the experiment, and options of this run alone; every one acts or is
refused.

SpeechBrain has a parser of its own, with more options. Those that do nothing here are refused with the way out, since
their names look as if they did.
"""

import os
import shutil
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from speechbrain.utils.run_opts import RunOptions

from cald_speech.distillation import Guidance, LossForm, derived_modes
from cald_speech.distillation.options import meanings
from cald_speech.errors import UserError
from cald_speech.training.schedules import WarmupSchedule
from cald_speech.training.settings import Settings


class RunOption(NamedTuple):
    """An option of the run alone; ``values`` are the known ones, () for any, None for a flag."""

    meaning: str
    values: tuple[str, ...] | None = ()


RUN_OPTIONS = {
    "go_on": RunOption("go on from the folder's checkpoint although settings are others than they were", None),
    "device": RunOption("cpu, cuda or cuda:1; default: cuda where there is one"),
    "noprogressbar": RunOption("no progress bar", None),
    "eval_precision": RunOption("of validation; default: fp32", ("fp32", "bf16", "fp16")),
    "distributed_backend": RunOption("under torchrun; default: nccl on GPUs, else gloo", ("nccl", "gloo", "mpi")),
    "find_unused_parameters": RunOption("under torchrun, for a model that leaves parameters unused", None),
}
_OF_SEVERAL_PROCESSES = ("distributed_backend", "find_unused_parameters")
_STUDENT = "leave it out: the losses are taken from inside the student, which has to stay as it is"
_DEBUG = "take `--num_steps 2` and an --output_folder of its own"
_CHECKPOINTS = "use --checkpoint_every_{}"
_PROFILE = "leave it out, and profile with `python -m cProfile` or nsys"
WAYS_OUT = {
    "grad_accumulation_factor": "use --accumulation",
    "optimizer_step_limit": "use --num_steps",
    "test_only": "use `cald-speech evaluate MODEL MANIFEST`, or the recipe's evaluate.py",
    "ckpt_interval_minutes": _CHECKPOINTS.format("minutes"),
    "ckpt_interval_steps": _CHECKPOINTS.format("steps"),
    "auto_mix_prec": "use --precision fp16",
    "bfloat16_mix_prec": "use --precision bf16",
    "remove_vector_weight_decay": "leave it out: vectors never have weight decay. --decay says which matrices have",
    "skip_nonfinite_grads": "leave it out: steps that are not finite are always skipped. See --nonfinite_patience",
    "data_parallel_backend": "start the same command with `torchrun --nproc_per_node N`",
    "data_parallel_count": "start the same command with `torchrun --nproc_per_node N`",
    "distributed_launch": "start the same command with `torchrun --nproc_per_node N`",
    "tqdm_colored_bar": "leave it out",
    "tqdm_barcolor": "leave it out",
    "log_config": "leave it out, and write the standard error to a file",
    "param_file": "give the experiment's file first, without a name",
    **dict.fromkeys(("debug", "debug_batches", "debug_epochs", "debug_persistently"), _DEBUG),
    **dict.fromkeys(("profile_training", "profile_warmup", "profile_steps"), _PROFILE),
    **dict.fromkeys(("jit", "jit_module_keys", "compile", "compile_module_keys", "compile_mode"), _STUDENT),
    **dict.fromkeys(("compile_using_fullgraph", "compile_using_dynamic_shape_tracing"), _STUDENT),
}
"""What SpeechBrain's parser knows beside these and the experiment's keys, and what does the same here."""


@dataclass(frozen=True)
class CommandLine:
    """What was asked for.

    Arguments
    ---------
    experiment : a file, or the name of a shipped one.
    overrides : yaml text with the keys that are laid over it.
    keys : their names.
    run_opts : SpeechBrain's options.
    go_on : whether the run may go on under other settings.
    """

    experiment: str
    overrides: str
    keys: Collection[str]
    run_opts: RunOptions
    go_on: bool = False


def read(argv: Sequence[str]) -> CommandLine:
    """Read ``experiment.yaml [--key value ...]``.

    A key of the experiment comes before an option of SpeechBrain's that has the same name.

    Raises
    ------
    UserError
        for an option that does nothing here, one without its value, one that is given twice, and a word that belongs
        to none.

    Example
    -------
    >>> read(["a.yaml", "--max_grad_norm", "2", "--device=cpu"]).overrides
    'max_grad_norm: 2'
    """
    if not argv or argv[0].startswith("-"):
        raise UserError("expected an experiment file first, such as: train.py hparams/mamba.yaml --data_folder DIR")
    if len(argv) > 1 and not argv[1].startswith("--"):
        raise UserError(f"expected --key value after the experiment file, got {argv[1]!r}")
    keys, options = {}, {}
    for name, value in _pairs(argv[1:]):
        if name in keys or name in options:
            raise UserError(f"--{name}: expected one value, but it is given twice")
        if name in WAYS_OUT:
            raise UserError(f"--{name}: this option of SpeechBrain's does nothing here: {WAYS_OUT[name]}")
        if name in _OF_SEVERAL_PROCESSES and "RANK" not in os.environ:
            raise UserError(
                f"--{name}: expected several processes, and this is the only one. Leave it out, or start the same "
                "command with `torchrun --nproc_per_node N`"
            )
        if name in RUN_OPTIONS:
            options[name] = _run_option(name, value)
        elif value is None:
            raise UserError(f"--{name}: expected a value after it, got none. Write --{name} VALUE")
        else:
            keys[name] = value
    if not torch.cuda.is_available():
        options.setdefault("distributed_backend", "gloo")  # the default, nccl, needs a GPU
    overrides = "\n".join(f"{name}: {_as_yaml(name, value)}" for name, value in keys.items())
    go_on = options.pop("go_on", False)
    return CommandLine(argv[0], overrides, tuple(keys), RunOptions.from_dictionary(options), go_on)


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Each name with its value: what stands behind ``=``, or the words up to the next name; None for none."""
    places = [i for i, word in enumerate(words) if word.startswith("--")]
    for place, following in pairwise([*places, len(words)]):
        name, equals, value = words[place].removeprefix("--").partition("=")
        values = ([value] if equals else []) + list(words[place + 1 : following])
        yield name, " ".join(values) if values else None


def _run_option(name: str, value: str | None) -> str | bool:
    values = RUN_OPTIONS[name].values
    if values is None:
        if value is not None:
            raise UserError(f"--{name}: expected no value after it, got {value!r}. Leave the value out")
        return True
    if value is None or (values and value not in values):
        expected = f"one of {', '.join(values)}" if values else "a value"
        raise UserError(f"--{name}: expected {expected}, got {value or 'none'}")
    if name == "device":
        try:
            torch.device(value)
        except RuntimeError as error:
            raise UserError(f"--device: expected cpu, cuda or cuda:1, got {value!r}") from error
    return value


_PLAIN = {f.name for f in fields(Settings) if f.type in (str, str | None)}


def _as_yaml(name: str, value: str) -> str:
    """The value of a text key as it stands: a folder may be called 2024, or have ``#`` and ``:`` in its name."""
    if name not in _PLAIN or value[:1] in ("!", "'", '"') or value in ("", "~", "null", "None"):
        return "null" if name in _PLAIN and value == "None" else value
    return "'" + value.replace("'", "''") + "'"


# --- help -------------------------------------------------------------------------------------------------------------


def help_text() -> str:
    """Every key of an experiment and every option of a run, with meaning and default."""
    sections = {
        "Keys of every experiment": meanings(Settings),
        "Keys of the schedule, as --schedule='{warmup_steps: 100}'": meanings(WarmupSchedule),
        "Keys of the loss": meanings(LossForm),
    }
    known = set(meanings(Guidance))
    sections["Keys of every guidance mode"] = meanings(Guidance)
    for mode in (mode for mode in derived_modes() if mode.__module__ == Guidance.__module__):
        own = {name: entry for name, entry in meanings(mode).items() if name not in known}
        known |= own.keys()
        if own:
            sections[f"Keys of {mode.__name__.lower()} guidance, and those built on it"] = own
    sections["Options of this run alone"] = {name: (o.meaning, None) for name, o in RUN_OPTIONS.items()}
    return "\n\n".join(f"{title}:\n{_listed(entries)}" for title, entries in sections.items()) + "\n"


def _listed(entries: dict[str, tuple[str, Any]]) -> str:
    width = min(100, shutil.get_terminal_size().columns)
    lines = []
    for name, (meaning, default) in entries.items():
        shown = "" if default is None else f" [{_shown(default)}]"
        lines.append(textwrap.fill(f"{meaning}{shown}", width, initial_indent=" " * 28, subsequent_indent=" " * 28))
        if len(name) < 23:
            lines[-1] = f"  --{name}".ljust(28) + lines[-1][28:]
        else:
            lines.insert(-1, f"  --{name}")
    return "\n".join(lines)


def _shown(default: Any) -> str:
    if default is MISSING:
        return "no default"
    if default is dict:
        return "{}"
    if default is LossForm:
        return "speech"
    return default.__name__ if isinstance(default, type) else f"{default}"
