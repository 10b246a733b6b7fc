"""The backward pass of the blocked convolution: each block's sums are computed again, nothing but inputs is saved."""

import torch
from torch import Tensor

from cald_speech.ops.short_conv.torch_steps import Extended, Plan, convolve


def run_backward(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    grad_y: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of x, the weight, the bias and the initial state."""
    batch, num_frames, channels = x.shape
    past, taps = weight.size(1) - 1, plan.taps(weight)
    histories, grad_last = plan.histories(initial_state, x, past), plan.in_time(grad_state)
    row_backward = RowBackward(plan, taps, bias, min(plan.block, num_frames))
    grad_x, grad_history = x.new_empty(x.shape), taps.new_empty(batch, past, channels)
    for row, end in enumerate(plan.ends):
        grads = Extended(grad_x[row, :end], grad_history[row], plan.reverse)
        row_backward.run(Extended(x[row, :end], histories[row], plan.reverse), grad_y[row], grads)
        grads.add(grads.last_seen(), grad_last[row])
        grad_x[row, end:] = 0
    grad_taps = row_backward.grad_taps.flip(0) if plan.reverse else row_backward.grad_taps
    grad_bias = None if bias is None else row_backward.grad_bias.to(bias.dtype)
    grad_state = None if initial_state is None else plan.in_scan(grad_history).to(initial_state.dtype)
    return grad_x, grad_taps.t().to(weight.dtype), grad_bias, grad_state


class RowBackward:
    """The backward pass of one sequence after another; adds up the gradients of the taps (K, D) and the bias (D,)."""

    def __init__(self, plan: Plan, taps: Tensor, bias: Tensor | None, max_frames: int):
        width, channels = taps.shape
        self.plan, self.taps, self.flipped = plan, taps, taps.flip(0)
        self.grad_taps, self.grad_bias = torch.zeros_like(taps), taps.new_zeros(channels)
        self.zeros = taps.new_zeros(channels)
        self.bias = self.zeros if bias is None else bias.to(plan.dtype)
        # The last block of gradients is that of the history, K-1 frames.
        shape = (max(max_frames, width - 1) + width - 1, channels)
        self.seen, self.work, self.grad_sums = taps.new_empty(3, *shape).unbind()

    def run(self, extended: Extended, grad_y: Tensor, grads: Extended) -> None:
        """The gradient of ``extended`` into ``grads``, in ascending blocks.

        Entry j of e was multiplied into the sums of frames j-K+1 to j: each block leaves the gradients of its last K-1
        sums to the next, in front of ``grad_sums``.
        """
        past, end = self.taps.size(0) - 1, extended.frames.size(0)
        self.grad_sums[:past] = 0
        for frames in self.plan.blocks(end):
            num_frames = frames.stop - frames.start
            seen = extended.read(frames.start, frames.stop + past, self.seen)
            grad_sums = self.grad_sums[past : past + num_frames]
            grad_sums.copy_(grad_y[frames])
            if self.plan.silu:
                total = convolve(seen, self.taps, self.bias, self.work)
                torch.ops.aten.silu_backward.grad_input(grad_sums, total, grad_input=grad_sums)
            self._add_parameters(seen, grad_sums)
            self._finish(frames.start, num_frames, grads)
        self.grad_sums[past : 2 * past] = 0
        self._finish(end, past, grads)

    def _add_parameters(self, seen: Tensor, grad_sums: Tensor) -> None:
        num_frames = grad_sums.size(0)
        self.grad_bias += grad_sums.sum(0)
        for k, grad_tap in enumerate(self.grad_taps):
            grad_tap += torch.mul(grad_sums, seen[k : k + num_frames], out=self.work[:num_frames]).sum(0)

    def _finish(self, start: int, num_frames: int, grads: Extended) -> None:
        """Gradients of e[start : start + num_frames], and the last K-1 of the sums' to the front."""
        past = self.taps.size(0) - 1
        used = self.grad_sums[: num_frames + past]
        grads.write(start, convolve(used, self.flipped, self.zeros, self.work))
        self.grad_sums[:past] = used[num_frames:].clone()
