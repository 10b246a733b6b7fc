"""What passes through a model's layers, caught by hooks of our own.

Hugging Face's ``hidden_states[-1]`` is before or after the final norm depending on the model and the version, so the
layers are hooked themselves: what is caught is always the layer's output, before any final norm.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def captured_states(layers: Sequence[nn.Module], *, embedding: bool = False) -> Iterator[list[Tensor]]:
    """Fill a list with the output (B, T, D) of each layer during the forward pass inside the ``with`` block.

    With ``embedding`` the first layer's input comes before them.

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
    with _inputs_to(states.append, layers[:1] if embedding else ()), _outputs_to(states.append, layers):
        yield states


@contextmanager
def captured_slots(ends: Sequence[tuple[nn.Module, nn.Module]]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Fill two lists with what enters and what leaves each slot (B, T, D) during the forward pass inside the block.

    Arguments
    ---------
    ends : the module where each slot begins and the one where it ends, which may be the same.
    """
    entering: list[Tensor] = []
    leaving: list[Tensor] = []
    with (
        _inputs_to(entering.append, [first for first, _ in ends]),
        _outputs_to(leaving.append, [last for _, last in ends]),
    ):
        yield entering, leaving


@contextmanager
def _inputs_to(take: Callable[[Tensor], None], modules: Sequence[nn.Module]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        take(args[0] if args else kwargs["hidden_states"])

    with _removed([module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]):
        yield


@contextmanager
def _outputs_to(take: Callable[[Tensor], None], modules: Sequence[nn.Module]) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        take(output[0] if isinstance(output, tuple) else output)

    with _removed([module.register_forward_hook(hook) for module in modules]):
        yield


@contextmanager
def _removed(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
