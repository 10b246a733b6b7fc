"""The launches of one scan and of its gradient, and the fixed table of their configurations."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from cald_speech.ops.backends import interpreted
from cald_speech.ops.ssd.triton_kernels.decays import decays_kernel
from cald_speech.ops.ssd.triton_kernels.gradients import inputs_gradient_kernel, maps_gradient_kernel
from cald_speech.ops.ssd.triton_kernels.outputs import outputs_kernel
from cald_speech.ops.ssd.triton_kernels.states import carry_kernel, states_kernel

# Programs that fill a large GPU a few times over: below this the backward pass splits the heads of a group.
ENOUGH_PROGRAMS = 1024


@dataclass(frozen=True)
class Tiling:
    """How one pass is cut: frames in a chunk, and warps and pipeline stages of its kernels."""

    chunk: int
    warps: int
    stages: int


def padded(size: int) -> int:
    """The block that holds a head or state of this size: a power of two, and at least what a matrix product needs."""
    return max(16, triton.next_power_of_2(size))


def tiling(dtype: torch.dtype, d_state: int, gradient: bool) -> Tiling:
    """The table, for heads of at most ``largest_part``: picked by ``compile_check`` so that registers hardly spill.

    No kernel needs more than 96 KiB of shared memory, which all GPUs since Ampere have. The forward pass prefers long
    chunks, since the states that it writes and reads back shrink with them; the backward pass has no registers for
    them, and before Hopper, whose products take their operands from shared memory, still fewer. Full float32 products
    run without tensor cores and hold their operands in registers.
    """
    small = d_state <= 64
    table = {
        # dtype: forward pass, backward pass
        torch.bfloat16: (Tiling(128, 8, 2), Tiling(64, 4, 2)),
        torch.float16: (Tiling(64, 4, 2), Tiling(64, 4, 2) if small else Tiling(32, 8, 2)),
        torch.float32: (Tiling(32, 8, 2), Tiling(32, 8, 2)) if small else (Tiling(16, 8, 2), Tiling(16, 8, 2)),
    }
    if not interpreted() and triton.runtime.driver.active.get_current_target().arch < 90:
        table |= {
            torch.bfloat16: (Tiling(64, 8, 2), Tiling(32, 4, 2)),
            torch.float16: (Tiling(32, 8, 2), Tiling(32, 8, 2)),
        }
    return table[dtype][gradient]


def largest_part(dtype: torch.dtype) -> int:
    """The largest piece of a head that one program takes, where the head splits evenly."""
    return 32 if dtype == torch.float32 else 64


@dataclass(frozen=True)
class Scan:
    """The inputs of one scan: dt (B, T, K, H) and A (K, H) for K = past + future directions."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    lengths: Tensor | None
    past: bool
    future: bool
    tiling: Tiling

    @property
    def directions(self) -> int:
        return self.past + self.future

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

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def new_states(self) -> Tensor:
        batch, _, heads, head_dim = self.x.shape
        return self.new(
            batch, heads, self.num_chunks, self.directions, head_dim, self.B.size(3), dtype=self.state_dtype
        )

    def constants(self) -> dict[str, object]:
        heads, head_dim = self.x.shape[2:]
        groups, d_state = self.B.shape[2:]
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
        return {"PAST": int(self.past), "FUTURE": int(self.future), "CHUNK": self.tiling.chunk}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.tiling.warps, "num_stages": self.tiling.stages}

    def decays(self) -> Tensor:
        """Running sums of log decays, and dt: (B, H, chunks, K, 3, chunk)."""
        batch, num_frames, heads, _ = self.x.shape
        decays = self.new(batch, heads, self.num_chunks, self.directions, 3, self.tiling.chunk)
        block = min(8, triton.next_power_of_2(heads))
        decays_kernel[(batch * self.num_chunks * triton.cdiv(heads, block),)](
            self.dt, self.dt.stride(), self.A, self.lengths, decays, num_frames, self.num_chunks,
            HEADS=heads, BLOCK_H=block, num_warps=4, **self.common(),
        )  # fmt: skip
        return decays

    def states(self, decays: Tensor, initial: Tensor | None, final: Tensor | None, dy: Tensor | None = None) -> Tensor:
        """The state before each chunk or, given dy, the gradient of the state after it: (B, H, chunks, K, P, N)."""
        batch, num_frames, heads, head_dim = self.x.shape
        x, B = (self.x, self.B) if dy is None else (dy, self.C)
        added, entering = self.new_states(), self.new_states()
        states_kernel[(batch * self.num_chunks * heads,)](
            x, x.stride(), B, B.stride(), decays, self.lengths, added, num_frames, self.num_chunks,
            GRADIENT=dy is not None, **self.constants(), **self.options(),
        )  # fmt: skip
        size = head_dim * self.B.size(3)
        block = min(256, padded(size))
        carry_kernel[(batch * heads * self.directions * triton.cdiv(size, block),)](
            added, decays, initial, entering, final, self.num_chunks,
            SIZE=size, GRADIENT=dy is not None, STEPS=16, BLOCK=block, STAGES=2,
            PRECISION="ieee" if self.precision == "ieee" else "tf32x3", num_warps=4, **self.common(),
        )  # fmt: skip
        return entering

    def outputs(self, decays: Tensor, entering: Tensor) -> Tensor:
        batch, num_frames, heads, _ = self.x.shape
        y = self.new(*self.x.shape, dtype=self.x.dtype)
        outputs_kernel[(batch * self.num_chunks * heads,)](
            self.x, self.x.stride(), self.B, self.B.stride(), self.C, self.C.stride(), self.D, decays, entering,
            self.lengths, y, num_frames, self.num_chunks, **self.constants(), **self.options(),
        )  # fmt: skip
        return y

    def inputs_gradient(self, dy: Tensor, decays: Tensor, entering: Tensor, leaving: Tensor) -> dict[str, Tensor]:
        """Gradients of x, dt, A and D."""
        batch, num_frames, heads, _ = self.x.shape
        dx, ddt = self.new(*self.x.shape, dtype=self.x.dtype), self.new(*self.dt.shape)
        dA = self.new(batch, self.num_chunks, self.directions, heads)
        dD = None if self.D is None else self.new(batch, self.num_chunks, heads)
        inputs_gradient_kernel[(batch * self.num_chunks * heads,)](
            self.x, self.x.stride(), dy, dy.stride(), self.A, self.B, self.B.stride(), self.C, self.C.stride(), self.D,
            decays, entering, leaving, self.lengths, dx, ddt, dA, dD, num_frames, self.num_chunks,
            **self.constants(), **self.options(),
        )  # fmt: skip
        return {"x": dx, "dt": ddt, "A": dA.sum((0, 1)), "D": None if dD is None else dD.sum((0, 1))}

    def maps_gradient(self, dy: Tensor, decays: Tensor, entering: Tensor, leaving: Tensor) -> dict[str, Tensor]:
        """Gradients of B and C."""
        batch, num_frames, heads, _ = self.x.shape
        groups, d_state = self.B.shape[2:]
        block = min(64, padded(d_state))
        programs = batch * self.num_chunks * groups * triton.cdiv(d_state, block)
        splits = head_splits(heads // groups, programs)
        dtype = torch.float32 if splits > 1 else self.B.dtype
        dB, dC = (self.new(batch, num_frames, groups, splits, d_state, dtype=dtype) for _ in "BC")
        maps_gradient_kernel[(programs * splits,)](
            self.x, self.x.stride(), dy, dy.stride(), self.B, self.B.stride(), self.C, self.C.stride(),
            decays, entering, leaving, self.lengths, dB, dC, num_frames, self.num_chunks,
            SPLITS=splits, **self.constants() | {"BLOCK_N": block}, **self.options(),
        )  # fmt: skip
        return {"B": dB.sum(3), "C": dC.sum(3)}


def head_splits(heads: int, programs: int) -> int:
    """Into how many equal parts a group's heads are split, so that there are enough programs; from shapes alone."""
    splits = 1
    while heads % (2 * splits) == 0 and programs * splits < ENOUGH_PROGRAMS:
        splits *= 2
    return splits
