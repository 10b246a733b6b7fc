"""A student of which every process holds a part: weights, gradients and the optimiser's state (FSDP2).

A layer's weights are gathered for its forward and its backward pass, and dropped after each. What is written is whole:
every process takes part in gathering it, and the main one has it then. So a model folder is a model folder, and a
checkpoint's weights can be loaded by one process.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from speechbrain.utils.checkpoints import mark_as_loader, mark_as_saver, register_checkpoint_hooks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer

from cald_speech.errors import UserError
from cald_speech.families import family_of
from cald_speech.training.distributed import is_main, world_size
from cald_speech.training.settings import Settings

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
TO_PARTS = StateDictOptions(full_state_dict=True)


def check_shard(settings: Settings, config: Any) -> None:
    """Raise UserError where a sharded student cannot be trained as the experiment says."""
    if world_size() == 1:
        raise UserError(
            "shard: expected several processes, and this is the only one. Leave it out, or start the same command with "
            "`torchrun --nproc_per_node N`"
        )
    if not settings.guidance.weights(0).runs_student:
        raise UserError(
            "shard: expected align_steps 0, since slot alignment runs mixers without their model, whose parts are "
            f"gathered as it runs, got {settings.guidance.align_steps}. Align in a run without shard, and give its "
            "model as --student"
        )
    if settings.conversion_schedule is not None:
        raise UserError("shard: expected no conversion_schedule: layers cannot be replaced in parts. Leave one out")
    if settings.adapters is not None:
        raise UserError("shard: expected no adapters, which are merged into weights that no process has whole")
    if settings.average_checkpoints > 1:
        raise UserError("shard: expected average_checkpoints 1: the mean is taken by one process. Leave one out")
    if settings.precision == "fp16":
        raise UserError("shard: expected precision fp32 or bf16, got fp16")
    dropped = [name for name in ("layerdrop", "encoder_layerdrop") if getattr(config, name, 0)]
    if dropped:
        raise UserError(
            f"shard: expected {dropped[0]} 0 in model_overrides, since the processes would wait for each other in "
            f"different layers, got {getattr(config, dropped[0])}"
        )


def shard(student: nn.Module, device: torch.device) -> None:
    """Leave each process its part of every parameter; a layer is gathered at a time, and what is in none together."""
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in family_of(student).layers(student):
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether :func:`shard` was called for it."""
    return isinstance(model, FSDPModule)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The whole weights of a sharded model, on the main process; None for another model. All ranks have to call it."""
    return get_model_state_dict(model, options=WHOLE) if is_sharded(model) else None


@partial(register_checkpoint_hooks, save_on_main_only=False)
class WholeState:
    """What a checkpoint holds of a sharded model, or of its optimiser: the whole of it, as of one process."""

    def __init__(self, model: nn.Module, optimiser: Optimizer | None = None):
        self.model, self.optimiser = model, optimiser

    @mark_as_saver
    def save(self, path: Path) -> None:
        if self.optimiser is None:
            state = get_model_state_dict(self.model, options=WHOLE)
        else:
            state = get_optimizer_state_dict(self.model, self.optimiser, options=WHOLE)
        if is_main():
            torch.save(state, path)

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if self.optimiser is None:
            set_model_state_dict(self.model, state, options=TO_PARTS)
        else:
            set_optimizer_state_dict(self.model, self.optimiser, state, options=TO_PARTS)
