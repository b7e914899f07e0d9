"""What every test runs under."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from griffin import PRESETS, Griffin
from griffin.ops.cpu import library

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is made: Triton interprets or compiles, per process

settings.register_profile(
    "griffin", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("griffin")
torch.set_num_threads(1)  # tensors here are small, and pytest-xdist runs a process per core


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN: whoever reads memory before writing it is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", type=Path, help="another build of griffin/ops/cpu/_kernels.so (tests/sanitize.py)")


@pytest.fixture(autouse=True, scope="session")
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    path = request.config.getoption("--kernels")
    if path is None:
        yield
    else:
        with library.using(path=path):
            yield


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda" if request.node.get_closest_marker("gpu") else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here; run on one with: pytest -m gpu"))


@pytest.fixture
def make_model() -> Callable[..., Griffin]:
    """Make a preset's model, fields replaced, with every parameter moved off its trivial value."""

    def make(preset: str = "griffin-tiny", *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object):  # type: ignore[no-untyped-def]
        generator = torch.Generator().manual_seed(seed)
        model = Griffin(replace(PRESETS[preset], **changes), dtype=dtype, generator=generator)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator).to(dtype)
        return model.eval()

    return make
