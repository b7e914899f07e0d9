"""One more token for every row of a state: the decode step, recorded on its first call and then replayed."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from griffin.model import Griffin
from griffin.ops.cpu import library
from griffin.ops.cpu.record import NotRecordableError, Program, recording
from griffin.span import check_tokens, next_span_
from griffin.state import State


class DecodeStep:
    """logits = step(tokens): what `model.logits(model(tokens, state))` computes, state advanced, without its Python.

    On a CPU with our kernels the first call runs the model's forward and keeps its kernel calls; later ones make these
    again from C, on the same memory. There is no second description of the network. Elsewhere (`recorded` is False)
    every call runs the forward. So it is used in a loop:

        step = DecodeStep(model, state)
        while ...:
            tokens = step(tokens).argmax(dim=-1)

    While it is in use, hooks and replaced modules of the model are not seen; parameters changed in place or moved are.

    Args:
        model: the model.
        state: B rows, advanced in place by every call.
    """

    def __init__(self, model: Griffin, state: State) -> None:
        self.model, self.state = model, state
        self.recorded = model.device.type == "cpu" and library.status()[0]
        self._tokens = torch.zeros(state.batch_size, 1, dtype=torch.int64, device=state.position.device)
        self._logits: Tensor | None = None
        self._program: Program | None = None
        self._parameters: list[Tensor] = []
        self._addresses: list[int] = []

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Read one token of each row.

        Args:
            tokens: (B,) whole numbers in [0, V).

        Returns:
            (B, V) fp32, which the next call may overwrite.

        Raises:
            ValueError: shapes or values do not fit the model or the state.
        """
        if tokens.shape != (self.state.batch_size,):
            raise ValueError(f"tokens is {tuple(tokens.shape)}; the state has {self.state.batch_size} rows")
        if not self.recorded or not len(tokens):
            return self._forward(tokens)
        check_tokens(tokens, self.model.config.vocab_size)
        self._tokens.copy_(tokens[:, None])
        longest = self.state.longest + 1
        self.state.reserve_(longest)
        if self._program is not None and self._addresses == self._memory():
            self._program.run()
        elif not self._record():
            return self._forward(tokens)
        self.state.longest = longest
        assert self._logits is not None
        return self._logits

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model.logits(self.model(tokens[:, None], self.state)[:, -1])

    def _record(self) -> bool:
        """Run the step and keep its calls; put the state back and say False if it holds more than kernels."""
        before = self.state.clone()
        try:
            with recording() as calls:
                hidden = self.model.run(self._tokens, self.state, next_span_(self.model.config, self.state))
                self._logits = self.model.logits(hidden[:, -1])
        except NotRecordableError as error:
            warnings.warn(f"decoding goes operation by operation, which is slower: {error}", stacklevel=3)
            self.state.set_rows_(range(self.state.batch_size), before)
            self.recorded = False
            return False
        self._program = Program(calls)
        self._parameters = [*self.model.parameters(), *self.model.buffers()]
        self._addresses = self._memory()
        return True

    def _memory(self) -> list[int]:
        """Where everything lies that the program reads or writes: parameters may be moved, global attention grows."""
        return [tensor.data_ptr() for tensor in (*self._parameters, *self.state.tensors().values())]
