"""Compile what a piece of code launches for an H100, without a GPU: `python -m tests.ops.triton.compiled MODULE`.

MODULE has a function `launch_all()` that calls ops on CPU tensors. Nothing runs: every launch compiles its kernel down
to machine code and is noted. Prints a JSON list, one entry per launch: name, registers, spills and bytes of shared
memory. It is a program of its own because Triton either interprets or compiles, for the whole process.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and bytes of spilled registers, as cuobjdump reports them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": numbers["REG"], "spilled": numbers["STACK"] + numbers["LOCAL"]}  # spills are on the stack


def compile_only() -> list[dict[str, Any]]:
    """Make every launch in this process compile for compute capability 9.0 and not run; give the list of them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class H100:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    driver.set_active(H100())
    run, launches = JITFunction.run, []

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        entry = {"name": self.__name__, "shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}
        launches.append(entry)
        return kernel

    JITFunction.run = note
    return launches


def launched(module: str) -> list[dict[str, Any]]:
    """Run this file for a module in a process of its own, and give its list."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.triton.compiled", module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    from griffin.ops import device

    launches = compile_only()
    with device.pretending_cuda():
        importlib.import_module(sys.argv[1]).launch_all()
    print(json.dumps(launches))


if __name__ == "__main__":
    main()
