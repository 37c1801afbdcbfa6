"""Find the largest batch that fits into memory, and measure the peak memory of a phase.

Failure modes: a batch that ran out of memory counts twice; another error is taken for lack of memory.
"""

import ctypes
import gc
import resource
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h."""
LARGEST_KEPT_MIB = 256
"""Larger blocks are returned at once: there are few, and they would fragment the memory."""


class BatchSizeFinder:
    """Finds the largest batch that fits into memory: halves the size whenever memory runs out, for good.

    A `fixed` size is not halved: the error is raised, and says which setting to change.
    """

    def __init__(self, size: int, *, fixed: bool = False) -> None:
        """Starts at `size`, in samples."""
        self.size = size
        """Samples that go through the model at once."""
        self._fixed = fixed

    def run(self, work: Callable[[int], T]) -> T:
        """Returns `work(size)`. `work` starts again from the beginning after it ran out of memory.

        Raises:
            RuntimeError: whatever `work` failed with, if that was no lack of memory or one sample didn't fit.
        """
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if self.size == 1 or not is_out_of_memory(error):
                    raise
                if self._fixed:
                    error.add_note(f"{self.size} samples at once are too many: give --ppo.micro-batch-size less")
                    raise
                self.size = (self.size + 1) // 2
                warnings.warn(
                    f"out of memory: from now on {self.size} samples go through the model at once", stacklevel=2
                )
            # Outside the handler, where the traceback no longer holds the tensors of the failed attempt.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def keep_freed_memory(mib: int = 1024) -> None:
    """Has glibc keep up to `mib` MiB that tensors on the CPU have freed, for the tensors that follow.

    By default glibc returns the memory of large tensors to the kernel, which clears every page again for the next one.
    Does nothing with another C library.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    # Older versions of glibc accept no more than 32 MiB. A refused value would leave the threshold fixed and small.
    if mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_MIB * 2**20) or mallopt(M_MMAP_THRESHOLD, 32 * 2**20):
        mallopt(M_TRIM_THRESHOLD, mib * 2**20)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


@dataclass
class Peak:
    """The most memory a block had in use, once it has ended."""

    mib: float = 0.0


@contextmanager
def measuring_peak(device: torch.device) -> Iterator[Peak]:
    """On a GPU what torch allocated there in the block; on the CPU the resident size of the process.

    Where the operating system can't forget an earlier peak (all but Linux), the CPU's is that of the process so far.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.mib = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        _forget_peak_resident_size()
        yield peak
        peak.mib = _peak_resident_bytes() / 2**20


def _forget_peak_resident_size() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def _peak_resident_bytes() -> int:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM:")).split()[1]) * 1024
