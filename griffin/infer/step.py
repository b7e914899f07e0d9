"""One more token for every row of a state: the decode step, recorded on its first call and then replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor

from griffin.infer.graph import Captured
from griffin.model import Griffin
from griffin.ops.cpu.record import NotRecordableError, Program, available, recording
from griffin.span import check_tokens, next_span_
from griffin.state import State


class DecodeStep:
    """logits = step(tokens): what `model.logits(model(tokens, state))` computes, state advanced, without its Python.

    The first call runs the model's forward and keeps what it did; later ones do that again on the same memory. There is
    no second description of the network. On a CPU with our kernels their calls are kept, and made again from C; on a
    CUDA device the step, and what is to be done with its logits, is a CUDA graph. Elsewhere every call runs the
    forward. So it is used in a loop:

        step = DecodeStep(model, state, lambda logits: logits.argmax(dim=-1))
        while ...:
            tokens = step(tokens)

    While it is in use, parameters of the model may be changed in place, moved or replaced, alone or with their module.
    Hooks set meanwhile, and parameters added where there were none, are not seen.

    Args:
        model: the model.
        state: B rows, advanced in place by every call.
        then: what a call makes of the logits, (B, V) fp32, and returns; None returns them. The next call may overwrite
            the logits and, on a CUDA device, what `then` returned; there it must not wait for the device.

    Attributes:
        kept: "kernels", "graph" or, where every call runs the forward, None.
    """

    def __init__(self, model: Griffin, state: State, then: Callable[[Tensor], Any] | None = None) -> None:
        self.model, self.state, self.then = model, state, then or (lambda logits: logits)
        self.kept: Literal["kernels", "graph"] | None = None
        if model.device.type == "cuda":
            self.kept = "graph"
        elif model.device.type == "cpu" and available():
            self.kept = "kernels"
        with torch.inference_mode(False):  # written by every call, inside inference mode or not
            self._tokens = torch.zeros(state.batch_size, 1, dtype=torch.int64, device=state.position.device)
        self._again: Callable[[], Any] | None = None
        self._slots: tuple[list[dict[str, Any]], list[str]] = [], []
        self._parts: list[Any] = []
        self._tensors: list[Tensor] = []
        self._addresses: list[int] = []

    @torch.inference_mode(False)  # nor may the next call find memory of this one that it cannot write
    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Any:
        """Read one token of each row.

        Args:
            tokens: (B,) whole numbers in [0, V).

        Returns:
            (B, V) fp32 logits, or what `then` made of them.

        Raises:
            ValueError: shapes or values do not fit the model or the state (values are checked on a CPU only).
        """
        if tokens.shape != (self.state.batch_size,):
            raise ValueError(f"tokens is {tuple(tokens.shape)}; the state has {self.state.batch_size} rows")
        if self.kept is None or not len(tokens):
            return self._forward(tokens)
        if self.kept == "kernels":
            check_tokens(tokens, self.model.config.vocab_size)
        self._tokens.copy_(tokens[:, None])
        longest = self.state.longest + 1
        self.state.reserve_(longest)
        if self._again is not None and self._unchanged():
            result = self._again()
        elif self.kept == "graph":
            self._capture()
            assert self._again is not None
            result = self._again()
        else:
            result = self._record(tokens)
        self.state.longest = longest
        return result

    def _forward(self, tokens: Tensor) -> Any:
        return self.then(self.model.logits(self.model(tokens[:, None], self.state)[:, -1]))

    def _step(self) -> Tensor:
        """Run the forward for `_tokens`, but for what the host counts."""
        span = next_span_(self.model.config, self.state, self.model.activation_dtype)
        hidden = self.model.run(self._tokens, self.state, span)
        return self.model.logits(hidden[:, -1])

    def _capture(self) -> None:
        """Make the CUDA graph; the state is put back to where it was."""
        before = self.state.clone()
        self._keep(Captured(lambda: self.then(self._step()), self.model.device))
        self.state.set_rows_(range(self.state.batch_size), before)

    def _record(self, tokens: Tensor) -> Any:
        """Run the step and keep its calls; if it holds more than kernels, put the state back and run the forward."""
        before = self.state.clone()
        try:
            with recording() as calls:
                logits = self._step()
        except NotRecordableError as error:
            warnings.warn(f"decoding goes operation by operation, which is slower: {error}", stacklevel=4)
            self.state.set_rows_(range(self.state.batch_size), before)
            self.kept = None
            return self._forward(tokens)
        program = Program(calls)

        def again() -> Any:
            program.run()
            return self.then(logits)

        self._keep(again)
        return self.then(logits)

    def _keep(self, again: Callable[[], Any]) -> None:
        self._again = again
        dicts = [held for m in self.model.modules() for held in (m._modules, m._parameters, m._buffers)]
        self._slots = [held for held in dicts for _ in held], [name for held in dicts for name in held]
        self._parts = list(map(dict.get, *self._slots))
        self._tensors = [part for part in self._parts if isinstance(part, Tensor)]
        self._addresses = self._memory()

    def _unchanged(self) -> bool:
        """Whether the model has the modules and parameters of when the step was kept, and they lie where they lay.

        Asked for every token: modules' own dicts are kept, so that none is walked; `map` is quicker than a loop.
        """
        return all(map(is_, map(dict.get, *self._slots), self._parts)) and self._addresses == self._memory()

    def _memory(self) -> list[int]:
        """Where everything lies that is read or written: parameters may be moved, global attention grows."""
        mine = [tensor for layer in self.state.layers for tensor in layer.tensors()]
        return list(map(Tensor.data_ptr, [*self._tensors, self.state.position, *mine]))
