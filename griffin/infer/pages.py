"""A one-row state at rest: the recurrent part whole, the window cut into pages that states of one text share.

A state that has read p tokens holds the keys and values of the tokens p - S .. p - 1, S = window + 1. Two states of one
text that are closer than a window hold many of the same. So they are kept in pages: page j has the tokens
128 j .. 128 j + 127, less those that the state does not hold. A state takes a page of an earlier state of the same text
where that page has all it needs and every bit of it is the same; what was computed in another way, and differs in a
last bit, it keeps for itself. Hence joining the pages gives back the state that was cut, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.model import Griffin
from griffin.state import AttentionState, RecurrentState, State, from_int8, to_int8

PAGE = 128  # tokens


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    start: int  # offset of its first token
    window: Tensor  # (A, n, G, K): keys, then values, of each attention layer in turn; activation dtype or int8
    exponents: Tensor | None  # (A, n, G) int8 beside an int8 window

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + (0 if self.exponents is None else self.exponents.nbytes)


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A state of one row that is written no more. Its tensors are on the CPU."""

    position: int  # tokens read
    recurrent: tuple[Tensor, ...]  # h and conv of each recurrent layer in turn
    pages: tuple[Page, ...]  # in order of time
    logits: Tensor | None  # (V,) fp32, after the last token

    def own_bytes(self) -> int:
        """Bytes of what is no page."""
        return sum(tensor.nbytes for tensor in self.recurrent) + (0 if self.logits is None else self.logits.nbytes)


@torch.inference_mode(False)
@torch.no_grad()
def cut(state: State, logits: Tensor | None, *, int8: bool = False, earlier: Cut | None = None) -> Cut:
    """Copy a state into pages.

    Args:
        state: one row.
        logits: (V,) after the last token, or None.
        int8: keep keys and values in 8 bits, see `griffin.state.to_int8`.
        earlier: a state that has read a part of the same text, from its beginning; its pages are shared.
    """
    position = int(state.position[0])
    attention = [layer for layer in state.layers if isinstance(layer, AttentionState)]
    recurrent = [
        _own(tensor) for layer in state.layers if isinstance(layer, RecurrentState) for tensor in layer.tensors()
    ]
    pages = tuple(_pages(attention, position, int8, earlier)) if attention else ()
    return Cut(position, tuple(recurrent), pages, None if logits is None else _own(logits.float()))


def _pages(layers: list[AttentionState], position: int, int8: bool, earlier: Cut | None) -> Iterator[Page]:
    slots = layers[0].keys.shape[1]  # of every layer
    there = {} if earlier is None else {page.start // PAGE: page for page in earlier.pages}
    first = max(0, position - slots)
    for number in range(first // PAGE, -(-position // PAGE)):
        start, end = max(first, number * PAGE), min(position, (number + 1) * PAGE)
        index = torch.arange(start, end, dtype=torch.int64, device=layers[0].keys.device) % slots
        window = torch.stack([tensor[0, index] for layer in layers for tensor in layer.tensors()])
        new = Page(start, *(to_int8(window.cpu()) if int8 else (window.cpu(), None)))
        old = there.get(number)
        yield old if old is not None and _holds(old, new) else new


def _holds(old: Page, new: Page) -> bool:
    """Whether a page has every token of another, with the same bits."""
    low = new.start - old.start
    high = low + new.window.shape[1]
    if low < 0 or high > old.window.shape[1] or (old.exponents is None) != (new.exponents is None):
        return False
    same = torch.equal(_bits(old.window[:, low:high]), _bits(new.window))
    if new.exponents is not None and old.exponents is not None:
        return same and torch.equal(old.exponents[:, low:high], new.exponents)
    return same


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)  # -0 is not 0 here


@torch.inference_mode(False)  # what is made here must be writable outside inference mode too
@torch.no_grad()
def join(kept: Cut, model: Griffin) -> State:
    """Make the state again, on the model's device. It is the caller's own."""
    state = model.new_state(1)
    state.reserve_(kept.position)
    state.position.fill_(kept.position)
    state.longest = kept.position
    recurrent = iter(kept.recurrent)
    for layer in state.layers:
        if isinstance(layer, RecurrentState):
            layer.update_(next(recurrent), next(recurrent))
    held = [tensor for layer in state.layers if isinstance(layer, AttentionState) for tensor in layer.tensors()]
    for page in kept.pages if held else ():
        slots = held[0].shape[1]
        start = max(page.start, kept.position - slots)  # a shared page may have more than this state
        end = min(page.start + page.window.shape[1], kept.position)
        part = slice(start - page.start, end - page.start)
        window = page.window[:, part]
        if page.exponents is not None:
            window = from_int8(window, page.exponents[:, part], held[0].dtype)
        index = (torch.arange(start, end, dtype=torch.int64, device="cpu") % slots).to(held[0].device)
        for tensor, values in zip(held, window, strict=True):
            tensor[0, index] = values.to(tensor.device)
    return state


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()
