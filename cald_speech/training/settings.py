"""The settings of an experiment: every key a yaml may have, its default, and what it means.

An experiment is a yaml, laid over the yaml it is based on, with the command line on top. Three places hold its keys:
:class:`Settings`; the options of the guidance mode, in the mode's class (``cald_speech/distillation/guidance.py``); and
those of the distillation terms, in :class:`cald_speech.distillation.LossForm`.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from ruamel.yaml import YAML, YAMLError
from transformers import PretrainedConfig

from cald_speech.conversion import ConversionSchedule, LayerMap
from cald_speech.data.encodings import read_text
from cald_speech.data.text import NORMALISERS
from cald_speech.distillation import PRESETS, Guidance, LossForm, Unguided, every_option, options_of
from cald_speech.distillation.options import check_values, option
from cald_speech.errors import UserError
from cald_speech.experiment_yaml import build, check
from cald_speech.files import from_home
from cald_speech.mixers.factory import check_options, describe_factory
from cald_speech.shipped import hparams_folder, model_folder
from cald_speech.tasks.base import Task
from cald_speech.tasks.ctc import CTC
from cald_speech.training.loggers import Logger
from cald_speech.training.schedules import WarmupSchedule

MODELS = {"teacher", "student", "source", "processor"}
FOLDERS = {"output_folder", "data_folder", "prepare_folder"}
# Options of guidance that a mode's class called otherwise before an experiment's names became its own.
RENAMED = {
    "layer": "alpha_layer",
    "logits": "alpha_logits",
    "task": "alpha_task",
    "update_every": "teacher_update_every",
}


@dataclass
class Settings:
    """One experiment. Hub ids and folders are strings; durations are in seconds, counts in optimiser steps."""

    output_folder: str = option(meaning="where the run keeps its checkpoints, models and logs", free=True)
    recipe: str | None = option(None, "a folder in recipes/, whose prepare() makes the manifests")
    data_folder: str = option("data", "where the corpus is", free=True)
    seed: int = option(0, "of weights, order, dropout and SpecAugment", at_least=-(2**63), at_most=2**63 - 1)
    prepare_folder: str | None = option(None, "where prepare() writes its manifests; default: output_folder", free=True)
    corpus: Mapping[str, Any] = option(meaning="keyword arguments of the recipe's prepare()", make=dict)
    normaliser: str = option(
        "librispeech", "how transcripts are written, in training and wherever it is scored", one_of=tuple(NORMALISERS)
    )
    unknown_characters: str = option(
        "error", "what a character outside the vocabulary is: an error, or dropped", one_of=("error", "drop")
    )
    # models
    teacher: str | None = option(None, "the fine-tuned model to follow, a folder or hub id")
    source: str | PretrainedConfig | None = option(
        None, "pretrained weights that an unguided student starts from; default: the teacher"
    )
    student: str | None = option(
        None, "a converted model to go on from (of recipes/align, say); layer_map is then not used"
    )
    processor: str | None = option(
        None, "whose processor; default: the teacher's, the source's, or a new one from the training transcripts"
    )
    target_lang: str | None = option(
        None, "the language of teacher and student, of an MMS model's; default: the checkpoint's"
    )
    model_overrides: Mapping[str, Any] = option(meaning="dropout and SpecAugment of the student", make=dict)
    freeze_front_end: bool = option(True, "whether the convolutions over the waveform stay as they are")
    licence: str = option("that of the teacher's weights", "for the model card", free=True)
    # conversion
    layer_map: LayerMap = option(meaning="which layer gets which mixer; null keeps attention", make=LayerMap)
    initialise: str = option("attention", "what mixers start from: attention, the weights that they replace, or random")
    calibrate: int = option(
        0,
        "utterances of the training set that new mixers' scales and output projections are set by, in closed form "
        "and without labels, before training; 64 will do",
        at_least=0,
    )
    conversion_schedule: ConversionSchedule | None = option(
        None, "at which optimiser steps the layers are converted, a group at a time; default: all before the first step"
    )
    adapters: object | None = option(
        None,
        "a config of PEFT's, as !new:peft.LoraConfig {r: 8, target_modules: ...}: adapters alone train, and what its "
        "modules_to_save names (mixer: the mixers); default: every parameter trains",
    )
    # objective
    task: Task = option(meaning="from head output to loss, hypothesis and metric", make=CTC)
    guidance: str | Guidance = option(
        meaning="which teacher is followed, and how strongly; a name in hparams/guidance/", make=Unguided
    )
    align_learning_rate: float | None = option(
        None, "of slot alignment; default: learning_rate; the schedule begins after slot alignment", above=0
    )
    loss: str | LossForm = option(meaning="the form of the distillation terms: speech, lm or nlp", make=LossForm)
    normalisation: str = option(
        "per_frame", "what sums are divided by; reference: as the published code", one_of=("per_frame", "reference")
    )
    teacher_mask: str = option(
        "none", "student: the teacher hears what the student's SpecAugment leaves", one_of=("none", "student")
    )
    # optimisation
    num_steps: int = option(1000, "optimiser steps of the whole run", at_least=1, free=True)
    learning_rate: float = option(3e-4, "at its highest; AdamW", at_least=0)
    weight_decay: float = option(5e-3, "of matrices; vectors and the scans' parameters have none", at_least=0)
    schedule: WarmupSchedule = option(meaning="warm-up and decay of the learning rate", make=WarmupSchedule)
    max_grad_norm: float = option(1.0, "what the gradient's norm is clipped to; .inf: never", above=0, infinite=True)
    max_batch_s: float = option(60.0, "seconds of audio in a batch, padding counted", above=0)
    max_batch_tokens: int = option(16384, "tokens of text in a batch, padding counted", at_least=1)
    max_batch_utterances: int | None = option(None, "utterances in a batch at most; default: any number", at_least=1)
    short_first_steps: int = option(
        0, "so many steps at first have short utterances alone; their last epoch ends with them", at_least=0
    )
    short_first_s: float = option(10.0, "how long such an utterance may be", above=0)
    join_utterances: int = option(1, "up to so many are joined to one, at random", at_least=1)
    join_last_steps: int = option(0, "only in so many last steps of the run; 0: in all", at_least=0)
    join_pause_s: float = option(0.5, "the longest pause between joined utterances", at_least=0)
    accumulation: int = option(1, "batches of one optimiser step", at_least=1)
    num_workers: int = option(0, "processes that read data", at_least=0, free=True)
    precision: str = option("fp32", "of the forward pass in training", one_of=("fp32", "bf16", "fp16"))
    decay: str = option("all", "which matrices have weight decay", one_of=("all", "mixers"))
    shard: bool = option(
        False,
        "under torchrun, each process holds a part of the student, its gradients and the optimiser's state (FSDP2)",
    )
    gradient_checkpointing: bool = option(False, "less memory, a third more time", free=True)
    nonfinite_patience: int = option(10, "so many skipped steps in a row end the run", at_least=1, free=True)
    # validation, checkpoints, logs
    validate_every_epochs: int = option(
        1, "epochs between validations; the last is always validated", at_least=1, free=True
    )
    average_checkpoints: int = option(
        1,
        "the model at the end is the mean of so many, those of the last validations, whose checkpoints are kept; "
        "1: the best validated one",
        at_least=1,
    )
    checkpoint_every_minutes: float = option(
        15.0, "minutes between checkpoints inside an epoch; 0: none", at_least=0, free=True
    )
    checkpoint_every_steps: int = option(0, "steps between them instead; 0: by minutes", at_least=0, free=True)
    waypoint_every_steps: int = option(
        0, "keep the model so often, for waypoint guidance; 0: never", at_least=0, free=True
    )
    log_every_steps: int = option(10, "steps between two lines of the log", at_least=1, free=True)
    logger: Logger | None = option(
        None,
        "where the log goes too, of cald_speech.training.loggers: WeightsAndBiases or MLflow; default: nowhere else",
        free=True,
    )
    score_test_sets: bool = option(
        False, "whether the best model is scored, at the end, on the sets beside train and valid", free=True
    )
    # No key: what the yaml gives of the options of guidance modes and losses, also of those that it does not use.
    options: Mapping[str, Any] = field(default_factory=dict, init=False)

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | str = "") -> "Settings":
        """Read an experiment's yaml, with values from the command line (yaml text, or a mapping) on top.

        ``base: other.yaml`` takes over another experiment beside it; the file then holds what differs.

        Raises
        ------
        UserError
            for a file that cannot be read, an unknown key (with the nearest known one), and a guidance mode that has no
            file or does not fit the number of steps.
        """
        path = Path(path)
        with _named(path):
            text = experiment_text(path, overrides)
            check(text, str(path))
            given, referenced = YAML().load(text), set(re.findall(r"<(\w+)", text + experiment_text(path, "")))
        mode = given.get("guidance")
        mode = find_mode(path.parent, mode) if isinstance(mode, str) else None  # known first: its options are keys
        keys, shared = {f.name for f in fields(cls) if f.init}, every_option() | LossForm.options()
        _refuse_unknown(path, {str(key) for key in given} - referenced, keys | shared)
        with _named(path):
            values = build(text)
        if mode is not None:
            values["guidance"] = mode
        if "output_folder" not in values:
            raise UserError(f"{path}: expected an output_folder, where the run keeps its files; give --output_folder")
        for key in MODELS & values.keys():
            values[key] = model_folder(values[key]) if isinstance(values[key], str) else values[key]
        for key in FOLDERS & values.keys():
            values[key] = from_home(values[key]) if isinstance(values[key], str) else values[key]
            if values[key] == "":
                raise UserError(f"{path}: {key}: expected a folder, got an empty name. Write . for where you are")
        settings = cls(**{key: value for key, value in values.items() if key in keys})
        settings.options = {key: value for key, value in values.items() if key in shared and value is not None}
        try:
            settings.guidance = _make_mode(values.get("guidance", Unguided), settings.options)
            settings.loss = _make_form(values.get("loss", "speech"), settings.options)
            if not isinstance(settings.logger, Logger | None):
                raise ValueError(
                    "logger: expected `!new:cald_speech.training.loggers.WeightsAndBiases {project: name}` or MLflow, "
                    f"got {settings.logger!r}"
                )
            for of in (settings, settings.guidance):
                check_values(of)
            settings.guidance.check(settings.num_steps)
            _check_mixers(settings.layer_map)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        _refuse_nan(path, values)
        return settings

    @property
    def max_batch(self) -> float:
        """How much a batch may hold, in the task's own unit."""
        return getattr(self, self.task.modality.batch_limit)

    def learning_rate_at(self, step: int, highest: float | None = None) -> float:
        """The learning rate of optimiser step ``step``: the schedule begins when the mixers have been aligned.

        ``highest`` is another than ``learning_rate``, of a teacher that trains along.
        """
        aligning = self.guidance.align_steps
        if step >= aligning:
            return (highest or self.learning_rate) * self.schedule(step - aligning)
        warmup = max(1, aligning // 10)
        shape = WarmupSchedule(warmup, aligning - warmup, "cosine", floor=0.1)
        return (self.align_learning_rate or self.learning_rate) * shape(step)


def _check_mixers(layer_map: LayerMap) -> None:
    for factory in (layer_map.default, *layer_map.overrides.values()):
        if factory is not None:
            try:
                describe_factory(factory)
                check_options(factory)
            except ValueError as error:
                raise ValueError(f"layer_map: {error}, as !name:cald_speech.mixers.Mamba2 gives it") from error


def _refuse_unknown(path: Path, given: set[str], known: set[str]) -> None:
    for key in sorted(given - known):
        nearest = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"the known keys: {', '.join(sorted(known))}."
        raise UserError(f"{path}: unknown key {key!r}; {hint}")


def _refuse_nan(path: Path, value: Any, place: str = "") -> None:
    """Also in what is not an option of ours: those of a corpus, a mixer, a model."""
    if isinstance(value, float) and math.isnan(value):
        raise UserError(f"{path}: {place}: expected a number, got nan")
    if isinstance(value, partial):
        value = value.keywords
    elif is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    entries = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, entry in entries:
        _refuse_nan(path, entry, f"{place}.{name}" if place else str(name))


# --- guidance and loss, with the options that the experiment gives ----------------------------------------------------


def find_mode(folder: Path, name: str) -> Callable[..., Guidance]:
    """The class of the guidance mode in ``guidance/name.yaml``, with the defaults that this file sets.

    The file is looked for beside the experiment, in ``folder``, then one folder up, then among the shipped ones.
    """
    places = [place / "guidance" for place in (folder.absolute(), folder.absolute().parent, hparams_folder())]
    path = next((place / f"{name}.yaml" for place in places if (place / f"{name}.yaml").is_file()), None)
    if path is None:
        names = sorted({file.stem for place in places for file in place.glob("*.yaml")})
        raise UserError(f"guidance: expected one of {', '.join(names)} (the files in {places[-1]}), got {name!r}")
    with _named(path):
        text = read_text(path, "a guidance mode")
        check(text, str(path))
        tag = getattr(YAML().load(text).get("guidance"), "tag", None)
        if tag is not None and str(tag.value).startswith("!new:"):
            # Folders of experiments had copies of the shipped files beside them, which listed the options too.
            cls = tag.value.removeprefix("!new:")
            raise ValueError(
                f"guidance: expected `!name:{cls}`, without the options that its class has by itself, got `!new:`. "
                f"Write this one line, or give the file another name: the shipped {name} guidance is then taken"
            )
        mode = build(text).get("guidance")
        _class_of(mode)
    return mode


def _class_of(mode: Callable[..., Guidance]) -> type[Guidance]:
    made = mode.func if isinstance(mode, partial) else mode
    if not (isinstance(made, type) and issubclass(made, Guidance)):
        raise ValueError(f"guidance: expected `!name:` with the class of a mode, got {mode!r}")
    return made


def _make_mode(mode: Guidance | Callable[..., Guidance], given: Mapping[str, Any]) -> Guidance:
    """The mode with what it knows of the given options: `unguided` has no weights, only `hybrid` has a switch.

    A mode that the experiment makes itself (``!new:``) stays as it is.
    """
    if isinstance(mode, Guidance):
        return mode
    known = options_of(_class_of(mode))
    used = {key: value for key, value in given.items() if key in known}
    preset = mode.keywords if isinstance(mode, partial) else {}
    missing = [key for key, needed in known.items() if needed and key not in used | preset]
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: {_class_of(mode).__name__.lower()} guidance needs a value, and has no default. Set "
            "the missing key in the experiment's yaml"
        )
    return mode(**used)


def _make_form(loss: str | LossForm, given: Mapping[str, Any]) -> LossForm:
    """The form of the loss, by the name of a preset with the given options on top; one that is made stays as it is."""
    if isinstance(loss, LossForm):
        return loss
    if not isinstance(loss, str) or loss not in PRESETS:
        raise ValueError(f"loss: expected one of {', '.join(PRESETS)}, got {loss!r}")
    return replace(PRESETS[loss], **{key: value for key, value in given.items() if key in LossForm.options()})


# --- the yaml ---------------------------------------------------------------------------------------------------------


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What reading a yaml and making its objects raises, as a UserError that names the file."""
    try:
        yield
    except (
        *(YAMLError, ValueError, TypeError, ImportError, AttributeError),
        *(ArithmeticError, LookupError, RecursionError, OSError, StrictDataclassError),
    ) as error:
        hint = ""
        for old, new in RENAMED.items():
            if "cald_speech.distillation" in str(error) and f"argument '{old}'" in str(error):
                hint = f". It is called {new}"
        said = ": ".join(map(str, error.args)) if isinstance(error, TypeError) else error
        raise UserError(f"{path}: {said}{hint}") from error


def experiment_text(path: Path, overrides: Mapping[str, Any] | str, above: tuple[Path, ...] = ()) -> str:
    """The text of an experiment laid over the experiment it names as its ``base``, with ``overrides`` on top.

    ``above`` are the files that name this one as their base, directly or by way of others.
    """
    if not path.is_file():
        raise UserError(f"no experiment file {path}: expected a yaml, such as hparams/mamba.yaml")
    if path.resolve() in above:
        raise UserError(f"{path}: base: expected another experiment, got one that is based on this one")
    yaml, text = YAML(), read_text(path, "an experiment")
    check(text, str(path))
    tree = yaml.load(text)
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, got {type(tree).__name__}")
    if isinstance(overrides, str):
        check(overrides, "the command line")
        overrides = yaml.load(overrides) or {}
    _lay_over(tree, overrides)
    base = tree.pop("base", None)
    if base is not None:
        if not isinstance(base, str):
            raise UserError(f"{path}: base: expected the name of another experiment's file, got {base!r}")
        below = yaml.load(experiment_text(path.parent / base, "", (*above, path.resolve())))
        _lay_over(below, tree)
        tree = below
    text = StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def _lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Put the values of ``above`` over those of ``below``, in place, key by key.

    A mapping with a tag of its own (``!new:``) is another object, and takes the place of what was there.
    """
    for key, value in above.items():
        tag = getattr(value, "tag", None)
        is_new = tag is not None and tag.value is not None
        if isinstance(value, Mapping) and isinstance(below.get(key), Mapping) and not is_new:
            _lay_over(below[key], value)
        else:
            below[key] = value
