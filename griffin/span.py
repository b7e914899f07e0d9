"""The tokens of one call as the layers see them: positions, resets, padding, packing, angles."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from griffin.config import GriffinConfig
from griffin.ops import next_positions_, rope_table
from griffin.ops.attention import Plan, Rows, packed_rows, plan
from griffin.state import State

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where B rows lie that are packed in one row of T tokens, and what attention reads and writes of their state."""

    offsets: Tensor  # (B + 1,) int64: row b is tokens offsets[b] .. offsets[b + 1]
    rows: Rows  # likewise, with the keys
    sizes: tuple[int, ...]  # earlier keys and own tokens of each row, in turn
    earlier: tuple[Tensor, Tensor]  # (M,) each: row and offset of the earlier tokens that some query sees
    last: Tensor  # (L,) which of the T tokens the window keeps
    kept: tuple[Tensor, Tensor]  # (L,) each: their row and offset


@dataclass(frozen=True, slots=True)
class Span:
    """What every layer needs to know of the tokens of one call."""

    start: Tensor  # (B,) int64, State.position before the call
    positions: Tensor  # (B, T) int64, offset of each token in its document; 0 starts a document
    reset: Tensor  # (B, T) bool, positions == 0, and False on padding
    lengths: Tensor | None  # (B,) tokens of each row that count, from the left; None: all T
    padding: Tensor | None  # (B, T) bool, True beyond lengths; None: nowhere
    cos: Tensor  # (B, T, rope_width / 2) fp32, fp64 for activations in fp64
    sin: Tensor  # likewise
    earlier: int  # tokens before the call that some query may see
    longest: int  # State.longest after the call
    documents: Plan | None = None  # what local_attention asks once for all layers
    packing: Packing | None = None  # None: a row of tokens for each row of the state


def span_of(
    config: GriffinConfig,
    tokens: Tensor,
    state: State | None,
    positions: Tensor | None,
    lengths: Tensor | None,
    offsets: Tensor | None,
    dtype: torch.dtype,
) -> Span:
    """Check the arguments of `Griffin.forward` before anything is written, and derive what the layers share.

    `dtype` is that of the activations.
    """
    if tokens.dim() != 2 or tokens.shape[1] == 0 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"tokens is {tuple(tokens.shape)} {tokens.dtype}; it must be (B, T>0) int64 or int32")
    B, T = tokens.shape
    if offsets is not None:
        _check_offsets(offsets, tokens, state, positions, lengths)
        if state is not None:
            return _packed(config, tokens, state, offsets, dtype)
        positions = _each(offsets.to(torch.int64).diff())[1][None].to(tokens.device)  # as in training: nothing is kept
    if state is not None and state.batch_size != B:
        raise ValueError(f"tokens has {B} rows, the state {state.batch_size}: use new_state({B}) or rows()")
    for name, tensor, shape in (("positions", positions, (B, T)), ("lengths", lengths, (B,))):
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in _WHOLE):
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}; it must be {shape} whole numbers")
    if state is not None and torch.is_grad_enabled():
        _check_gradients(state, T)
    checked = tokens.device.type == "cpu" and not torch.compiler.is_compiling()
    padding = None
    if lengths is not None:
        if checked and B and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
            raise ValueError(f"lengths {lengths.tolist()} must be within 0 .. T={T}")
        lengths = lengths.to(torch.int64)  # one less than 0 is 255 in uint8
        padding = torch.arange(T, dtype=torch.int64, device=tokens.device) >= lengths[:, None]
    if checked and tokens.numel():
        check_tokens(tokens if padding is None else tokens.masked_fill(padding, 0), config.vocab_size)
    start = tokens.new_zeros(B, dtype=torch.int64) if state is None else state.position
    packed = positions is not None  # documents may start inside rows
    if positions is None:
        positions = start[:, None] + torch.arange(T, dtype=torch.int64, device=tokens.device)
    else:
        positions = positions.to(torch.int64)
        if checked and B:
            _check_positions(positions, start if state is not None else None, padding)
    reset = positions == 0
    if padding is not None:
        reset = reset & ~padding
    cos, sin = rope_table(positions, config.rope_width, config.rope_base, torch.promote_types(dtype, torch.float32))
    earlier = longest = 0
    if state is not None:
        earlier = state.longest if config.window is None else min(state.longest, config.window)
        if packed:
            longest = _longest_packed(state, positions, padding)
        else:
            longest = _longest_after(config, state, lengths, T)
        state.reserve_(longest)
    documents = None
    if "attention" in config.block_types and T > 1:
        at = positions if padding is None else positions.masked_fill(padding, 1)  # padding starts no document
        documents = plan(at, earlier, packed=packed)
    return Span(start, positions, reset, lengths, padding, cos, sin, earlier, longest, documents)


def _packed(config: GriffinConfig, tokens: Tensor, state: State, offsets: Tensor, dtype: torch.dtype) -> Span:
    """Give the span of packed rows that go on from a state. On a GPU this waits once, for the state's positions."""
    if torch.is_grad_enabled():
        _check_gradients(state, 1)
    if tokens.device.type == "cpu":
        check_tokens(tokens, config.vocab_size)
    # All of it is reckoned on the host, where sizes are needed.
    start, offsets = state.position.to("cpu"), offsets.to(torch.int64)
    counts = offsets.diff()
    row, token = _each(counts)
    positions = start[row] + token
    longest = max(state.longest, int(positions.max()) + 1)
    window = state.longest if config.window is None else config.window
    if "attention" not in config.block_types:
        window = 0
    seen = start.clamp(0, min(state.longest, window)) * (counts > 0)
    earlier_row, earlier = _each(seen)
    last = torch.arange(len(row), dtype=torch.int64, device="cpu")
    if config.window is not None:
        last = last[counts[row] - token <= config.window + 1]
    device = tokens.device
    packing = Packing(
        offsets.to(device),
        packed_rows(counts.tolist(), seen.tolist(), device),
        tuple(torch.stack([seen, counts], dim=1).flatten().tolist()),
        (earlier_row.to(device), (start - seen)[earlier_row].add_(earlier).to(device)),
        last.to(device),
        (row[last].to(device), positions[last].to(device)),
    )
    positions = positions[None].to(device)
    cos, sin = rope_table(positions, config.rope_width, config.rope_base, torch.promote_types(dtype, torch.float32))
    state.reserve_(longest)
    return Span(
        *(state.position, positions, positions == 0, None, None, cos, sin),
        earlier=int(seen.max()),
        longest=longest,
        packing=packing,
    )


def _each(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Lay counts[b] things of every row b one after another: of each its row, and which of its row's it is."""
    row = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int64, device="cpu"), counts)
    return row, torch.arange(len(row), dtype=torch.int64, device="cpu") - (counts.cumsum(0) - counts)[row]


def _check_offsets(
    offsets: Tensor, tokens: Tensor, state: State | None, positions: Tensor | None, lengths: Tensor | None
) -> None:
    B, T = tokens.shape
    if positions is not None or lengths is not None:
        raise ValueError("offsets say where rows begin and end: they go without positions and lengths")
    if offsets.dim() != 1 or not len(offsets) or offsets.dtype not in _WHOLE or offsets.device.type != "cpu":
        raise ValueError(
            f"offsets is {tuple(offsets.shape)} {offsets.dtype} on {offsets.device}; it must be (rows + 1,) whole "
            "numbers on the CPU: what they are decides sizes"
        )
    values = offsets.tolist()
    if B != 1 or values[0] != 0 or values[-1] != T or any(stop < start for start, stop in pairwise(values)):
        raise ValueError(f"tokens is {(B, T)} and offsets {values}; it must be (1, T) and they rise from 0 to T")
    if state is not None and state.batch_size != len(values) - 1:
        raise ValueError(f"offsets have {len(values) - 1} rows, the state {state.batch_size}")


def _longest_after(config: GriffinConfig, state: State, lengths: Tensor | None, T: int) -> int:
    """State.longest after T more tokens or `lengths` of them: padding does not count.

    On a GPU that would have to be waited for. It is for global attention, whose memory it decides; else T is taken.
    """
    waits = state.position.device.type != "cpu" and config.window is not None
    if lengths is None or waits or torch.compiler.is_compiling():
        return state.longest + T
    return max(state.longest, int((state.position + lengths).max()) if len(lengths) else 0)


def _longest_packed(state: State, positions: Tensor, padding: Tensor | None) -> int:
    counted = positions if padding is None else positions.masked_fill(padding, -1)
    return max(state.longest, int(counted.max()) + 1 if len(counted) else 0)


def _check_gradients(state: State, T: int) -> None:
    """Refuse state tensors whose gradients would be lost, before anything is written over them.

    A state carries values, not gradients. Its tensors may be results of other operations: their gradients are right.
    """
    for name, tensor in state.tensors().items():
        alone = T == 1 and name.endswith(("keys", "values"))  # one token is written into the slots by a kernel
        if tensor.requires_grad and (tensor.is_leaf or alone):
            other = "" if alone else ", or put a result there that is no leaf, such as h * 1"
            raise ValueError(f"state.{name} requires a gradient and is overwritten in place: detach it{other}")


def next_span_(config: GriffinConfig, state: State, dtype: torch.dtype) -> Span:
    """Give the span of one more token for each row, and let state.position stand after it: all in kernels on a CPU.

    What the host counts, state.longest and the slots of global attention, is the caller's to advance.
    """
    start = state.position
    positions, reset = next_positions_(start)
    cos, sin = rope_table(positions, config.rope_width, config.rope_base, torch.promote_types(dtype, torch.float32))
    return Span(start, positions, reset, None, None, cos, sin, earlier=0, longest=state.longest)


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless all tokens are within 0 .. vocab_size - 1. On a GPU this waits for the device."""
    low, high = (int(value) for value in torch.aminmax(tokens))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"token {low if low < 0 else high} is not in the vocabulary 0 .. {vocab_size - 1}; "
            "was the text encoded with this model's tokenizer?"
        )


def advance_(state: State, span: Span) -> None:
    """Let the state stand after the tokens of a call."""
    if span.packing is not None:
        after = state.position + span.packing.offsets.diff()
    elif span.lengths is None:
        after = span.positions[:, -1] + 1
    else:
        last = (span.lengths - 1).clamp(min=0)[:, None]
        after = torch.where(span.lengths > 0, span.positions.gather(1, last)[:, 0] + 1, state.position)
    state.position.copy_(after)
    state.longest = span.longest


def _check_positions(positions: Tensor, start: Tensor | None, padding: Tensor | None) -> None:
    """Refuse offsets that neither go on by one nor start a document."""
    follows = torch.ones_like(positions, dtype=torch.bool)
    follows[:, 1:] = positions[:, 1:] == positions[:, :-1] + 1
    follows[:, 0] = positions[:, 0] >= 0 if start is None else positions[:, 0] == start
    wrong = ~(follows | (positions == 0))
    if padding is not None:
        wrong &= ~padding
    if wrong.any():
        b, t = (int(i) for i in wrong.nonzero()[0])
        before = positions[b, t - 1] if t else (-1 if start is None else start[b] - 1)
        raise ValueError(
            f"positions[{b}, {t}]={int(positions[b, t])} must be {int(before) + 1} (the next token) "
            "or 0 (a new document)"
        )
