"""How the C library keeps what a training step, or a chunk of a prompt, has freed. Of the process: commands set it."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # of glibc's malloc.h
_THRESHOLD = 2**20


def keep_freed_memory() -> bool:
    """Let every step reuse the memory of the last; True where that can be set (glibc).

    By default glibc maps blocks above 32 MB anew each time, and the system clears their pages: at 8,192 tokens a row
    that is a third of a training step. Of smaller ones it gives the heap's end back: a fifteenth of the time to read a
    prompt. All blocks come from one heap instead, which grows by 64 MB and is not given back.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26})


def return_freed_memory() -> bool:
    """Give blocks of 1 MiB and more back to the system as soon as they are freed; True where that can be set (glibc).

    By default glibc raises this limit to 32 MB by itself. Activations of all sizes then share a heap whose holes fit
    none of them: a step with recomputed activations needs 1.0 GB at its peak and the process holds 1.9 GB. The price is
    that fresh pages are cleared for every large tensor.
    """
    return _set({_M_MMAP_MAX: 2**16, _M_MMAP_THRESHOLD: _THRESHOLD, _M_TRIM_THRESHOLD: _THRESHOLD, _M_TOP_PAD: 2**17})


def _set(options: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(mallopt(option, value) for option, value in options.items())
