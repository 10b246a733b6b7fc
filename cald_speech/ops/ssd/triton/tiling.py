"""How the SSD kernels are cut: the blocks that hold a head and a state, and the fixed table of configurations."""

from dataclasses import dataclass

import torch
import triton

from cald_speech.ops.backends import interpreted

# Programs that fill a large GPU a few times over: below this the backward pass splits the heads of a group.
ENOUGH_PROGRAMS = 1024


@dataclass(frozen=True)
class Tiling:
    """How one pass is cut: frames in a chunk, and warps and pipeline stages of its kernels."""

    chunk: int
    warps: int
    stages: int


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


def head_splits(heads: int, programs: int) -> int:
    """Into how many equal parts a group's heads are split, so that there are enough programs; from shapes alone."""
    splits = 1
    while heads % (2 * splits) == 0 and programs * splits < ENOUGH_PROGRAMS:
        splits *= 2
    return splits
