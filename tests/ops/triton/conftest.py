from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
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
    """Tests here run the ops on CPU tensors through Triton's kernels, interpreted.

    Kernels multiply -inf by 0 where tl.where then takes the other side: on a GPU in silence, in numpy with a warning.
    A NaN that is not hidden so is in the results, which the tests compare.
    """
    with device.pretending_cuda(), np.errstate(invalid="ignore"):
        yield
