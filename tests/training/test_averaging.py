"""The model at the end as the mean of the last validated ones."""

import json

import pytest
import torch

from cald_speech import from_pretrained
from cald_speech.errors import UserError
from cald_speech.training.averaging import check_average, mean_weights
from cald_speech.training.brain import CaldBrain
from cald_speech.training.run import parse
from tests.helpers import TOLERANCE, relative_error
from tests.training.test_resume import RESTLESS, Killed, kill_after_step


@pytest.mark.slow  # three starts
def test_the_mean_of_the_last_validated_also_after_a_stop(experiment, start, monkeypatch):
    """Two of three: the first comes before the kill, and is not among them."""
    seen, on_stage_end = {}, CaldBrain.on_stage_end

    def watched(brain, stage, loss, epoch=None):
        on_stage_end(brain, stage, loss, epoch)
        if stage.name == "VALID":
            seen[brain.optimizer_step] = {name: w.clone() for name, w in brain.plain.state_dict().items()}

    monkeypatch.setattr(CaldBrain, "on_stage_end", watched)
    keys = RESTLESS | {"average_checkpoints": 2, "num_steps": 13}
    path = experiment(**keys)
    with monkeypatch.context() as patch:
        kill_after_step(patch, 8)
        with pytest.raises(Killed):
            start(path)
    brain = start(path)
    assert len(seen) == 3 and max(seen) == 13
    last = [seen[step] for step in sorted(seen)[1:]]
    folder = brain.store.folder
    model = from_pretrained(folder / "model")
    errors = [relative_error(w, torch.stack([v[n] for v in last]).mean(0)) for n, w in model.state_dict().items()]
    assert max(errors) < TOLERANCE["rounding"]
    assert not torch.equal(model.lm_head.weight, last[-1]["lm_head.weight"])
    assert all(torch.equal(w, seen[13][name]) for name, w in brain.plain.state_dict().items())
    facts = json.loads((folder / "model" / "cald.json").read_text())
    assert facts["mean"].startswith("of the weights after steps") and facts["mean"].endswith(", 13")
    weights = (folder / "model" / "model.safetensors").read_bytes()
    start(path)
    assert (folder / "model" / "model.safetensors").read_bytes() == weights


def test_more_than_there_will_be(experiment, start):
    with pytest.raises(UserError, match=r"average_checkpoints: expected at most 1, .* got 3"):
        start(experiment(average_checkpoints=3))


def test_adapters_have_no_mean(experiment):
    settings, _ = parse([str(experiment(average_checkpoints=2))])
    settings.adapters = object()
    with pytest.raises(UserError, match="average_checkpoints: expected 1 with adapters"):
        check_average(settings, sampler=None, since=0)


def test_tied_weights_count_once(tmp_path):
    class Saved:
        def __init__(self, number: int):
            weight = torch.full((2,), float(number))
            self.paramfiles = {"student": tmp_path / f"{number}.ckpt"}
            torch.save({"embedding": weight, "head": weight}, self.paramfiles["student"])

    mean = mean_weights([Saved(1), Saved(3)])
    assert {name: weight.tolist() for name, weight in mean.items()} == {"embedding": [2, 2], "head": [2, 2]}
