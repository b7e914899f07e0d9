"""How many requests an engine holds: slots for those that decode, and states for those whose prompts are read."""

from __future__ import annotations

from griffin.infer.batch import place_bytes
from griffin.model import Griffin

SLOTS = 16  # where neither slots nor max_bytes is given
READERS = 16  # prompts read at once


def capacity(model: Griffin, slots: int | None, max_bytes: int | None) -> tuple[int, int]:
    """Give the number of slots, and of prompts read at once.

    Args:
        model: the model.
        slots: the number of slots; None: as many as fit.
        max_bytes: what all states and columns may take together; None: there are `slots`, or SLOTS.

    Raises:
        ValueError: both are given, less than one slot fits, or the model's states have no fixed size.
    """
    if slots is not None and max_bytes is not None:
        raise ValueError(f"slots={slots} and max_bytes={max_bytes:,}; give one of them")
    if max_bytes is None:
        slots = SLOTS if slots is None else slots
        if slots < 1:
            raise ValueError(f"slots={slots} must be at least 1")
        return slots, min(slots, READERS)
    if model.config.window is None and "attention" in model.config.block_types:
        raise ValueError("global attention grows with the text, so max_bytes cannot be kept; give slots")
    fits = max_bytes // total_bytes(model, 1, 1)
    if fits > READERS:
        fits = READERS + (max_bytes - total_bytes(model, READERS, READERS)) // sum(place_bytes(model))
    if fits < 1:
        raise ValueError(
            f"max_bytes={max_bytes:,} is less than one slot and one prompt being read take: "
            f"{total_bytes(model, 1, 1):,}"
        )
    return fits, min(fits, READERS)


def total_bytes(model: Griffin, slots: int, readers: int) -> int:
    """Bytes of all slots, of the states that prompts are read into, and of those that stand together for a pass."""
    state, columns = place_bytes(model)
    return slots * (state + columns) + 2 * readers * state
