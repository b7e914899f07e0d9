from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from griffin.infer.stop import StopGate

words = st.text("ab.", min_size=1, max_size=4)


def ends(text: str, stops: list[str]) -> str | None:
    """The definition: read letter by letter until the text read ends with a stop string; take the longest off."""
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))]
    return None


@given(stops=st.lists(words, max_size=3), pieces=st.lists(st.text("ab.", max_size=5), max_size=8))
def test_pieces_change_nothing(stops: list[str], pieces: list[str]) -> None:
    gate = StopGate(stops)
    passed = [gate.push(piece) for piece in pieces]
    text, cut = "".join(pieces), ends("".join(pieces), stops)
    assert gate.stopped == (cut is not None)
    assert "".join(passed) + gate.finish() == (text if cut is None else cut)
    # Nothing is held back without need: what waits is the beginning of some stop string.
    if cut is None:
        held = text[len("".join(passed)) :]
        assert not held or any(stop.startswith(held) for stop in stops)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopGate(["a", ""])
