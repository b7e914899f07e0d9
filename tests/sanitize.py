"""Run the kernels' tests with the library built for AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/sanitize.py [pytest's arguments]

Builds into a temporary folder and leaves the installed library alone. Needs GCC (its libasan is preloaded). Any error
the sanitizers find ends the run with its report and an exit status that is not zero.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1"


def main(arguments: list[str]) -> int:
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", f"{folder}/temp"]
        required = {"CXX": compiler, "CXXFLAGS": FLAGS, "GRIFFIN_REQUIRE_KERNELS": "1"}
        subprocess.run(build, cwd=ROOT, env=os.environ | required, check=True)
        library = Path(folder, "griffin/ops/cpu/_kernels.so")
        # The C++ library, too: else the sanitizer does not find what PyTorch throws its exceptions with.
        runtime = " ".join(find_library(compiler, name) for name in ("libasan.so", "libstdc++.so.6"))
        # Leaks are not looked for: Python's and PyTorch's own would drown ours, and the kernels allocate nothing.
        sanitizers = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
        names = ("kernels", "linear", "attention", "local_attention", "decode_kernels", "hostile_numbers")
        tests = [f"tests/ops/test_cpu_{name}.py" for name in names]
        tests += ["-k", "not torch"]
        # -s: pytest would swallow the report of a process that is ended.
        options = ["-s", "-p", "no:cacheprovider", f"--kernels={library}"]
        command = [sys.executable, "-m", "pytest", *options, *tests, *arguments]
        return subprocess.run(command, cwd=ROOT, env=os.environ | sanitizers).returncode


def find_library(compiler: str, name: str) -> str:
    command = [*shlex.split(compiler), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
