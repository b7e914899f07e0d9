"""What is asked of the system about memory: to keep what was freed (commands ask, for the process), and large pages."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # of glibc's malloc.h
_THRESHOLD = 2**20
_LARGE, _MADV_HUGEPAGE, _MADV_COLLAPSE = 2**21, 14, 25  # of Linux's mman.h
_PAGE_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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


def use_large_pages(tensors: Iterable[Tensor], now: bool = False) -> bool:
    """Ask for pages of 2 MB under tensors on the CPU; True where the system has them (Linux).

    A core asks memory for what comes next by itself, but only within a page: of weights in pages of 4 kB that are read
    once, from end to end, one core gets 20 GB/s where it gets 28 (Zen 4). Ask before anything is written, or say `now`:
    what lies there is then moved, and the pages around it with it.
    """
    if sys.platform != "linux" or not _PAGE_SETTING.exists() or "[never]" in _PAGE_SETTING.read_text():
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    spans: list[list[int]] = []
    for begin, end in sorted(
        (t.data_ptr() // _LARGE * _LARGE, -(-(t.data_ptr() + t.nbytes) // _LARGE) * _LARGE)
        for t in tensors
        if t.device.type == "cpu" and t.nbytes
    ):
        if spans and begin <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([begin, end])
    for begin, end in spans:
        # Neighbours within a large page that are not mapped make it fail for those (ENOMEM), and do no harm.
        madvise(begin, end - begin, _MADV_HUGEPAGE)
        if now:
            for page in range(begin, end, _LARGE):
                madvise(page, _LARGE, _MADV_COLLAPSE)
    return True


def _set(options: dict[int, int]) -> bool:
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return all(mallopt(option, value) for option, value in options.items())
