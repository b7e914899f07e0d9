"""The recurrences' kernels compiled for an H100: nothing spilled, and room for more than one program at a time."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the kernels are in Triton's language: pip install triton")

from tests.ops.triton.compiled import launched


@pytest.mark.slow  # half a minute of compiling
def test_all_kernels_compile_without_spills() -> None:
    launches = launched("tests.ops.triton.scan_launches")
    names = {"_forward_kernel", "_summary_kernel", "_reverse_summary_kernel", "_backward_kernel"}
    assert {launch["name"] for launch in launches} == names
    for launch in launches:
        assert launch["spilled"] == 0, launch
        assert launch["shared"] < 100_000, launch
