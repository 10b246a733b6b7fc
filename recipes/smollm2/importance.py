"""Which layers of a language model cost least when they are converted: each one's mixer alone in the teacher.

All layers are converted in a copy, and their mixers calibrated in closed form on text of the training set. Then each
mixer stands alone in the teacher, and the divergence of what it predicts from the teacher's own predictions is
measured, in nats a token (as in `cald-speech layers`, which does so for speech). Costs of single layers need not add
up, and training takes away an unknown part of them.
"""

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cald_speech.conversion import LayerMap, convert, from_pretrained
from cald_speech.data.tokens import TokenBlocks, TokenSet
from cald_speech.distillation import logit_loss
from cald_speech.evaluation.calibration import calibrate
from cald_speech.evaluation.forward import batches, chosen
from cald_speech.evaluation.layer_importance import with_mixer_of
from cald_speech.families import family_of
from cald_speech.files import whole_file
from cald_speech.mixers import MixerFactory
from cald_speech.tasks.language_modelling import CausalLM

MAX_BATCH_TOKENS = 1_100
Row = dict[str, Any]


def layer_costs(
    teacher: str, mixer: MixerFactory, sets: dict[str, Path], record: Path, *, calibrate_blocks: int, blocks: int
) -> list[Row]:
    """{"layer", "kl", "nats", "teacher_nats"} of each layer, in their order; stopped and called again it goes on.

    Arguments
    ---------
    sets : ``train`` and ``valid``, as `prepare` gives them; ``blocks`` of the latter are read.
    record : the file that holds the sums of each batch that is done.
    """
    done: list[list[Row]] = json.loads(record.read_text()) if record.is_file() else []
    model = from_pretrained(teacher, head="lm").eval()
    train, valid = (TokenBlocks(TokenSet.read(sets[name])) for name in ("train", "valid"))
    places, task = chosen(len(valid), blocks), CausalLM()
    read = list(batches(valid, model, MAX_BATCH_TOKENS, modality=task.modality, places=places, whole_items=True))
    if len(done) < len(read):
        torch.manual_seed(0)
        student = copy.deepcopy(model)
        report = convert(student, LayerMap(mixer))
        calibrate(report, model, student, train, modality=task.modality, utterances=calibrate_blocks)
        student.eval()
        models = [model, *(with_mixer_of(student, model, i) for i in range(len(family_of(model).layers(model))))]
    for batch in read[len(done) :]:
        found = []
        with torch.inference_mode():
            own = model(**batch.arguments).logits
            for one in models:
                logits = own if one is model else one(**batch.arguments).logits
                kl, tokens = logit_loss(logits, own, batch.lengths, temperature=1.0)
                nats = task.loss(logits, batch.lengths, batch.items).item()
                units = int(task.units(batch.items).sum())
                found.append({"kl": kl.item(), "tokens": int(tokens), "nats": nats, "predicted": units})
        done.append(found)
        with whole_file(record) as unfinished:
            unfinished.write_text(json.dumps(done, indent=1) + "\n")
    sums = [{key: sum(row[key] for row in rows) for key in rows[0]} for rows in zip(*done, strict=True)]
    teacher_nats, *costs = [(of["kl"] / of["tokens"], of["nats"] / of["predicted"]) for of in sums]
    return [
        {"layer": layer, "kl": kl, "nats": nats, "teacher_nats": teacher_nats[1]}
        for layer, (kl, nats) in enumerate(costs)
    ]


def chosen_layers(costs: Sequence[Row], count: int, how: str, seed: int = 0) -> list[int]:
    """The layers that are converted: the ``count`` that cost least, or as many at random.

    Example
    -------
    >>> chosen_layers([{"layer": 0, "kl": 3.0}, {"layer": 1, "kl": 1.0}, {"layer": 2, "kl": 2.0}], 2, "importance")
    [1, 2]
    """
    if how == "random":
        return sorted(random.Random(seed).sample(range(len(costs)), count))
    return sorted(row["layer"] for row in sorted(costs, key=lambda row: row["kl"])[:count])
