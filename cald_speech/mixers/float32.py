"""Parameters that keep float32 whatever the model's dtype: the decay rates, step sizes and skip weights of scans."""

import torch
from torch import Tensor, nn

# By name. Decays and steps are exponentiated: rounding them changes how far a layer remembers. They have no weight
# decay, which would too.
SCAN_PARAMETERS = ("A_log", "dt_bias", "D")


class Float32Parameters(nn.Module):
    """A module whose own parameters stay in float32 and only change device; its children's are cast as usual.

    Example
    -------
    >>> module = Float32Parameters()
    >>> module.A_log, module.proj = nn.Parameter(torch.zeros(2)), nn.Linear(2, 2)
    >>> module = module.to(torch.bfloat16)
    >>> module.A_log.dtype, module.proj.weight.dtype
    (torch.float32, torch.bfloat16)
    """

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) and .half() reach every parameter through here, and its gradient with it.
        def in_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == torch.float32 else tensor.to(moved.device, torch.float32)

        if recurse:
            for module in self.children():
                module._apply(fn)
        return super()._apply(in_float32, recurse=False)
