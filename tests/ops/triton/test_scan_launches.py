"""What the interpreter cannot show: that the combinations are associative, and what a compiler makes of the kernels."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton", reason="the kernels are in Triton's language: pip install triton")

from griffin.ops.triton import tiles
from tests.ops.triton.compiled import launched


@pytest.mark.parametrize(("combine", "width"), [("after", 2), ("after_and_before", 4), ("after_its_decay", 3)])
def test_any_order_of_combining_gives_the_same(combine: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter combines row after row; a GPU combines in a tree."""
    monkeypatch.setattr(tiles, "decayed", lambda a, h: 0.0 if a == 0 else a * h)  # the same, of numbers
    function = getattr(tiles, combine).fn
    draw = random.Random(0)
    for _ in range(10):
        x, y, z = ([draw.random() for _ in range(width)] for _ in range(3))
        left = function(*function(*x, *y), *z)
        assert left == pytest.approx(function(*x, *function(*y, *z)), rel=1e-12)


@pytest.mark.slow  # half a minute of compiling
def test_all_kernels_compile_without_spills() -> None:
    launches = launched("tests.ops.triton.scan_launches")
    names = {"_forward_kernel", "_summary_kernel", "_reverse_summary_kernel", "_backward_kernel"}
    assert {launch["name"] for launch in launches} == names
    for launch in launches:
        assert launch["spilled"] == 0, launch
        assert launch["shared"] < 100_000, launch
