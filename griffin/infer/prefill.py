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
def read_chunk(model: Griffin, state: State, pieces: Sequence[Sequence[int]]) -> Tensor:
    """Read the next tokens of each row in one pass, without padding; the state is advanced in place.

    Short pieces share the products of one pass; a row's result is what it would be alone, up to the rounding of sums.

    Args:
        model: the model.
        state: B rows.
        pieces: B sequences of tokens, not all empty. A row whose piece is empty stays as it is, and costs nothing.

    Returns:
        (B, D) what the model made of each row's last token: the input of `model.logits`. Zeros where there is none.

    Raises:
        ValueError: there are not as many pieces as rows, or not one token.
    """
    if len(pieces) != state.batch_size or not any(map(len, pieces)):
        raise ValueError(f"pieces of {[len(p) for p in pieces]} tokens for {state.batch_size} rows; some row needs one")
    counts = [len(piece) for piece in pieces]
    tokens = torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.int64, device=state.position.device)
    if min(counts) == max(counts):  # nothing is ragged
        return model(tokens.view(len(counts), -1), state)[:, -1].clone()  # not a view: the chunk must not stay
    ends = list(accumulate(counts))
    offsets = torch.tensor([0, *ends], dtype=torch.int64, device="cpu")
    hidden = model(tokens[None], state, offsets=offsets)[0]
    read = [row for row, count in enumerate(counts) if count]
    last = hidden.new_zeros(len(counts), hidden.shape[1])
    last[read] = hidden[[ends[row] - 1 for row in read]]
    return last


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
        found = read_chunk(model, state, [prompt[start : start + chunk] for prompt in prompts])
        ends = [row for row, prompt in enumerate(prompts) if start < len(prompt) <= start + chunk]
        last[ends] = found[ends]
        if progress is not None:
            progress(sum(min(start + chunk, len(prompt)) for prompt in prompts), total)
    return last
