from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from griffin.ops import device

if find_spec("triton") is not None:  # the tests say pytest.importorskip
    from tests.ops.triton.bfloat16 import bfloat16_by_value
    from tests.ops.triton.interpreter import numbers_from_arrays_of_one, scan_by_rows

    numbers_from_arrays_of_one()
    scan_by_rows()
    bfloat16_by_value()


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    """Tests here run the ops on CPU tensors through Triton's kernels, interpreted."""
    with device.pretending_cuda():
        yield
