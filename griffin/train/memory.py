"""How the C library keeps what a training step has freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_THRESHOLD = 2**20


def return_freed_memory() -> bool:
    """Give blocks of 1 MiB and more back to the system as soon as they are freed; True where that can be set (glibc).

    By default glibc raises this limit to 32 MB by itself. Activations of all sizes then share a heap whose holes fit
    none of them: a step with recomputed activations needs 1.0 GB at its peak and the process holds 1.9 GB. The price is
    that fresh pages are cleared for every large tensor.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _THRESHOLD))
