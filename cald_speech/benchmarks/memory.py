"""Peak memory of one call: what it needs beyond its inputs.

On a GPU that is the allocator's own count. On a CPU it is resident memory, measured in a process forked for this one
call: every block of 64 KiB or more is mapped and unmapped by itself there, so that nothing freed is counted and nothing
reused is overlooked (scratch kept by an earlier call, say); Linux resets its high-water mark on request. The process
gets most of the free memory and no more, so that a case that is too large is a line in the table, not a dead machine.
"""

import ctypes
import multiprocessing
import re
import resource
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MAPPED_FROM_BYTES = 2**16
# Of the free memory, what a case may take.
SHARE = 0.8


class OutOfMemory(Exception):
    """A case needs more memory than there is."""


class OutOfTime(Exception):
    """A case takes longer than was allowed."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch failed to allocate: its CPU allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def cuda_peak(call: Callable[[], object], device: str) -> int:
    """Bytes that the call allocates at most beyond what is allocated already."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def cpu_peak(
    prepare: Callable[..., tuple[Callable, Callable]], *arguments: object, longest_s: float | None = None
) -> int | None:
    """Bytes that a call holds at most beyond its inputs, or None where the system cannot tell (it is not Linux).

    Arguments
    ---------
    prepare : a function at the top of its module. In the forked process ``prepare(*arguments)`` returns two calls: one
        at a small size, which loads the code and starts the threads, and the one that is measured.
    longest_s : seconds after which the process is ended, its start included; None waits.

    Raises
    ------
    OutOfMemory
        where it needs more than the free memory, with how much that was.
    OutOfTime
        where it was ended.
    """
    if not CLEAR.exists():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__])
    ours, theirs = context.Pipe(duplex=False)
    limit = int(SHARE * free_bytes())
    process = context.Process(target=_measure, args=(theirs, limit, torch.get_num_threads(), prepare, arguments))
    process.start()
    theirs.close()
    if not ours.poll(longest_s):
        process.kill()
        process.join()
        raise OutOfTime(f"one call takes more than {longest_s:g} s")
    try:
        answer = ours.recv()
    except EOFError:  # it died: an allocation outside torch (in the BLAS, say) failed
        answer = None
    process.join()
    if answer is None and process.exitcode == 1:
        raise RuntimeError("the call failed in the process that measures its memory; the traceback stands above")
    if answer is None:
        raise OutOfMemory(f"died with status {process.exitcode}, allowed {limit / 2**30:.1f} GiB")
    if isinstance(answer, str):
        raise OutOfMemory(f"needs more than {limit / 2**30:.1f} GiB: {answer}")
    return answer


def free_bytes() -> int:
    """What Linux could give without swapping."""
    return int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024


def resident(*fields: str) -> int:
    """Bytes, the sum of such fields as VmHWM or RssAnon of this process.

    Example
    -------
    >>> not STATUS.exists() or resident("VmHWM") >= resident("RssAnon") > 0
    True
    """
    text = STATUS.read_text()
    return sum(int(re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)[1]) * 1024 for field in fields)


def _measure(answer: Connection, limit: int, threads: int, prepare: Callable, arguments: Sequence[object]) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_FROM_BYTES)
    libc.mallopt(M_TRIM_THRESHOLD, 0)
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + limit,) * 2)
    try:
        small, call = prepare(*arguments)
        before = resident("RssAnon")  # before the small call, which may keep scratch
        small()
        CLEAR.write_text("5")
        result = call()
        # Pages of code and of files are not the call's.
        answer.send(resident("VmHWM") - resident("RssFile", "RssShmem") - before)
        del result
    except MemoryError as error:
        answer.send(str(error) or "MemoryError")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        answer.send(str(error).splitlines()[0])
