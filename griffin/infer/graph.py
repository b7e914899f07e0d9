"""A CUDA graph of a function: launched whole, without the host's part of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Captured(Generic[T]):
    """Call a function once for good, then repeat its kernels on the same memory.

    Args:
        function: reads and writes tensors of one CUDA device and never waits for it. It runs twice before it is
            captured, so that kernels are compiled and libraries have their workspaces: what it changes, it changes
            twice; the capture itself changes nothing.
        device: the device.
    """

    def __init__(self, function: Callable[[], T], device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    function()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._result = function()

    def __call__(self) -> T:
        """Launch it, and give what the function returned: the same tensors each time, overwritten by each call."""
        self._graph.replay()
        return self._result
