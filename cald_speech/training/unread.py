"""Keys that a run does not read, since its guidance, task or start has no use for them; given in a command, they are
refused.

A yaml may have them: one experiment serves several guidance modes. Training then says which they are.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from cald_speech.data.batching import Text
from cald_speech.distillation import LossForm, derived_modes, every_option, options_of
from cald_speech.errors import UserError
from cald_speech.training.scoring import can_score
from cald_speech.training.settings import Settings, experiment_text

OF_LAYERS = ("layer_distance", "layer_normalise", "layer_weights", "layer_reduce", "final_norm_on_last")
OF_LOGITS = ("temperature", "scale_by_t2", "blank_weight")
MOST_STEPS = 1000  # of a run whose loss weights are looked at


def idle_keys(settings: Settings, path: Path, overrides: str) -> list[str]:
    """The keys of the experiment, with its base, that the run does not read.

    Raises: UserError for such a key in ``overrides``, yaml text from a command.
    """
    text = experiment_text(path, overrides)
    tree, given = YAML().load(text), YAML().load(overrides) or {}
    read_by_others = set(re.findall(r"<(\w+)", text))  # !ref <key>
    made = {key for key in ("guidance", "loss") if str(getattr(tree.get(key), "tag", None) or "").startswith("!new:")}
    idle = {key: why for key, why in unread(settings, made).items() if key.split(".")[0] not in read_by_others}
    for key, why in idle.items():
        if _has(given, key):
            raise UserError(f"--{key}: expected a key that this run reads, got one that it would not: {why}")
    return [key for key in idle if _has(tree, key)]


def _has(tree: Mapping[str, Any], key: str) -> bool:
    branch, _, name = key.partition(".")
    value = tree.get(branch)
    return (value if not name else value.get(name) if isinstance(value, Mapping) else None) is not None


def unread(settings: Settings, made: Collection[str] = ()) -> dict[str, str]:
    """Each key that a run of these settings does not read, with the reason and the way out.

    ``made`` says which of guidance and loss the experiment makes itself (``!new:``), with options of their own.

    Example
    -------
    >>> unread(Settings("results/a"))["switch_step"]
    'unguided guidance has no such option. Leave it out, or give --guidance hybrid'
    """
    found = {key: f"{why}. Leave it out, or {way}" for key, why, way in _found(settings)}
    for kind, keys in (("guidance", every_option()), ("loss", LossForm.options())):
        if kind in made:
            found |= dict.fromkeys(
                keys, f"the experiment makes its {kind} itself (!new:). Leave it out, or set it there"
            )
    return found


def _found(settings: Settings) -> Iterator[tuple[str, str, str]]:
    guidance = settings.guidance
    mode = type(guidance).__name__.lower()
    steps = range(0, settings.num_steps, max(1, settings.num_steps // MOST_STEPS))
    weights = [guidance.weights(step) for step in (*steps, guidance.align_steps)]
    layers, logits = any(of.layer > 0 for of in weights), any(of.logits > 0 for of in weights)

    # of guidance and loss
    known = options_of(type(guidance))
    for key in sorted(every_option() - known.keys()):
        others = sorted({of.__name__.lower() for of in derived_modes() if key in options_of(of)})
        yield key, f"{mode} guidance has no such option", f"give --guidance {' or '.join(others)}"
    if not guidance.align_steps:
        yield "align_learning_rate", f"nothing is aligned before {mode} guidance begins", "give --align_steps"
    for key in OF_LAYERS if not layers else ():
        yield key, f"there is no layer loss under {mode} guidance at its weights", "give it an --alpha_layer above 0"
    for key in OF_LOGITS if not logits else ():
        yield key, f"there is no logit loss under {mode} guidance at its weights", "give it an --alpha_logits above 0"
    if layers and not settings.loss.last:
        yield "final_norm_on_last", "this loss leaves the last layer out", "take another --loss"
    if not layers and not logits:
        yield "teacher_mask", f"{mode} guidance runs no teacher beside the student", "give --guidance target"
        if settings.normalisation != "reference":
            yield "loss", f"no teacher's states or logits are compared under {mode} guidance", "give --guidance target"
    if not any(of.runs_student for of in weights):
        yield "normalisation", f"{mode} guidance has no loss of the whole student", "give --guidance target"

    # of the models
    converts = [f for f in (settings.layer_map.default, *settings.layer_map.overrides.values()) if f is not None]
    if settings.student is not None:
        for key in ("layer_map", "initialise"):
            yield key, "--student gives a converted model to go on from", "leave --student out"
        yield "source", "the student starts from --student", "leave --student out"
    elif not converts:
        yield "initialise", "layer_map converts no layer", "give a layer_map that does"
    if settings.student is None and settings.teacher is not None and guidance.starts_from == "teacher":
        others = sorted(of.__name__.lower() for of in derived_modes() if of.starts_from == "source")
        yield (
            "source",
            f"under {mode} guidance the student starts from its teacher's weights",
            f"give --guidance {' or '.join(others)} (a processor of its own is --processor)",
        )

    if settings.adapters is not None:
        yield "freeze_front_end", "adapters train alone, wherever they are put", "leave the adapters out"

    # of task and data
    task = settings.task
    for key in task.unread:
        yield key, f"{type(task).__name__.lower()} takes labels and texts as they stand", "mend the data"
    if not can_score(task):
        yield "score_test_sets", f"{type(task).__name__.lower()} has no figure of a test set", "take a task with labels"
    if isinstance(task.modality, Text):
        yield "freeze_front_end", "a model of text has no front end", "train speech with it"
    for key in {"max_batch_s", "max_batch_tokens"} - {task.modality.batch_limit}:
        yield key, "batches are measured otherwise", f"give --{task.modality.batch_limit}"
    if settings.join_utterances == 1:
        for key in ("join_pause_s", "join_last_steps"):
            yield key, "no utterances are joined", "give --join_utterances"
    if not settings.short_first_steps:
        yield "short_first_s", "no step has short utterances alone", "give --short_first_steps"
    if settings.checkpoint_every_steps:
        yield "checkpoint_every_minutes", "checkpoints are made by --checkpoint_every_steps", "leave that out"
    if not settings.weight_decay:
        yield "decay", "no matrix has weight decay", "give a --weight_decay above 0"
    if settings.schedule.shape == "constant":
        for key in ("schedule.decay_steps", "schedule.floor"):
            yield key, "a constant schedule does not decay", "give it another shape"
