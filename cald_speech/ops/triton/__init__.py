"""What the Triton kernels of every op need: an interpreter in which loops end, and inputs whose last axis is dense.

``TRITON_INTERPRET=1``, set before the first import of triton, runs kernels in Python on a CPU: slowly, to try them
where there is no GPU, with ``backend="triton"``. The kernels of every op mend it when they are imported.
"""

import numpy
from torch import Tensor
from triton.runtime import interpreter

from cald_speech.ops.backends import interpreted


def mend_interpreter() -> None:
    """Let a loop in a kernel take its bound from an array of one element; for the whole process, once.

    Triton (3.4 to 3.6) calls ``int()`` of that array, which numpy 2.4 refuses (``TypeError: only 0-dimensional arrays
    can be converted to Python scalars``). Does nothing where kernels are compiled.

    Example
    -------
    >>> mend_interpreter()
    """
    if not interpreted():
        return
    patch_tensor = interpreter._patch_lang_tensor
    if getattr(patch_tensor, "mended", False):
        return

    def patch(tensor, *scope):  # from 3.6 on there is one, which takes the attributes off again
        patch_tensor(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(numpy.asarray(self.handle.data).item()))

    patch.mended = True
    interpreter._patch_lang_tensor = patch


def unit_stride(v: Tensor) -> Tensor:
    """The tensor itself where its last axis has stride 1, as that of every slice of a projection has; else a copy.

    Example
    -------
    >>> import torch
    >>> unit_stride(torch.ones(2, 3).T).stride()
    (2, 1)
    """
    return v if v.stride(-1) == 1 else v.contiguous()
