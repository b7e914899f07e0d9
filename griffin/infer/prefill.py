"""Read prompts of any length, chunk by chunk, into a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    Memory is that of one chunk, whatever the lengths. A row that has been read leaves the batch, so that a long prompt
    beside short ones costs what it costs alone.

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
    last: list[Tensor | None] = [None] * len(prompts)
    rows, part, start = list(range(len(prompts))), state, 0  # `part` holds `rows`; all have read `start` tokens
    total = sum(map(len, prompts))
    if progress is not None:
        progress(0, total)
    while rows:
        pieces = [prompts[row][start : start + chunk] for row in rows]
        hidden = _read(model, part, pieces)
        start += chunk
        for index, row in enumerate(rows):
            if start >= len(prompts[row]):
                last[row] = hidden[index, len(pieces[index]) - 1].clone()  # not a view: the chunk must not stay
        going = [index for index, row in enumerate(rows) if start < len(prompts[row])]
        if len(going) < len(rows):
            if part is not state:
                state.set_rows_(rows, part)
            part = part.rows(going) if going else part
            rows = [rows[index] for index in going]
        if progress is not None:
            progress(sum(min(start, len(prompt)) for prompt in prompts), total)
    found = [hidden for hidden in last if hidden is not None]
    return torch.stack(found) if found else model.embedding.new_zeros(0, model.config.width)


@torch.no_grad()
def read_chunk(model: Griffin, states: Sequence[State], pieces: Sequence[Sequence[int]]) -> list[Tensor]:
    """Read one piece of each row in one pass; the states, one row each, are advanced in place.

    Rows that are shorter than the longest are padded, which costs time and changes nothing.

    Returns:
        For each piece, (T, D) what the model made of its T tokens: a view of the chunk.
    """
    if len(states) == 1:
        return [_read(model, states[0], pieces)[0]]
    together = _together(model, states)
    hidden = _read(model, together, pieces)
    joined = together.tensors()
    for row, (state, piece) in enumerate(zip(states, pieces, strict=True)):
        longest = state.longest + len(piece)
        if state.growing():
            state.set_rows_([0], together.rows([row]))
        else:
            for name, tensor in state.tensors().items():
                tensor.copy_(joined[name][row : row + 1])
        state.longest = longest  # not that of its neighbours
    return [hidden[row, : len(piece)] for row, piece in enumerate(pieces)]


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


def _read(model: Griffin, state: State, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Read a piece of each row of one state: (B, T, D), padded to the longest."""
    lengths, device = [len(piece) for piece in pieces], state.position.device
    T = max(lengths)
    padded = [[*piece, *([0] * (T - len(piece)))] for piece in pieces]
    tokens = torch.tensor(padded, dtype=torch.int64, device=device)
    ragged = torch.tensor(lengths, dtype=torch.int64, device=device) if min(lengths) < T else None
    return model(tokens, state, lengths=ragged)
