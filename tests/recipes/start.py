"""Experiments started as the command line would, by the recipe that they name."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from cald_speech.training.brain import CaldBrain
from cald_speech.training.run import Prepare, run
from tests.training.miniature import ROOT, write_model

OF_SOME_MODES = ("source", "switch_step", "waypoints", "teacher_steps", "alpha_logits")


def start(experiment: str, keys: Mapping[str, Any], prepare: Prepare | None = None) -> CaldBrain:
    """Run hparams/<experiment>.yaml with the keys on top; the Brain after training.

    What some guidance modes alone read lies in a yaml of one's own: in a command the others would refuse it.
    """
    plain = {key: json.dumps(value) if isinstance(value, dict | list | bool) else value for key, value in keys.items()}
    words = [f"--{key}={value}" for key, value in plain.items() if key not in OF_SOME_MODES]
    own = {key: value if isinstance(value, int | float) else str(value) for key, value in keys.items()}
    own = {key: value for key, value in own.items() if key in OF_SOME_MODES}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "own.yaml")
        path.write_text(yaml.safe_dump({"base": str(ROOT / "hparams" / f"{experiment}.yaml"), **own}))
        return run([str(path), *words, "--noprogressbar"], prepare)


def places(folder: Path) -> dict[str, str]:
    """Keys: the corpus is <folder>/data, and what is prepared of it goes beside."""
    return {"data_folder": str(folder / "data"), "prepare_folder": str(folder / "prepared")}


def write_teacher(folder: Path, corpus: str, small: Mapping[str, Any]) -> None:
    """An encoder without a head, and the teacher with waypoints that the corpus's own experiment makes of it."""
    write_model(folder / "encoder", head="base")
    keys = {"source": folder / "encoder", "output_folder": folder / "teacher", "waypoint_every_steps": 2}
    start(f"{corpus}/teacher", {**small, **places(folder), **keys, "layer_map": {}})


def follow_teacher(
    folder: Path, corpus: str, small: Mapping[str, Any], output_folder: Path, guidance: str
) -> CaldBrain:
    """A student of four steps, guided by that teacher for two of them (hybrid) or throughout."""
    keys = {"teacher": folder / "teacher" / "model", "waypoints": folder / "teacher" / "waypoints"}
    keys |= {"source": folder / "encoder", "output_folder": output_folder, "guidance": guidance}
    brain = start(f"{corpus}/student", {**small, **places(folder), **keys})
    assert brain.optimizer_step == 4 and brain.skipped.count == 0
    lines = [json.loads(line) for line in (output_folder / "train_log.jsonl").read_text().splitlines()]
    followed = [line["loss/layers"] > 0 for line in lines if "loss/layers" in line]
    assert followed == [True, True, *[guidance != "hybrid"] * 2]
    return brain
