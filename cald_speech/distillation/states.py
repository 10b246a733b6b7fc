"""The hidden states after each layer, caught by hooks of our own.

Hugging Face's ``hidden_states[-1]`` is before or after the final norm depending on the model and the version, so the
layers are hooked themselves: what is caught is always the layer's output, before any final norm.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def captured_states(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Fill a list with the output (B, T, D) of each layer during the forward pass inside the ``with`` block.

    Example
    -------
    >>> import torch
    >>> layers = [nn.Linear(2, 2), nn.Linear(2, 2)]
    >>> with captured_states(layers) as states:
    ...     y = layers[1](layers[0](torch.ones(1, 1, 2)))
    >>> len(states), states[1] is y
    (2, True)
    """
    states: list[Tensor] = []

    def hook(layer: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
