"""The launches of one selective scan and of its gradient, and their fixed configurations."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from cald_speech.ops.selective_scan.triton.gradients import gradients_kernel
from cald_speech.ops.selective_scan.triton.scan import carry_kernel, chunks_kernel, outputs_kernel

# Frames of a chunk forwards, unless a call says otherwise: enough for the states of chunks to be few.
CHUNK_SIZE = 128
# Frames whose loads are under way together.
UNROLL = 8
# Frames of a chunk backwards, whose states all stay in registers.
BACKWARD_CHUNK = 16
# Channels of a program at a time, and entries of their states that one thread then holds.
FORWARD_CHANNELS, FORWARD_ENTRIES = 16, 8
BACKWARD_CHANNELS, BACKWARD_ENTRIES = 4, 2
# Backwards a program adds up the gradients of B and C of so many blocks of channels, one after another ...
MAX_BLOCKS = 32
# ... unless that leaves fewer programs than fill a large GPU.
ENOUGH_PROGRAMS = 2048


def tile(channels: int, entries: int, group_size: int, d_state: int) -> dict[str, int]:
    """How many channels and state entries a program holds, and its warps."""
    block_d, block_n = min(channels, triton.next_power_of_2(group_size)), triton.next_power_of_2(d_state)
    warps = max(1, min(16, block_d * block_n // (32 * entries)))
    return {"BLOCK_D": block_d, "BLOCK_N": block_n, "num_warps": warps}


def blocks_together(group_size: int, block_d: int, programs: int) -> int:
    """How many blocks of channels one program of the backward pass takes; from shapes alone.

    programs : how many there would be, were it one.
    """
    blocks = min(MAX_BLOCKS, triton.next_power_of_2(triton.cdiv(group_size, block_d)))
    while blocks > 1 and programs // blocks < ENOUGH_PROGRAMS:
        blocks //= 2
    return blocks


@dataclass(frozen=True)
class Scan:
    """The inputs of one scan."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    initial_state: Tensor | None
    lengths: Tensor | None
    reverse: bool

    @property
    def group_size(self) -> int:
        return self.x.size(2) // self.B.size(2)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def constants(self, channels: int, entries: int) -> dict[str, int]:
        d_state = self.A.size(1)
        return {"GROUP_SIZE": self.group_size, "N": d_state} | tile(channels, entries, self.group_size, d_state)

    def run(self, chunk_size: int | None) -> tuple[Tensor, Tensor]:
        """y and the final state."""
        chunk_size = triton.cdiv(min(chunk_size or CHUNK_SIZE, max(1, self.x.size(1))), UNROLL) * UNROLL
        entering, total_dt = self.added(chunk_size)
        final = self.carry(entering, total_dt, self.initial_state)
        y = self.x.new_empty(self.x.shape)
        batch, chunks = entering.shape[:2]
        constants = self.constants(FORWARD_CHANNELS, FORWARD_ENTRIES)
        blocks = triton.cdiv(self.group_size, constants["BLOCK_D"])
        if programs := batch * chunks * self.B.size(2) * blocks:
            outputs_kernel[(programs,)](
                self.x, self.x.stride(), self.dt, self.dt.stride(), self.A, self.A.stride(), self.B, self.B.stride(),
                self.C, self.C.stride(), self.D, self.lengths, entering, y, self.x.size(1), chunks, chunk_size,
                self.B.size(2), blocks, REVERSE=self.reverse, UNROLL=UNROLL, **constants,
            )  # fmt: skip
        return y, final

    def added(self, chunk_size: int, grad_y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each chunk adds to the state and the sum of its dt or, given the outputs' gradient, to the state's."""
        backward = grad_y is not None
        x, B = (grad_y, self.C) if backward else (self.x, self.B)
        batch, num_frames, channels = self.x.shape
        chunks = triton.cdiv(num_frames, chunk_size)
        added, total_dt = self.new(batch, chunks, *self.A.shape), self.new(batch, chunks, channels)
        constants = self.constants(FORWARD_CHANNELS, FORWARD_ENTRIES)
        blocks = triton.cdiv(self.group_size, constants["BLOCK_D"])
        if programs := batch * chunks * self.B.size(2) * blocks:
            chunks_kernel[(programs,)](
                x, x.stride(), self.dt, self.dt.stride(), self.A, self.A.stride(), B, B.stride(), self.lengths,
                added, total_dt, num_frames, chunks, chunk_size, self.B.size(2), blocks,
                REVERSE=self.reverse, BACKWARD=backward, UNROLL=UNROLL, **constants,
            )  # fmt: skip
        return added, total_dt

    def carry(self, states: Tensor, total_dt: Tensor, initial: Tensor | None, backward: bool = False) -> Tensor:
        """Over the chunks, in place; returns the state after the last, or backwards the gradient of the first."""
        batch, chunks = states.shape[:2]
        final = self.new(batch, *self.A.shape)
        constants = self.constants(BACKWARD_CHANNELS, BACKWARD_ENTRIES)
        blocks = triton.cdiv(self.group_size, constants["BLOCK_D"])
        if programs := batch * self.B.size(2) * blocks:
            carry_kernel[(programs,)](
                states, total_dt, self.A, self.A.stride(), initial, (0, 0, 0) if initial is None else initial.stride(),
                final, chunks, self.B.size(2), blocks, BACKWARD=backward, **constants,
            )  # fmt: skip
        return final

    def run_backward(self, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of x, dt, A, B, C, D and the initial state."""
        entering, total_dt = self.added(BACKWARD_CHUNK)
        self.carry(entering, total_dt, self.initial_state)
        leaving, _ = self.added(BACKWARD_CHUNK, grad_y)
        grad_initial = self.carry(leaving, total_dt, grad_state, backward=True)
        batch, num_frames, _ = self.x.shape
        chunks, groups = entering.size(1), self.B.size(2)
        constants = self.constants(BACKWARD_CHANNELS, BACKWARD_ENTRIES)
        programs = batch * chunks * groups * triton.cdiv(self.group_size, constants["BLOCK_D"])
        together = blocks_together(self.group_size, constants["BLOCK_D"], programs)
        parts = triton.cdiv(self.group_size, constants["BLOCK_D"] * together)
        dx, ddt = self.x.new_empty(self.x.shape), self.dt.new_empty(self.dt.shape)
        dA, dD = torch.empty_like(entering), torch.empty_like(total_dt)
        dB, dC = (self.new(parts, batch, num_frames, groups, self.A.size(1)) for _ in range(2))
        if programs:
            gradients_kernel[(batch * chunks * groups * parts,)](
                grad_y, grad_y.stride(), self.x, self.x.stride(), self.dt, self.dt.stride(), self.A, self.A.stride(),
                self.B, self.B.stride(), self.C, self.C.stride(), self.D, self.lengths, entering, leaving,
                dx, ddt, dA, dB, dC, dD, num_frames, chunks, groups, parts,
                REVERSE=self.reverse, BLOCKS=together, CHUNK=BACKWARD_CHUNK, **constants,
            )  # fmt: skip
        dB, dC = (part.sum(0).to(v.dtype) for part, v in ((dB, self.B), (dC, self.C)))
        return (
            dx,
            ddt,
            dA.sum((0, 1)).to(self.A.dtype),
            dB,
            dC,
            None if self.D is None else dD.sum((0, 1)).to(self.D.dtype),
            None if self.initial_state is None else grad_initial.to(self.initial_state.dtype),
        )
