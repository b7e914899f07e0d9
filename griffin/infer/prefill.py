"""Read prompts of any length, chunk by chunk, into a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import torch
from torch import Tensor

from griffin.model import Griffin
from griffin.state import State

Progress = Callable[[int, int], None]  # (tokens read, tokens in all)


@torch.no_grad()
def prefill(
    model: Griffin,
    state: State,
    prompts: Sequence[Sequence[int]],
    *,
    chunk: int = 512,
    progress: Progress | None = None,
) -> Tensor:
    """Read the rows' tokens; the state is advanced in place.

    Memory is that of one chunk, whatever the lengths. No row is padded: a long prompt beside short ones costs what it
    costs alone.

    Args:
        model: the model.
        state: B rows.
        prompts: B sequences of at least one token each.
        chunk: the most tokens of a row read at once.
        progress: called before the first chunk and after each, with tokens read and in all. It may raise to stop.

    Returns:
        (B, D) what the model made of each row's last token: the input of `model.logits`.

    Raises:
        ValueError: chunk < 1, a prompt is empty, or there are not as many prompts as rows.
    """
    if chunk < 1:
        raise ValueError(f"prefill_chunk={chunk} must be at least 1")
    if len(prompts) != state.batch_size or not all(map(len, prompts)):
        raise ValueError(f"prompts of {[len(p) for p in prompts]} tokens for {state.batch_size} rows; each needs one")
    last = torch.zeros(len(prompts), model.config.width, dtype=model.activation_dtype, device=state.position.device)
    total = sum(map(len, prompts))
    if progress is not None:
        progress(0, total)
    for start in range(0, max(map(len, prompts), default=0), chunk):
        pieces = [prompt[start : start + chunk] for prompt in prompts]
        for row, hidden in enumerate(_read(model, state, pieces)):
            if start < len(prompts[row]) <= start + chunk:
                last[row] = hidden[-1]
        if progress is not None:
            progress(sum(min(start + chunk, len(prompt)) for prompt in prompts), total)
    return last


@torch.no_grad()
def read_chunk(model: Griffin, states: Sequence[State], pieces: Sequence[Sequence[int]]) -> list[Tensor]:
    """Read one piece of each row in one pass; the states, one row each, are advanced in place.

    They lie one after another in the pass: short ones share its products, and none is padded.

    Returns:
        For each piece, (T, D) what the model made of its T tokens: a view of the chunk.
    """
    if len(states) == 1:
        return _read(model, states[0], pieces)
    together = _together(model, states)
    found = _read(model, together, pieces)
    joined = together.tensors()
    for row, (state, piece) in enumerate(zip(states, pieces, strict=True)):
        longest = state.longest + len(piece)
        if state.growing():
            state.set_rows_([0], together.rows([row]))
        else:
            for name, tensor in state.tensors().items():
                tensor.copy_(joined[name][row : row + 1])
        state.longest = longest  # not that of its neighbours
    return found


def _together(model: Griffin, states: Sequence[State]) -> State:
    """Copy states of one row each into one of as many rows."""
    if states[0].growing():  # to different lengths
        together = model.new_state(len(states))
        for row, state in enumerate(states):
            together.set_rows_([row], state)
        return together
    together, each = states[0].rows([0] * len(states)), [state.tensors() for state in states]
    for name, tensor in together.tensors().items():
        torch.cat([tensors[name] for tensors in each], out=tensor)
    together.longest = max(state.longest for state in states)
    return together


def _read(model: Griffin, state: State, pieces: Sequence[Sequence[int]]) -> list[Tensor]:
    """Read a piece of each row of one state in one pass: of each, (T, D). A row whose piece is empty stays as it is."""
    counts = [len(piece) for piece in pieces]
    tokens = torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.int64, device=state.position.device)
    if min(counts) == max(counts):  # nothing is ragged
        return list(model(tokens.view(len(counts), -1), state))
    offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int64, device="cpu")
    return list(model(tokens[None], state, offsets=offsets)[0].split(counts))
