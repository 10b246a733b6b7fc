"""The gradient of one optimiser step, in one process or, run by torchrun, in several."""

import os
import sys
from pathlib import Path

import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataset import DynamicItemDataset
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor

from cald_speech.data.dataset import make_dataset
from cald_speech.recipes.librispeech.prepare import prepare
from cald_speech.training.brain import CaldBrain
from cald_speech.training.distributed import join
from cald_speech.training.models import build_models
from cald_speech.training.run import make_brain, parse, prepare_data, run, seed_everything
from tests.helpers import gradients

# Utterances of one step, of unequal lengths and numbers: on each of two ranks, and in each of two batches.
RANKS = [[[0, 11, 3], [7]], [[15], [1, 9]]]
IN_BATCHES = [batch for rank in RANKS for batch in rank]
JOINED = [[index for batch in IN_BATCHES for index in batch]]


def build(argv: list[str], dtype: torch.dtype = torch.float32) -> tuple[CaldBrain, DynamicItemDataset]:
    """A Brain before its first step, everything that draws at random being seeded, and its training set."""
    settings, run_opts = parse(argv)
    join(run_opts)
    data = prepare_data(settings, prepare)
    seed_everything(settings.seed)
    models = build_models(settings, data["train"])
    for model in filter(None, (models.student, models.teacher)):
        model.to(dtype)
    brain = make_brain(settings, data, models, run_opts)
    for parameter in models.student.parameters():  # the scans' too, which stay in float32 wherever a model is moved
        parameter.data = parameter.data.to(dtype)
    brain.on_fit_start()
    brain.modules.train()
    return brain, make_dataset(data["train"], models.processor)


def padded(
    dataset: DynamicItemDataset, batches: list[list[int]], dtype: torch.dtype = torch.float32
) -> list[PaddedBatch]:
    items = [[dict(dataset[index]) for index in batch] for batch in batches]
    return [PaddedBatch([item | {"wav": item["wav"].to(dtype)} for item in batch]) for batch in items]


def step_gradients(brain: CaldBrain, batches: list[PaddedBatch]) -> dict[str, Tensor]:
    """The gradients before clipping of the next step, which is not taken."""
    recorded: dict[str, Tensor] = {}

    def record(batches: list, losses: list) -> float:
        recorded.update(gradients(brain.plain))
        brain.zero_grad(set_to_none=True)
        return 0.0

    brain._update = record
    brain.fit_batch(batches)
    return recorded


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, of which each rank may hold a part."""
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def main(path: str, out: str, *shards: str) -> None:
    """On each rank, for each value of ``shard``: train, resume, then the gradient of a step of both ranks."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for shard in shards:
        folder = Path(out) / shard
        for num_steps in ("2", "3"):
            words = ["--output_folder", str(folder / "run"), "--checkpoint_every_steps", "1", "--num_steps", num_steps]
            brain = run([path, *words, "--shard", shard, "--noprogressbar"], prepare)
        weights = [None, None]
        distributed.all_gather_object(weights, whole(brain.plain.state_dict()))
        words = ["--output_folder", str(folder / "gradients"), "--shard", shard]
        brain, dataset = build([path, *words], torch.float64)
        found = whole(step_gradients(brain, padded(dataset, RANKS[rank], torch.float64)))
        if rank == 0:
            torch.save({"gradients": found, "weights": weights}, folder / "found.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
