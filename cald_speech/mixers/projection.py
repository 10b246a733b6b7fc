"""A linear layer whose inference on a CPU goes through oneDNN.

``nn.Linear`` calls the BLAS that torch was built with, MKL, which leaves half of an AMD core unused: on two cores of an
AVX-512 EPYC, (1536, 768) times (768, 3084) takes 36 ms in MKL and 16 ms in oneDNN, which ships in the same torch.
"""

import torch
from torch import Tensor, nn


class Projection(nn.Linear):
    """An ``nn.Linear`` in all but speed, and in the order of its sums.

    Example
    -------
    >>> layer = Projection(4, 2)
    >>> x = torch.randn(3, 5, 4)
    >>> with torch.no_grad():
    ...     torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias), atol=1e-6)
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _by_onednn(x, self.weight):
            return super().forward(x)
        # The op behind torch.compile's fused linear layers; it has no backward pass.
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    plain = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    if not plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
