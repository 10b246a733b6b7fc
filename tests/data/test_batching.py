"""Steps of batches: every utterance once an epoch, another order each epoch, the same one when it is resumed."""

import pytest
import torch
from torch.utils.data import Dataset

from cald_speech.data.batching import LateStep, StepSampler, batches_by_length, item_lengths, padded, step_loader
from cald_speech.errors import UserError
from cald_speech.tasks.ctc import CTC

GENERATOR = torch.Generator().manual_seed(0)
DURATIONS_S = (0.4 + 14 * torch.rand(101, generator=GENERATOR)).tolist()
DURATIONS_S[17] = 60.0  # longer than a whole batch may be
MAX_BATCH_S = 40.0


def sampler(**options) -> StepSampler:
    return StepSampler(DURATIONS_S, MAX_BATCH_S, **options)


def epoch(sampler: StepSampler, number: int) -> list[list[list[int]]]:
    sampler.set_epoch(number)
    return list(sampler)


def flat(steps) -> list[int]:
    return [index for step in steps for batch in step for index in batch]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("number", [1, 2, 7])
def test_every_utterance_once_an_epoch(accumulation, number):
    steps = epoch(sampler(accumulation=accumulation), number)
    assert sorted(flat(steps)) == list(range(101))
    assert {len(step) for step in steps[:-1]} == {accumulation} and 1 <= len(steps[-1]) <= accumulation


def test_orders_differ_between_epochs_and_seeds_and_come_again():
    one = sampler(accumulation=2)
    epochs = [epoch(one, number) for number in range(1, 5)]
    assert all(epochs[i] != epochs[j] for i in range(4) for j in range(i))
    assert [epoch(sampler(accumulation=2), number) for number in (3, 2)] == [epochs[2], epochs[1]]
    assert epoch(sampler(accumulation=2, seed=100), 1) != epochs[0]


@pytest.mark.parametrize("start", [0, 1, 5])
def test_start_passes_over_steps(start):
    whole = epoch(sampler(accumulation=2), 3)
    resumed = sampler(accumulation=2)
    resumed.start = start
    assert epoch(resumed, 3) == whole[start:]
    assert len(resumed) == len(whole) - start


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_are_disjoint_and_equal_in_number(world_size, accumulation):
    options = {"accumulation": accumulation, "world_size": world_size}
    ranks = [epoch(sampler(rank=rank, **options), 2) for rank in range(world_size)]
    shapes = [[len(step) for step in steps] for steps in ranks]
    assert all(shape == shapes[0] for shape in shapes)
    together = [index for steps in ranks for index in flat(steps)]
    assert len(together) == len(set(together))
    alone = epoch(sampler(), 2)
    assert sum(map(sum, shapes)) == len(alone) // world_size * world_size
    # A step of all ranks holds the batches that one process would have put into it.
    joined = [[batch for steps in ranks for batch in steps[i]] for i in range(len(ranks[0]))]
    single = epoch(sampler(accumulation=accumulation * world_size), 2)
    assert all(sorted(mine) == sorted(theirs) for mine, theirs in zip(joined[:-1], single, strict=False))


@pytest.mark.parametrize("most", [None, 4])
def test_padding_counts_against_the_limit(most):
    for step in epoch(sampler(max_batch_utterances=most), 1):
        for batch in step:
            padded = len(batch) * max(DURATIONS_S[index] for index in batch)
            assert padded <= MAX_BATCH_S or len(batch) == 1
            assert most is None or len(batch) <= most


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_first_steps_are_short(world_size):
    """Short utterances alone, for exactly so many steps, over several epochs; then all. A resumed run sees the same."""
    options = {"accumulation": 2, "world_size": world_size, "short_first_steps": 20, "short_first_size": 4.0}
    one = sampler(**options)
    epochs = [epoch(one, number) for number in range(1, 12)]
    short = [steps for steps in epochs if max(DURATIONS_S[i] for i in flat(steps)) <= 4.0]
    assert sum(map(len, short)) == 20 and len(short) > 2 and epochs[: len(short)] == short
    assert all(steps == epoch(sampler(**options | {"short_first_steps": 0}), number)
               for number, steps in enumerate(epochs[len(short) :], start=len(short) + 1))  # fmt: skip
    assert epoch(sampler(**options), len(short)) == short[-1]
    with pytest.raises(UserError, match=r"short_first_s: expected items of at most 0\.1 .* shortest has 0\.4"):
        sampler(short_first_steps=1, short_first_size=0.1)


def test_the_last_steps_are_late():
    one = sampler(accumulation=2, late_from=9)
    one.start, one.first = 3, 5
    kinds = [type(step) for step in epoch(one, 2)]
    assert kinds == [list] * 4 + [LateStep] * (len(kinds) - 4) and len(kinds) > 4


def test_too_few_batches_for_the_ranks():
    with pytest.raises(UserError, match=r"1 batch.* 2 processes"):
        StepSampler([1.0, 1.0], 40.0, world_size=2)


class Numbers(Dataset):
    """An item for each index, as the collation of SpeechBrain wants it."""

    def __getitem__(self, index: int) -> dict:
        return {"id": str(index), "wav": torch.full((index + 1,), float(index))}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_yields_padded_batches_and_draws_nothing(num_workers):
    steps = StepSampler([1.0, 2.0, 3.0, 4.0], 8.0, accumulation=2)
    before = torch.get_rng_state()
    loaded = list(step_loader(Numbers(), steps, num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert [[b.id for b in step] for step in loaded] == [[[str(i) for i in batch] for batch in step] for step in steps]
    for step in loaded:
        for batch in step:
            longest = max(int(name) for name in batch.id) + 1
            assert batch.wav.data.shape == (len(batch.id), longest)


@pytest.mark.parametrize("max_batch_s", [0.0, 20.0, 1000.0])
def test_batches_by_length(max_batch_s):
    batches = batches_by_length(DURATIONS_S, max_batch_s)
    assert sorted(index for batch in batches for index in batch) == list(range(101))
    longest_first = [DURATIONS_S[index] for batch in batches for index in batch]
    assert longest_first == sorted(DURATIONS_S, reverse=True)
    assert all(len(batch) == 1 or len(batch) * DURATIONS_S[batch[0]] <= max_batch_s for batch in batches)


def test_a_batch_without_a_label_is_one_of_padding():
    """Utterances in which nobody says anything: alone, several, and beside one with labels."""
    silent, said = {"id": "a", "labels": torch.zeros(0).long()}, {"id": "b", "labels": torch.tensor([1, 2])}
    for items, expected in (([silent], [0]), ([silent, silent], [0, 0]), ([silent, said], [0, 2])):
        batch = padded(items)
        assert item_lengths(batch.labels).tolist() == expected and batch.labels.data.size(1) == max(1, *expected, 1)
        task, lengths = CTC(), torch.full((len(items),), 5)
        assert task.can_learn(batch, lengths).all() and task.units(batch).tolist() == expected
        assert torch.isfinite(task.loss(torch.zeros(len(items), 5, 3), lengths, batch))
