"""What a machine has not is refused before work begins."""

from __future__ import annotations

import os

import pytest
import torch

from griffin.errors import GriffinError
from griffin.machine import check_memory, check_threads, find_device, memory_bytes


@pytest.mark.parametrize("name", ["mps", "xla", "vulkan", "meta", "toaster", "cuda:77", "", "cpu:", "\x1b[31m"])
def test_devices_that_are_not_here_are_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(GriffinError, match=r"there is no such device here; there are auto, cpu") as caught:
        find_device(name)
    assert repr(name) in str(caught.value)


def test_devices_that_are_here() -> None:
    assert find_device("cpu") == "cpu"
    assert find_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


def test_threads_are_bounded_by_the_processors() -> None:
    check_threads(os.cpu_count() or 1)
    with pytest.raises(GriffinError, match=rf"threads=1000000: this machine has {os.cpu_count()} CPUs"):
        check_threads(1_000_000)


def test_memory_is_what_the_system_has() -> None:
    there = memory_bytes("cpu")
    if there is None:
        pytest.skip("this system does not say how much memory it has")
    assert there >= 2**28
    check_memory("a model", there, "cpu")
    with pytest.raises(GriffinError, match=r"a model takes 30,400,000 GB, and cpu has \d+(\.\d)? GB"):
        check_memory("a model", 304 * 10**14, "cpu")
