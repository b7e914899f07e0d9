"""What this machine has: devices, processors, memory. What asks for more is refused before work begins."""

from __future__ import annotations

import os

import torch

from griffin.errors import GriffinError

_THREADS_PER_CPU = 16  # more only wait for each other, and from some number on the system has none to give


def find_device(name: str) -> str:
    """Return a device's name, or what "auto" stands for here: a GPU where PyTorch sees one, else the CPU.

    Raises:
        GriffinError: there is no such device; the message lists those there are.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if accelerator is None else torch.accelerator.device_count()
    if name == "auto":
        return accelerator.type if accelerator is not None and accelerator.type == "cuda" and count else "cpu"
    there = ["cpu", *(f"{accelerator.type}:{index}" for index in range(count) if accelerator is not None)]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or f"{device.type}:{device.index or 0}" not in (*there, "cpu:0"):
        raise GriffinError(f"device={name!r}: there is no such device here; there are auto, {', '.join(there)}")
    return name


def check_threads(threads: int) -> None:
    """Raise GriffinError if so many threads of the CPU cannot be: far beyond its number the process would end."""
    cpus = os.cpu_count() or 1
    if threads > (most := _THREADS_PER_CPU * cpus):
        raise GriffinError(
            f"threads={threads}: this machine has {cpus} CPUs; give a number up to theirs ({most} at the most), or none"
        )


def check_memory(what: str, num_bytes: int, device: str) -> None:
    """Raise GriffinError if `what` takes more bytes than a device has at all.

    Systems promise memory that they do not have: without this the process would be killed when it comes to use it.
    """
    there = memory_bytes(device)
    if there is not None and num_bytes > there:
        raise GriffinError(f"{what} takes {_size(num_bytes)}, and {device} has {_size(there)}")


def memory_bytes(device: str) -> int | None:
    """All the memory of a device, in use or not; None where it is not known."""
    place = torch.device(device)
    if place.type == "cuda":
        return int(torch.cuda.get_device_properties(place).total_memory)
    if place.type != "cpu" or not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(num_bytes: int) -> str:
    return f"{num_bytes // 10**9:,} GB" if num_bytes >= 10**10 else f"{num_bytes / 1e9:.1f} GB"
