"""The launches of one scan, or of two side by side, and of their gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cald_speech.ops.ssd.triton.decays import decays_kernel
from cald_speech.ops.ssd.triton.inputs_gradient import inputs_gradient_kernel
from cald_speech.ops.ssd.triton.maps_gradient import maps_gradient_kernel
from cald_speech.ops.ssd.triton.outputs import outputs_kernel
from cald_speech.ops.ssd.triton.states import carry_kernel, states_kernel
from cald_speech.ops.ssd.triton.tiling import Tiling, head_splits
from cald_speech.ops.triton.tiles import padded


class Inputs(NamedTuple):
    """What one scan reads, as ``ssd`` takes it, but dt (B, T, K, H) and A (K, H) for its K directions."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None


Each = Sequence[Tensor]
"""One tensor for each scan."""


@dataclass(frozen=True)
class Scans:
    """One scan, in one direction or both, or two of equal sizes, the past's and the future's, in the same launches."""

    inputs: Sequence[Inputs]
    lengths: Tensor | None
    past: bool
    future: bool
    tiling: Tiling

    @property
    def x(self) -> Tensor:
        """The first scan's input, for what is the same in all: shapes, dtype and device."""
        return self.inputs[0].x

    @property
    def directions(self) -> int:
        """Of one scan."""
        return (self.past + self.future) // len(self.inputs)

    @property
    def num_chunks(self) -> int:
        return triton.cdiv(self.x.size(1), self.tiling.chunk)

    @property
    def state_dtype(self) -> torch.dtype:
        """States are kept as the next product takes them; float16 would overflow, so float16 inputs keep float32."""
        return torch.bfloat16 if self.x.dtype == torch.bfloat16 else torch.float32

    @property
    def precision(self) -> str:
        """Of float32 products: full for float32 inputs; float16 inputs have no more bits than tf32 anyway."""
        return "ieee" if self.x.dtype == torch.float32 else "tf32"

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Each:
        return [torch.empty(shape, dtype=dtype, device=self.x.device) for _ in self.inputs]

    def new_partial_sums(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(scans, *shape): of all scans in one tensor, so that one launch adds them up too."""
        return torch.empty(len(self.inputs), *shape, dtype=dtype, device=self.x.device)

    def new_states(self) -> Each:
        batch, _, heads, head_dim = self.x.shape
        d_state = self.inputs[0].B.size(3)
        return self.new(batch, heads, self.num_chunks, self.directions, head_dim, d_state, dtype=self.state_dtype)

    def constants(self) -> dict[str, object]:
        heads, head_dim = self.x.shape[2:]
        groups, d_state = self.inputs[0].B.shape[2:]
        return {
            "HEADS": heads,
            "PER_GROUP": heads // groups,
            "P": head_dim,
            "N": d_state,
            "BLOCK_P": padded(head_dim),
            "BLOCK_N": padded(d_state),
            "PRECISION": self.precision,
        } | self.common()

    def common(self) -> dict[str, object]:
        return {
            "PAIR": len(self.inputs) == 2,
            "PAST": int(self.past),
            "FUTURE": int(self.future),
            "CHUNK": self.tiling.chunk,
        }

    def options(self) -> dict[str, int]:
        return {"num_warps": self.tiling.warps, "num_stages": self.tiling.stages}

    def launch(self, kernel, programs: int, tensors, strided, **constants) -> None:
        """``programs`` for each scan. Kernels take a tuple of tensors for each scan, and the strides of some of them.

        tensors, strided : one sequence for each name, of the tensors of every scan.
        """
        strides = tuple(tuple(v.stride() for v in each) for each in zip(*strided, strict=True))
        kernel[programs, len(self.inputs)](
            tuple(zip(*tensors, strict=True)), strides, self.lengths, self.x.size(1), self.num_chunks, **constants
        )

    def decays(self) -> Each:
        """Running sums of log decays, and dt: (B, H, chunks, K, 3, chunk)."""
        batch, _, heads, _ = self.x.shape
        _, dt, A, *_ = zip(*self.inputs, strict=True)
        decays = self.new(batch, heads, self.num_chunks, self.directions, 3, self.tiling.chunk)
        block = min(8, triton.next_power_of_2(heads))
        programs = batch * self.num_chunks * triton.cdiv(heads, block)
        options = {"HEADS": heads, "BLOCK_H": block, "num_warps": 4}
        self.launch(decays_kernel, programs, (dt, A, decays), (dt,), **options, **self.common())
        return decays

    def states(self, decays: Each, initial: Each | None, final: Each | None, dy: Each | None = None) -> Each:
        """The state before each chunk or, given dy, the gradient of the state after it: (B, H, chunks, K, P, N)."""
        batch, _, heads, head_dim = self.x.shape
        x, _, _, B, C, _ = zip(*self.inputs, strict=True)
        x, B = (x, B) if dy is None else (dy, C)
        added, entering = self.new_states(), self.new_states()
        sizes = {"GRADIENT": dy is not None, **self.constants(), **self.options()}
        self.launch(states_kernel, batch * self.num_chunks * heads, (x, B, decays, added), (x, B), **sizes)
        none = [None] * len(self.inputs)
        size = head_dim * B[0].size(3)
        block = min(256, padded(size))
        programs = batch * heads * self.directions * triton.cdiv(size, block)
        carry_kernel[programs, len(self.inputs)](
            tuple(zip(added, decays, initial or none, entering, final or none, strict=True)), self.num_chunks,
            SIZE=size, GRADIENT=dy is not None, STEPS=16, BLOCK=block, STAGES=2,
            PRECISION="ieee" if self.precision == "ieee" else "tf32x3", num_warps=4, **self.common(),
        )  # fmt: skip
        return entering

    def outputs(self, decays: Each, entering: Each) -> Each:
        batch, _, heads, _ = self.x.shape
        x, _, _, B, C, D = zip(*self.inputs, strict=True)
        y = self.new(*self.x.shape, dtype=self.x.dtype)
        tensors = (x, B, C, D, decays, entering, y)
        self.launch(
            outputs_kernel, batch * self.num_chunks * heads, tensors, (x, B, C), **self.constants(), **self.options()
        )
        return y

    def inputs_gradient(self, dy: Each, decays: Each, entering: Each, leaving: Each) -> dict[str, Each]:
        """Gradients of x, dt, A and D."""
        batch, _, heads, _ = self.x.shape
        x, dt, A, B, C, D = zip(*self.inputs, strict=True)
        dx, ddt = self.new(*self.x.shape, dtype=self.x.dtype), self.new(*dt[0].shape)
        dA = self.new_partial_sums(batch, self.num_chunks, self.directions, heads)
        dD = D if D[0] is None else self.new_partial_sums(batch, self.num_chunks, heads)
        tensors = (x, dy, A, B, C, D, decays, entering, leaving, dx, ddt, dA, dD)
        sizes = self.constants() | self.options()
        self.launch(inputs_gradient_kernel, batch * self.num_chunks * heads, tensors, (x, dy, B, C), **sizes)
        return {"x": dx, "dt": ddt, "A": dA.sum((1, 2)), "D": D if D[0] is None else dD.sum((1, 2))}

    def maps_gradient(self, dy: Each, decays: Each, entering: Each, leaving: Each) -> dict[str, Each]:
        """Gradients of B and C."""
        batch, num_frames, heads, _ = self.x.shape
        x, _, _, B, C, _ = zip(*self.inputs, strict=True)
        groups, d_state = B[0].shape[2:]
        block = min(64, padded(d_state))
        programs = batch * self.num_chunks * groups * triton.cdiv(d_state, block)
        splits = head_splits(heads // groups, programs)
        dtype = torch.float32 if splits > 1 else B[0].dtype
        dB, dC = (self.new_partial_sums(batch, num_frames, groups, splits, d_state, dtype=dtype) for _ in "BC")
        tensors = (x, dy, B, C, decays, entering, leaving, dB, dC)
        sizes = {"SPLITS": splits} | self.constants() | {"BLOCK_N": block} | self.options()
        self.launch(maps_gradient_kernel, programs * splits, tensors, (x, dy, B, C), **sizes)
        return {"B": dB.sum(4), "C": dC.sum(4)}
