"""The settings of an experiment: every key a yaml may have, its default, and what it means, in one place."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from types import UnionType
from typing import Any, get_origin

from hyperpyyaml import load_hyperpyyaml
from ruamel.yaml import YAML, YAMLError
from transformers import PretrainedConfig

from cald_speech.conversion import LayerMap
from cald_speech.distillation import DIVISORS, PRESETS, Guidance, LossForm, Unguided
from cald_speech.errors import UserError
from cald_speech.shipped import experiment_file, hparams_folder
from cald_speech.tasks.base import Task
from cald_speech.tasks.ctc import CTC
from cald_speech.training.schedules import WarmupSchedule

AT_LEAST_ONE = (
    "num_steps",
    "accumulation",
    "join_utterances",
    "validate_every_epochs",
    "log_every_steps",
    "nonfinite_patience",
)
# Keys that guidance modes may take, and keys that change the loss preset: the option of LossForm that each sets.
GUIDANCE_KEYS = (
    "alpha_layer",
    "alpha_logits",
    "switch_step",
    "teacher_update_every",
    "waypoints",
    "teacher_steps",
    "align_steps",
    "alpha_task",
)
FORM_KEYS = {
    "layer_distance": "distance",
    "layer_normalise": "normalise",
    "layer_weights": "layers",
    "layer_reduce": "reduce",
    "final_norm_on_last": "final_norm",
    "temperature": "temperature",
    "scale_by_t2": "scale_by_t2",
    "blank_weight": "blank_weight",
}
# One of so many names: key -> the names.
CHOICES = {
    "loss": tuple(PRESETS),
    "normalisation": DIVISORS,
    "teacher_mask": ("none", "student"),
    "decay": ("all", "mixers"),
}


@dataclass
class Settings:
    """One experiment. Hub ids and folders are strings; durations are in seconds, counts in optimiser steps."""

    output_folder: str
    recipe: str | None = None  # a folder in recipes/, whose prepare() makes the manifests for `cald-speech train`
    data_folder: str = "data"
    seed: int = 0
    prepare_folder: str | None = None  # where prepare() writes; default: output_folder
    corpus: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the recipe's prepare()
    normaliser: str = "librispeech"
    unknown_characters: str = "error"  # or "drop"
    # models: the fine-tuned teacher, and the pretrained weights an unguided student starts from (default: the teacher)
    teacher: str | None = None
    source: str | PretrainedConfig | None = None
    student: str | None = None  # a converted model to go on from (of recipes/align, say); layer_map is then not used
    processor: str | None = None  # default: the teacher's, the source's, or a new one from the training transcripts
    model_overrides: Mapping[str, Any] = field(default_factory=dict)  # dropout and SpecAugment of the student
    freeze_front_end: bool = True
    licence: str = "that of the teacher's weights"
    # conversion
    layer_map: LayerMap = field(default_factory=LayerMap)
    initialise: str = "attention"
    # objective
    task: Task = field(default_factory=CTC)
    guidance: str | Guidance = field(default_factory=Unguided)  # a name in hparams/guidance/
    alpha_task: float | None = None  # weight of the task loss under guidance; 0 distils without labels
    alpha_layer: float | None = None
    alpha_logits: float | None = None
    switch_step: int | None = None  # hybrid: from this step on, the task loss alone
    teacher_update_every: int | None = None  # trajectory: the student's steps to one of the teacher's
    waypoints: str | None = None  # waypoint: the folder of the teacher's checkpoints
    teacher_steps: float | None = None  # waypoint: the teacher's steps to one of the student's
    align_steps: int | None = None  # at first, so many steps align the mixers with the teacher's attention
    align_learning_rate: float | None = None  # default: learning_rate; the schedule begins after the alignment
    loss: str = "speech"  # the preset, also lm and nlp; the keys down to blank_weight change what it says
    layer_distance: str | None = None
    layer_normalise: str | None = None
    layer_weights: Sequence[float] | None = None
    layer_reduce: str | None = None
    final_norm_on_last: bool | None = None  # the last layer's states are compared after the model's final norm
    temperature: float | None = None
    scale_by_t2: bool | None = None
    blank_weight: float | None = None
    normalisation: str = "per_frame"  # or "reference", what the published code divides by
    teacher_mask: str = "none"  # "student": the teacher hears what the student's SpecAugment leaves
    # optimisation
    num_steps: int = 1000
    learning_rate: float = 3e-4
    weight_decay: float = 5e-3
    schedule: WarmupSchedule = field(default_factory=WarmupSchedule)
    max_grad_norm: float = 1.0
    max_batch_s: float = 60.0  # of audio, padding counted
    max_batch_tokens: int = 16384  # of text
    max_batch_utterances: int | None = None
    join_utterances: int = 1  # up to so many are joined to one, at random, with pauses of up to join_pause_s
    join_pause_s: float = 0.5
    accumulation: int = 1
    num_workers: int = 0
    precision: str = "fp32"
    decay: str = "all"  # matrices have weight decay; "mixers": those of the mixers alone
    gradient_checkpointing: bool = False  # less memory, a third more time
    nonfinite_patience: int = 10
    # validation, checkpoints, logs
    validate_every_epochs: int = 1
    checkpoint_every_minutes: float = 15.0
    checkpoint_every_steps: int = 0
    waypoint_every_steps: int = 0  # 0: keep none
    log_every_steps: int = 10

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | str = "") -> "Settings":
        """Read an experiment's yaml, with values from the command line (yaml text, or a mapping) on top.

        ``base: other.yaml`` takes over another experiment, beside it or shipped (``base: hparams/mamba.yaml``); the
        file then holds what differs.

        Raises UserError for a file that cannot be read, an unknown key (with the nearest known one), and a guidance
        mode that has no file or does not fit the number of steps.
        """
        path = experiment_file(path)
        values, referenced = load_experiment(path, overrides)
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known and key not in referenced:
                nearest = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {nearest[0]!r}?" if nearest else f"the known keys: {', '.join(sorted(known))}."
                raise UserError(f"{path}: unknown key {key!r}; {hint}")
        if "output_folder" not in values:
            raise UserError(f"{path}: expected an output_folder, where the run keeps its files; give --output_folder")
        settings = cls(**{key: value for key, value in values.items() if key in known})
        _check_types(path, settings)
        if isinstance(settings.guidance, str):
            given = {key: getattr(settings, key) for key in GUIDANCE_KEYS}
            settings.guidance = load_guidance(path.parent, settings.guidance, given)
        try:
            settings.guidance.check(settings.num_steps)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        return settings

    @cached_property
    def form(self) -> LossForm:
        """The form of the distillation terms: the preset's, with the keys that were set on top."""
        changed = {option: getattr(self, key) for key, option in FORM_KEYS.items()}
        return replace(PRESETS[self.loss], **{option: v for option, v in changed.items() if v is not None})

    @property
    def max_batch(self) -> float:
        """How much a batch may hold, in the task's own unit."""
        return getattr(self, self.task.modality.batch_limit)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of optimiser step ``step``: the schedule begins when the mixers have been aligned."""
        aligning = self.guidance.align_steps
        if step >= aligning:
            return self.learning_rate * self.schedule(step - aligning)
        warmup = max(1, aligning // 10)
        shape = WarmupSchedule(warmup, aligning - warmup, "cosine", floor=0.1)
        return (self.align_learning_rate or self.learning_rate) * shape(step)


def _check_types(path: Path, settings: Settings) -> None:
    """Raise UserError for a value of another kind than the setting's, and for counts that no run can have."""
    words = {int: "an integer", float: "a number", bool: "True or False", str: "text", Mapping: "keys and values"}
    for f in fields(settings):
        value, kind = getattr(settings, f.name), get_origin(f.type) or f.type
        if kind is UnionType:  # optional, or of two kinds: judged where it is used
            continue
        fits = isinstance(value, int | float if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind in (int, float)):
            raise UserError(f"{path}: {f.name}: expected {words.get(kind, f'a {kind.__name__}')}, got {value!r}")
        if value not in CHOICES.get(f.name, (value,)):
            raise UserError(f"{path}: {f.name}: expected one of {', '.join(CHOICES[f.name])}, got {value!r}")
        if f.name in AT_LEAST_ONE and value < 1:
            raise UserError(f"{path}: {f.name}: expected at least 1, got {value}")


def load_experiment(path: Path, overrides: Mapping[str, Any] | str) -> tuple[dict[str, Any], set[str]]:
    """The values of an experiment, and the keys that other keys refer to, even if an override took their place."""
    try:
        text = _with_base(path, overrides)
        return load_hyperpyyaml(text), set(re.findall(r"<(\w+)", text + _with_base(path, "")))
    except (YAMLError, ValueError, TypeError, ImportError, AttributeError) as error:
        raise UserError(f"{path}: {error}") from error


def _with_base(path: Path, overrides: Mapping[str, Any] | str) -> str:
    """The text of an experiment laid over the experiment it names as its ``base``, with ``overrides`` on top."""
    yaml = YAML()
    tree = yaml.load(path.read_text())
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, got {type(tree).__name__}")
    _lay_over(tree, (yaml.load(overrides) or {}) if isinstance(overrides, str) else overrides)
    base = tree.pop("base", None)
    if base is not None:
        beside = path.parent / base
        below = yaml.load(_with_base(experiment_file(beside if beside.is_file() else base), ""))
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


def load_guidance(folder: Path, name: str, given: Mapping[str, Any]) -> Guidance:
    """The mode in ``folder/guidance/name.yaml``, or else the one that ships.

    It is made with what it knows of the keys that are ``given`` (None: not).
    """
    path = folder / "guidance" / f"{name}.yaml"
    if not path.is_file():
        path = hparams_folder() / "guidance" / f"{name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise UserError(f"guidance: expected one of {names} (the files in {path.parent}), got {name!r}")
    text = path.read_text()
    # A mode takes from the experiment what it knows: `unguided` has no weights, only `hybrid` has a switch.
    used = {key: value for key, value in given.items() if value is not None and f"\n{key}:" in f"\n{text}"}
    try:
        return load_hyperpyyaml(text, used)["guidance"]
    except ValueError as error:
        raise UserError(f"{path}: {error}. Set the missing key in the experiment's yaml") from error
