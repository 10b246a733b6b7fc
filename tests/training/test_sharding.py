"""What a sharded student refuses. That it learns what one process learns: test_gradients.py."""

import re
from types import SimpleNamespace

import pytest

from cald_speech.errors import UserError
from cald_speech.training import sharding
from cald_speech.training.run import parse


@pytest.mark.parametrize(
    ("keys", "config", "ranks", "told"),
    [
        ({}, {}, 1, "shard: expected several processes.*torchrun --nproc_per_node N"),
        ({"align_steps": 2}, {}, 2, "shard: expected align_steps 0.*got 2. Align in a run without shard"),
        ({"converted_at": (0, 1)}, {}, 2, "shard: expected no conversion_schedule"),
        ({"precision": "fp16"}, {}, 2, "shard: expected precision fp32 or bf16, got fp16"),
        ({"average_checkpoints": 2}, {}, 2, "shard: expected average_checkpoints 1"),
        ({}, {"layerdrop": 0.1}, 2, "shard: expected layerdrop 0 in model_overrides.*got 0.1"),
    ],
    ids=["one process", "slot alignment", "a schedule", "fp16", "a mean", "layerdrop"],
)
def test_what_cannot_be_sharded(experiment, monkeypatch, keys, config, ranks, told):
    monkeypatch.setattr(sharding, "world_size", lambda: ranks)
    settings, _ = parse([str(experiment(shard=True, **keys))])
    with pytest.raises(UserError) as refused:
        sharding.check_shard(settings, SimpleNamespace(**config))
    assert re.search(told, str(refused.value))


def test_adapters_cannot_be_sharded(experiment, monkeypatch):
    monkeypatch.setattr(sharding, "world_size", lambda: 2)
    settings, _ = parse([str(experiment(shard=True))])
    settings.adapters = object()
    with pytest.raises(UserError, match="shard: expected no adapters"):
        sharding.check_shard(settings, SimpleNamespace())
