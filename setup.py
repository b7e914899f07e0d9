"""Build griffin/ops/cpu/_kernels.so, plain C functions for ctypes, with the system's C++ compiler.

pyproject.toml says everything else. `pip install .` and `pip install -e .` build it; after a change to a C++ file:

    python setup.py build_ext --inplace

$CXX chooses the compiler (else c++, g++ or clang++), $CXXFLAGS adds to its options (sanitizers). Without a compiler,
or when it fails, one line is printed and the package installs without the library: the pure-torch operations serve.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NAME = "griffin.ops.cpu._kernels"
SOURCES = Path("griffin/ops/cpu/csrc")
# -ffp-contract=off: the same operations on every compiler. Never -ffast-math: it deletes the rounding in exp.
OPTIONS = ["-std=c++17", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-fno-exceptions", "-fno-rtti"]
OPTIONS += ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
PORTABLE = {"portable": []}
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# Still eight fp32 lanes: what it adds is twice the registers and sums of 16-bit products in one instruction.
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "vl", "bw", "dq", "vnni")), "-mprefer-vector-width=256"]
X86 = PORTABLE | {"avx2": AVX2, "avx512": AVX512}
# Products of bf16 in one instruction: what multiplies matrices is compiled for it, all else serves as for avx512.
X86_BF16 = {"avx512bf16": [*AVX512, "-mavx512bf16"]}
PRODUCTS = ("linear",)


class BuildKernels(build_ext):
    """Compile each source once per instruction set and link them all into one library."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python version in it: it is not a Python module

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            build(find_compiler(), Path(self.build_temp), target)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("GRIFFIN_REQUIRE_KERNELS"):  # a release's wheel must not lack them
                raise
            target.unlink(missing_ok=True)
            print(f"griffin: no CPU kernels ({explain(error)}); pure-torch operations will serve")


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 on a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def explain(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return str(error)
    return f"{error.cmd[0]} failed: {((error.stderr or '').strip().splitlines() or ['without a word'])[0]}"


def find_compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    for name in [chosen[0]] if chosen else ["c++", "g++", "clang++"]:
        if shutil.which(name):
            return chosen or [name]
    raise FileNotFoundError(f"{chosen[0]} (from $CXX) not found" if chosen else "no C++ compiler found")


def build(compiler: list[str], folder: Path, target: Path) -> None:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    flags = shlex.split(os.environ.get("CXXFLAGS", ""))
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[Path, list[str]]] = []
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.stem == "abi":
            define = ["-DGRIFFIN_IS_X86"] if is_x86 else []
            jobs.append((folder / "abi.o", [*define, str(source)]))
            continue
        sets = X86 | (X86_BF16 if source.stem in PRODUCTS else {}) if is_x86 else PORTABLE
        for isa, options in sets.items():
            jobs.append((folder / f"{source.stem}_{isa}.o", [*options, f"-DGRIFFIN_ISA={isa}", str(source)]))

    def compile_one(job: tuple[Path, list[str]]) -> None:
        output, options = job
        run([*compiler, *OPTIONS, *flags, *options, "-c", "-o", str(output)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    as_needed = [] if sys.platform == "darwin" else ["-Wl,--as-needed"]
    partial = target.with_suffix(".partial")  # a process that has the old library mapped keeps it
    run([*compiler, "-shared", *flags, "-o", str(partial), *(str(output) for output, _ in jobs), *as_needed])
    partial.replace(target)


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr, end="", file=sys.stderr)
    done.check_returncode()


setup(
    ext_modules=[Extension(NAME, sorted(str(path) for path in SOURCES.glob("*.cpp")), optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
