from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from griffin.ops.triton import serve

if find_spec("triton") is not None:  # the tests say pytest.importorskip
    from tests.ops.triton.interpreter import scan_by_rows

    scan_by_rows()


@pytest.fixture(autouse=True)
def _by_triton() -> Iterator[None]:
    """Tests here run the ops on CPU tensors through Triton's kernels, interpreted."""
    with serve.serving_cpu():
        yield
