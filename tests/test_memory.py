from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from griffin.memory import keep_freed_memory, return_freed_memory, use_large_pages

# A process of its own: what malloc does is set for good. The first block freed makes glibc keep those of its size.
SCRIPT = """
import sys, torch
from pathlib import Path
from griffin.memory import return_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "returned" and not return_freed_memory():
    sys.exit("mallopt cannot be set here")
torch.ones(2**21)
blocks = [torch.ones(2**21) for _ in range(40)]  # 8 MB each
full = resident()
del blocks[::2]
print((full - resident()) / (20 * 2**23))
"""

FAULTS = """
import resource, sys, torch
from griffin.memory import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit("mallopt cannot be set here")
faults = []
for _ in range(12):  # the first few leave splinters between them
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MB
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1] / faults[0])
"""

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")


@glibc
def test_large_blocks_are_used_again() -> None:
    """Pages touched for the first time, in the last round over the first."""
    again = {}
    for mode in ("by default", "kept"):
        done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
        again[mode] = float(done.stdout)
    assert again["by default"] > 0.9  # else the setting has nothing to do
    assert again["kept"] < 0.1


@glibc
def test_freed_blocks_go_back_to_the_system() -> None:
    given_back = {}
    for mode in ("kept", "returned"):
        done = subprocess.run([sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True)
        given_back[mode] = float(done.stdout)
    assert given_back["kept"] < 0.2  # else the setting has nothing to do
    assert given_back["returned"] > 0.9


def test_elsewhere_it_says_that_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not return_freed_memory()
    assert not keep_freed_memory()


def large_kilobytes(address: int) -> int:
    """How much of the mapping that holds an address lies in pages of 2 MB."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) <= address < int(match[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    return 0


@pytest.mark.skipif(platform.system() != "Linux", reason="pages of 2 MB are asked for on Linux only")
@pytest.mark.parametrize("now", [False, True])
def test_large_pages_change_no_number(now: bool) -> None:
    tensors = [torch.empty(3 * 2**21 // 4 + odd) for odd in (0, 5, 77)]
    if now:
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
    if not use_large_pages([*tensors, torch.empty(0)], now=now):
        pytest.skip("this system has no pages of 2 MB")
    if not now:
        for number, tensor in enumerate(tensors):
            tensor.fill_(number)
    assert all((tensor == number).all() for number, tensor in enumerate(tensors))
    print(f"{sum(large_kilobytes(t.data_ptr()) for t in tensors)} kB in large pages")  # noqa: T201 - the system may have none
