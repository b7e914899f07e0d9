from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from griffin.ops import device

if find_spec("triton") is not None:  # the tests say pytest.importorskip
    from tests.ops.triton.bfloat16 import bfloat16_by_value
    from tests.ops.triton.interpreter import scan_by_rows

    scan_by_rows()
    bfloat16_by_value()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter's own `range` warns."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"))


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    """Tests here run the ops on CPU tensors through Triton's kernels, interpreted."""
    with device.pretending_cuda():
        yield
