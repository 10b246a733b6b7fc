"""A model whose layers multiply in int8 on a CPU, to run and not to train.

The linear maps of all layers, the mixers', feed-forward and kept attention's, get int8 weights with a scale for each
row. What goes into one is quantised as it comes, with one scale for the whole batch: so an output depends a little on
what else is in the batch. Convolutions, the projection of the front end, norms, scans and head stay in float32.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cald_speech.errors import UserError
from cald_speech.families import family_of

INT8 = torch.int8
WAY_OUT = "Load the folder again, in float32"


class Int8Linear(nn.Module):
    """What an ``nn.Linear`` does, by the int8 kernels of torch (FBGEMM, oneDNN or QNNPACK).

    Example
    -------
    >>> linear, x = nn.Linear(64, 64), torch.randn(8, 64)
    >>> bool((Int8Linear(linear)(x) - linear(x)).abs().max() < 0.05)
    True
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scales = (weight.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).eps).double()
        zeros = torch.zeros(len(weight), dtype=torch.long)
        quantised = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        bias = None if linear.bias is None else linear.bias.detach().float()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.quantized.linear_prepack(quantised, bias)

    def forward(self, x: Tensor) -> Tensor:
        # Seven bits of x: sums of products of eight overflow on processors without VNNI.
        return torch.ops.quantized.linear_dynamic(x, self.packed, reduce_range=True)

    @property
    def weight(self) -> Tensor:
        """In float32, for what multiplies by itself: attention of torch's own."""
        return torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()

    @property
    def bias(self) -> Tensor | None:
        return torch.ops.quantized.linear_unpack(self.packed)[1]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def in_int8(model: PreTrainedModel) -> PreTrainedModel:
    """Make the layers' linear maps int8, in place; the model, of the same class otherwise, is returned.

    Raises
    ------
    UserError
        for a model that is not in float32 on a CPU, and where this torch has no int8 kernels; later, where it is to be
        trained, saved, or moved elsewhere.
    """
    if is_int8(model):
        return model
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UserError(
            f"dtype int8: expected a model in float32 on a CPU, which alone has these kernels, got {model.dtype} on "
            f"{model.device}. On a GPU use bfloat16"
        )
    if torch.backends.quantized.engine == "none":
        raise UserError("dtype int8: this build of torch has no int8 kernels. Use float32 or bfloat16")
    for layer in family_of(model).layers(model):
        linears = [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
        for name in linears:
            layer.set_submodule(name, Int8Linear(layer.get_submodule(name)))
    model.eval().requires_grad_(False)
    model.__class__ = _class_in_int8(type(model))
    return model


def is_int8(model: nn.Module) -> bool:
    """Whether :func:`in_int8` made it what it is."""
    return isinstance(model, _InInt8)


def count_parameters(model: nn.Module) -> int:
    """Of a model in any dtype; int8 weights are no parameters to torch.

    Example
    -------
    >>> count_parameters(Int8Linear(nn.Linear(2, 3)))
    9
    """
    packed = [module for module in model.modules() if isinstance(module, Int8Linear)]
    own = sum(parameter.numel() for parameter in model.parameters())
    biases = sum(0 if module.bias is None else module.out_features for module in packed)
    return own + biases + sum(module.in_features * module.out_features for module in packed)


class _InInt8:
    """What a model in int8 cannot do."""

    def train(self, mode: bool = True) -> Any:
        if mode:
            raise UserError(f"a model in int8 cannot be trained: its weights are rounded. {WAY_OUT}")
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(f"a model in int8 cannot be saved: folders hold the weights that it was made of. {WAY_OUT}")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        moved = fn(torch.zeros(1))
        if moved.device.type != "cpu" or moved.dtype != torch.float32:
            raise UserError(
                f"a model in int8 runs on a CPU, with float32 around its kernels, and cannot become {moved.dtype} on "
                f"{moved.device}. {WAY_OUT}"
            )
        return super()._apply(fn, *args, **kwargs)


@cache
def _class_in_int8(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Of the same name: transformers tells a model's task by it."""
    return type(cls.__name__, (_InInt8, cls), {"__module__": __name__, "__doc__": cls.__doc__})
