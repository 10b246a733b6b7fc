"""The launches of one scan of the gated delta rule and of its gradient, and their table of configurations."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cald_speech.ops.gated_delta.triton.chunks import chunks_kernel
from cald_speech.ops.gated_delta.triton.gradients import keys_gradient_kernel, pairs_gradient_kernel
from cald_speech.ops.gated_delta.triton.outputs import outputs_kernel
from cald_speech.ops.gated_delta.triton.states import states_gradient_kernel, states_kernel
from cald_speech.ops.triton.tiles import padded


@dataclass(frozen=True)
class Tiling:
    """How a scan is cut: frames in a chunk, channels of values and of keys that a program takes at a time, and warps.

    Programs that carry a state, or put out what it answers, hold all channels of the keys.
    """

    chunk: int
    values: int
    keys: int
    warps: int


def tiling(dtype: torch.dtype, d_state: int, channels: bool) -> Tiling:
    """The table, picked by ``compile_check`` so that registers hardly spill; ``channels`` for decays of channels.

    No kernel needs more than 96 KiB of shared memory, which all GPUs since Ampere have.
    """
    small = d_state <= 64
    if dtype == torch.float32:  # full products run without tensor cores and hold their operands in registers
        return Tiling(16 if channels else 32, 32, 32, 8) if small else Tiling(16, 16, 32, 8)
    return Tiling(32, 32, 16 if channels else 32, 4 if small else 8)


class Chunks(NamedTuple):
    """What each chunk is, apart from the state that enters it: ``chunks_kernel`` says what is what."""

    queries: Tensor
    keys: Tensor
    reads: Tensor
    offered: Tensor
    matrix: Tensor
    total: Tensor
    inverses: Tensor | None


class Carried(NamedTuple):
    """The state before each chunk, (B, H, chunks, P, N), and what its frames write, (B, H, chunks, CHUNK, P); or
    gradients: of the state after each chunk, and of what its frames write."""

    states: Tensor
    writes: Tensor


@dataclass(frozen=True)
class Scan:
    """The inputs of one scan: q, k, v in one dtype, beta and g in float32, each with a last axis of stride 1."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    g: Tensor
    lengths: Tensor | None
    reverse: bool

    @property
    def tiling(self) -> Tiling:
        return tiling(self.v.dtype, self.k.size(3), self.channels)

    @property
    def num_chunks(self) -> int:
        return triton.cdiv(self.v.size(1), self.tiling.chunk)

    @property
    def channels(self) -> bool:
        """Whether each channel of the keys has its decay."""
        return self.g.dim() == 4

    @property
    def value_blocks(self) -> int:
        return triton.cdiv(self.v.size(3), self.constants["BLOCK_P"])

    @property
    def key_blocks(self) -> int:
        return triton.cdiv(self.k.size(3), self.constants["BLOCK_N"])

    @property
    def constants(self) -> dict[str, object]:
        """Of all kernels together."""
        heads, head_dim = self.v.shape[2:]
        groups, d_state = self.k.shape[2:]
        full = self.v.dtype == torch.float32
        return {
            "REVERSE": self.reverse,
            "CHANNELS": self.channels,
            "HEADS": heads,
            "PER_GROUP": heads // groups,
            "P": head_dim,
            "N": d_state,
            "CHUNK": self.tiling.chunk,
            "LEVELS": self.tiling.chunk.bit_length() - 1,
            "BLOCK_P": min(self.tiling.values, padded(head_dim)),
            "BLOCK_N": min(self.tiling.keys, padded(d_state)),
            "ALL_N": padded(d_state),
            # Float16 inputs have no more bits than tf32 anyway. Sums of log decays and inverses keep all of float32's.
            "PRECISION": "ieee" if full else "tf32",
            "SUMS": "ieee" if full else "tf32x3",
        }

    def launch(self, kernel, blocks: int, tensors, strided=(), *, carries: bool = False) -> None:
        """``blocks`` programs for every head of every sequence, and for each chunk unless a program carries a state.

        A kernel takes tensors, the strides of those whose frames it reads, where the frames are, and its constants.
        """
        batch, num_frames, heads, _ = self.v.shape
        programs = batch * heads * blocks * (1 if carries else self.num_chunks)
        constants = {name: v for name, v in self.constants.items() if name in kernel.arg_names}
        kernel[(programs,)](
            *tensors, *(v.stride() for v in strided), self.lengths, num_frames, self.num_chunks,
            num_warps=self.tiling.warps, num_stages=2, **constants,
        )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)

    def new_by_chunk(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In the dtype in which the next product takes it, unless said; float16 would overflow."""
        work = torch.bfloat16 if self.v.dtype == torch.bfloat16 else torch.float32
        return self.new(self.v.size(0), self.v.size(2), self.num_chunks, *shape, dtype=dtype or work)

    def chunks(self, gradient: bool) -> Chunks:
        head_dim, d_state, chunk = self.v.size(3), self.k.size(3), self.tiling.chunk
        queries, keys, reads = (self.new_by_chunk(chunk, d_state) for _ in range(3))
        offered, matrix = self.new_by_chunk(chunk, head_dim), self.new_by_chunk(chunk, chunk)
        total = self.new_by_chunk(d_state, dtype=torch.float32)
        inverses = self.new_by_chunk(chunk, chunk, dtype=torch.float32) if gradient else None
        made = Chunks(queries, keys, reads, offered, matrix, total, inverses)
        inputs = self.q, self.k, self.v, self.beta, self.g
        self.launch(chunks_kernel, 1, (*inputs, *made), inputs)
        return made

    def new_carried(self, made: Chunks) -> Carried:
        return Carried(self.new_by_chunk(self.v.size(3), self.k.size(3)), torch.empty_like(made.offered))

    def states(self, made: Chunks, initial: Tensor | None, final: Tensor | None) -> Carried:
        carried = self.new_carried(made)
        tensors = made.keys, made.reads, made.offered, made.total, initial, *carried, final
        self.launch(states_kernel, self.value_blocks, tensors, carries=True)
        return carried

    def outputs(self, made: Chunks, entering: Carried) -> Tensor:
        y = self.new(*self.v.shape, dtype=self.v.dtype)
        self.launch(outputs_kernel, self.value_blocks, (made.queries, made.matrix, *entering, y))
        return y

    def states_gradient(self, made: Chunks, dy: Tensor, dfinal: Tensor | None, dinitial: Tensor | None) -> Carried:
        carried = self.new_carried(made)
        tensors = dy, made.queries, made.keys, made.reads, made.matrix, made.total, dfinal, *carried, dinitial
        self.launch(states_gradient_kernel, self.value_blocks, tensors, (dy,), carries=True)
        return carried

    def gradients(self, inverses: Tensor, dy: Tensor, entering: Carried, leaving: Carried) -> list[Tensor]:
        """Of q, k, v, beta and g."""
        errors, dlower, dmatrix = (torch.empty_like(v) for v in (leaving.writes, inverses, inverses))
        dv, dbeta = self.new(*self.v.shape, dtype=self.v.dtype), self.new(*self.beta.shape)
        inputs = self.v, self.beta, self.g, dy
        tensors = *inputs, entering.writes, leaving.writes, inverses, errors, dlower, dmatrix, dv, dbeta
        self.launch(pairs_gradient_kernel, 1, tensors, inputs)
        batch, num_frames, heads, _ = self.v.shape
        groups, d_state = self.k.shape[2:]
        dtype = self.k.dtype if groups == heads else torch.float32
        dq, dk = (self.new(batch, num_frames, heads, d_state, dtype=dtype) for _ in range(2))
        dbeta_parts = self.new(batch, num_frames, heads, self.key_blocks)
        dg = self.new(*self.g.shape) if self.channels else torch.empty_like(dbeta_parts)
        inputs = self.q, self.k, self.beta, self.g, dy
        tensors = *inputs, entering.writes, errors, dlower, dmatrix, entering.states, leaving.states
        self.launch(keys_gradient_kernel, self.key_blocks, (*tensors, dq, dk, dbeta_parts, dg), inputs)
        if groups < heads:
            dq, dk = (v.unflatten(2, (groups, -1)).sum(3).to(self.k.dtype) for v in (dq, dk))
        return [dq, dk, dv, dbeta + dbeta_parts.sum(3), dg if self.channels else dg.sum(3)]
