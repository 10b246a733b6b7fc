"""The pass over a data set: which items a batch holds, and what names them where it fails."""

import pytest
import torch
from speechbrain.dataio.dataset import DynamicItemDataset

from cald_speech.errors import UserError
from cald_speech.evaluation.forward import batches, check_finite, naming
from tests.helpers import SPEECH, tiny_model

DURATIONS_S = {"a": 0.2, "b": 0.5, "c": 0.1, "d": 0.4}


@pytest.fixture
def dataset():
    entries = {key: {"wav": torch.randn(int(16_000 * s)), "duration_s": s} for key, s in DURATIONS_S.items()}
    return DynamicItemDataset(entries, output_keys=["id", "wav", "duration_s"])


def test_the_chosen_items_come_longest_first_with_their_lengths_and_the_models_dtype(dataset):
    model = tiny_model(SPEECH["wav2vec2"]).bfloat16()
    (first, second) = batches(dataset, model, 0.9, places=[0, 1, 3])
    assert (first.ids, first.places, second.ids, second.places) == (["b"], [1], ["d", "a"], [3, 0])
    assert second.arguments["input_values"].dtype == torch.bfloat16
    assert second.arguments["input_values"].shape == (2, 6_400) and second.arguments["attention_mask"].sum() == 9_600
    assert second.lengths.tolist() == [19, 9]


@pytest.mark.parametrize("limit", ["max_batch_s", "max_batch_tokens"])
def test_memory_that_runs_out_is_an_error_with_its_way_out(limit):
    with pytest.raises(UserError, match=rf"a batch of 2 utterances \(a, b\): .*--{limit}"), naming(["a", "b"], limit):
        raise torch.OutOfMemoryError


def test_what_a_user_can_mend_is_told_as_it_is():
    with pytest.raises(UserError, match=r"^the disk is full$"), naming(["a"]):
        raise UserError("the disk is full")


def test_only_valid_frames_must_be_finite(dataset):
    (batch,) = batches(dataset, tiny_model(SPEECH["wav2vec2"]), 60.0, places=[0, 1])
    values = torch.zeros(2, int(batch.lengths.max()), 3)
    values[1, int(batch.lengths[1]) :] = torch.nan
    check_finite("states", values, batch)
    values[1, 0, 0] = torch.inf
    with pytest.raises(RuntimeError, match="the states of a are not finite"):
        check_finite("states", values, batch)
