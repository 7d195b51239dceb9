"""Memory of the C library, for training on a CPU."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def keep_freed_memory() -> bool:
    """Have glibc keep what a training step frees for the next one, up to 1 GiB; says whether that was possible.

    By default it hands large blocks back to the system, which then clears every page anew: on two AMD EPYC cores that
    made the host's step on `lookup` at batch 128 1.1 to 1.4 times as long. Other C libraries are left alone.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # 32 MiB is the largest threshold for mappings of their own that glibc takes.
    return bool(mallopt(M_TRIM_THRESHOLD, 1 << 30)) and bool(mallopt(M_MMAP_THRESHOLD, 1 << 25))
