"""What both kinds of family promise in the same words: test_contract.py (speech) and test_text_contract.py ask it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cald_speech import LayerMap
from cald_speech.families import Family
from tests.helpers import TOLERANCE, gradients, relative_error, worst_gradient


@contextmanager
def captured_layers(model: PreTrainedModel, family: Family) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of every layer in the forward pass that runs inside."""
    states = []

    def hook(layer, args, kwargs, output):
        states.append((args[0], output[0] if isinstance(output, tuple) else output))

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in family.layers(model)]
    yield states
    for handle in handles:
        handle.remove()


def check_opened_layers(
    model: PreTrainedModel, family: Family, layer_map: LayerMap, states: list[tuple[Tensor, Tensor]]
) -> None:
    """Opened, every layer puts out what it put out as a whole, to the bit."""
    lengths, layers = family.context(model).frames, family.layers(model)
    for layer, factory, (x, expected) in zip(layers, layer_map.factories(len(layers)), states, strict=True):
        before, slot, after, _ = family.open(layer)
        arguments = family.layer_arguments(model, x, lengths) if factory is None else {"lengths": lengths}
        assert torch.equal(after(x, slot(before(x), **arguments)), expected)


def check_alone_is_padded(model: PreTrainedModel, batched: list[Tensor], alone: list[Tensor]) -> None:
    """Each row's logits (t, V) are the same in a batch and alone; so are the gradients of all of them."""
    loss(batched).backward()
    expected = gradients(model)
    assert expected.keys() == trained(model)
    model.zero_grad()
    for single, row in zip(alone, batched, strict=True):
        assert relative_error(single, row) <= TOLERANCE["rounding"]
    loss(alone).backward()
    error, name = worst_gradient(gradients(model), expected)
    assert error <= TOLERANCE["gradient"], name


def trained(model: PreTrainedModel) -> set[str]:
    """The parameters that a model without SpecAugment has gradients of: some have its vector all the same.

    A conformer has a positional convolution that nothing calls.
    """
    idle = ("masked_spec_embed", "conformer.encoder.pos_conv_embed.")
    return {name for name, _ in model.named_parameters() if not any(part in name for part in idle)}


def loss(rows: list[Tensor]) -> Tensor:
    """A number that hangs on every logit of every row."""
    return sum(logits.log_softmax(-1).square().sum() for logits in rows)


def check_checkpointing(model: PreTrainedModel, slot: torch.nn.Module, run, *, use_reentrant: bool) -> None:
    """``run()`` gives logits. With gradient checkpointing its gradients are the same, and the slot did run again.

    It runs during backward, when the forward pass is over: the lengths must still be there.
    """
    model.train()
    sum(logits.square().sum() for logits in run()).backward()
    expected = gradients(model)
    model.zero_grad()
    calls = []
    slot.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    sum(logits.square().sum() for logits in run()).backward()
    assert len(calls) == 2
    error, name = worst_gradient(gradients(model), expected)
    assert error <= TOLERANCE["rounding"], name
