"""How well a model predicts: nats of packed rows, bits per byte, log-likelihoods of continuations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from griffin.data.batches import Rows, stream_rows
from griffin.data.packing import Batch
from griffin.data.shards import Shard
from griffin.errors import GriffinError
from griffin.infer.prefill import prefill
from griffin.loss import NOT_COUNTED, bits_per_byte, cross_entropy
from griffin.model import Griffin
from griffin.state import State
from griffin.tokenizer import Tokenizer


def nats(model: Griffin, batch: Batch, state: State | None = None) -> Tensor:
    """Sum over the counted tokens of packed rows of -log p(token | its document so far): () fp32, with a gradient.

    With a state, each row is one document that goes on from its row of the state, which is advanced.
    """
    hidden = model(batch.tokens, positions=batch.positions) if state is None else model(batch.tokens, state)
    return cross_entropy(hidden, model.embedding, batch.targets, soft_cap=model.config.logits_soft_cap)[0]


def row_nats(model: Griffin, batch: Batch) -> Tensor:
    """The same by row: (B,) fp32. Where the embedding is trained, each row keeps a gradient of its size."""
    hidden, embedding = model(batch.tokens, positions=batch.positions), model.embedding
    cap = model.config.logits_soft_cap
    rows = [
        cross_entropy(hidden[row : row + 1], embedding, batch.targets[row : row + 1], soft_cap=cap)[0]
        for row in range(len(hidden))
    ]
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class Validation:
    """A fixed set of rows: the same ones every time, spread evenly over a shard."""

    batches: list[Batch]
    num_tokens: int  # predicted
    num_bytes: int  # of the text that the predicted tokens stand for

    @classmethod
    def of(
        cls,
        shard: Shard,
        tokenizer: Tokenizer,
        *,
        num_rows: int,
        row_tokens: int,
        batch_rows: int,
        device: torch.device,
    ) -> Validation:
        rows = stream_rows(shard, row_tokens)
        return cls.over(rows, tokenizer, num_rows=num_rows, batch_rows=batch_rows, device=device, where=shard.folder)

    @classmethod
    def over(
        cls,
        rows: Rows,
        tokenizer: Tokenizer,
        *,
        num_rows: int,
        batch_rows: int,
        device: torch.device,
        where: Path,
    ) -> Validation:
        num_rows = min(num_rows, rows.count)
        chosen = [index * rows.count // num_rows for index in range(num_rows)]
        batches = [rows.batch(chosen[at : at + batch_rows]) for at in range(0, num_rows, batch_rows)]
        predicted = [batch.targets[batch.targets != NOT_COUNTED].tolist() for batch in batches]
        num_bytes = sum(tokenizer.token_bytes(ids) for ids in predicted)
        if not num_bytes:
            raise GriffinError(f"{where}: the text to validate on has nothing to predict; give more of it")
        return cls([batch.to(device) for batch in batches], sum(map(len, predicted)), num_bytes)

    @torch.no_grad()
    def measure(self, model: Griffin, loss: Callable[[Griffin, Batch], Tensor] = nats) -> tuple[float, float]:
        """Give nats per token and bits per byte of text; an end of document is predicted too and has no bytes.

        `loss` gives the sum of nats of a batch.
        """
        total = math.fsum(float(loss(model, batch)) for batch in self.batches)
        return total / self.num_tokens, bits_per_byte(total, self.num_bytes)


Progress = Callable[[int, int], None]  # (pairs scored, pairs in all)


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """Of one continuation after its context."""

    nats: float  # sum of log p(token | context, tokens before it): 0 at most
    greedy: bool  # each of its tokens is the likeliest one where it stands


@torch.no_grad()
def token_logprobs(model: Griffin, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute log p(target) = c[target] - logsumexp(c), c the logits, and whether the target is the likeliest token.

    Logits live for one chunk of tokens at a time, 32 MB on a CPU and 1 GB on a GPU.

    Args:
        model: the model.
        hidden: (N, D) from `Griffin.forward`.
        targets: (N,) int64 in [0, V).

    Returns:
        logprobs: (N,) fp32.
        greedy: (N,) bool.
    """
    chunk = max(64, (2**28 if hidden.is_cuda else 2**23) // model.config.vocab_size)
    logprobs, greedy = [], []
    for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        logits = model.logits(h)  # (n, V) fp32
        logprobs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(dim=1))
        greedy.append(logits.argmax(dim=1) == target)
    return torch.cat(logprobs), torch.cat(greedy)


@torch.no_grad()
def log_likelihoods(
    model: Griffin,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_rows: int = 32,
    chunk: int = 512,
    progress: Progress | None = None,
) -> list[LogLikelihood]:
    """Score each continuation after its context.

    Each context is read once, however many continuations it has, and what all contexts of a batch begin with, such as
    the examples before a question, is read once too: then the state is forked. Contexts and continuations may be of
    any length; memory is that of `batch_rows` states and one chunk.

    Args:
        model: the model.
        pairs: (context, continuation) as ids, each of at least one.
        batch_rows: the most states at once.
        chunk: the most tokens of a row read at once.
        progress: called after each batch.

    Returns:
        One for each pair, in their order.

    Raises:
        ValueError: a context or a continuation is empty (give BOS as the context of a whole text), batch_rows or chunk
            is below 1, or an id is not one of the model's.
    """
    if batch_rows < 1:
        raise ValueError(f"batch_rows={batch_rows} must be at least 1")
    for index, (context, continuation) in enumerate(pairs):
        if not context or not continuation:
            raise ValueError(f"pair {index} has {len(context)} and {len(continuation)} tokens; each needs one or more")
    found: list[LogLikelihood | None] = [None] * len(pairs)
    # In this order neighbours share the most, and what the first and the last of a batch share, all of it do.
    order = sorted(range(len(pairs)), key=lambda index: tuple(pairs[index][0]))
    shared = _Shared(model, chunk)
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        for index, each in zip(batch, _score_batch(shared, [pairs[index] for index in batch]), strict=True):
            found[index] = each
        if progress is not None:
            progress(min(start + batch_rows, len(order)), len(order))
    return [each for each in found if each is not None]


class _Shared:
    """The state after what the contexts at hand begin with; most of it is there from the batch before."""

    def __init__(self, model: Griffin, chunk: int) -> None:
        self.model, self.chunk = model, chunk
        self._read: tuple[int, ...] = ()
        self._state = model.new_state(1)

    def after(self, prefix: tuple[int, ...]) -> State:
        """One row that has read `prefix`; not to be written."""
        if prefix[: len(self._read)] != self._read:
            self._read, self._state = (), self.model.new_state(1)
        if rest := prefix[len(self._read) :]:
            prefill(self.model, self._state, [rest], chunk=self.chunk)
            self._read = prefix
        return self._state


def _score_batch(shared: _Shared, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[LogLikelihood]:
    """Score pairs in the order of their contexts, with no more states than there are pairs."""
    model, device = shared.model, shared.model.device
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    row_of = {context: row for row, context in enumerate(contexts)}
    common = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(contexts[0], contexts[-1], strict=False)))
    common = min(common, min(map(len, contexts)) - 1)  # of each context a token is left to be read, for its hidden
    state = shared.after(contexts[0][:common]).rows([0] * len(contexts))
    last = prefill(model, state, [context[common:] for context in contexts], chunk=shared.chunk)  # (n, D)
    rows = torch.tensor([row_of[tuple(context)] for context, _ in pairs], dtype=torch.int64, device=device)
    first = torch.tensor([continuation[0] for _, continuation in pairs], dtype=torch.int64, device=device)
    logprobs, greedy = token_logprobs(model, last[rows], first)
    nats, all_greedy = logprobs.double().tolist(), greedy.tolist()
    longer = [index for index, (_, continuation) in enumerate(pairs) if len(continuation) > 1]
    state = state.rows(rows[longer])
    for start in range(0, max((len(pairs[index][1]) for index in longer), default=1) - 1, shared.chunk):
        going = [at for at, index in enumerate(longer) if len(pairs[index][1]) - 1 > start]
        if len(going) < len(longer):
            state, longer = state.rows(going), [longer[at] for at in going]
        pieces = [pairs[index][1][start : start + shared.chunk + 1] for index in longer]
        lengths = torch.tensor([len(piece) - 1 for piece in pieces], dtype=torch.int64, device=device)
        T = int(lengths.max())
        tokens = torch.tensor(
            [[*piece[:-1], *[0] * (T + 1 - len(piece))] for piece in pieces], dtype=torch.int64, device=device
        )
        targets = torch.tensor(
            [[*piece[1:], *[0] * (T + 1 - len(piece))] for piece in pieces], dtype=torch.int64, device=device
        )
        counted = torch.arange(T, dtype=torch.int64, device=device) < lengths[:, None]  # (n, T)
        hidden = model(tokens, state)  # padding is behind a row's end: nothing of it is asked for, nor of its state
        logprobs, greedy = token_logprobs(model, hidden[counted], targets[counted])
        for index, its, right in zip(
            longer, logprobs.double().split(lengths.tolist()), greedy.split(lengths.tolist()), strict=True
        ):
            nats[index] += float(its.sum())
            all_greedy[index] = all_greedy[index] and bool(right.all())
    return [LogLikelihood(*each) for each in zip(nats, all_greedy, strict=True)]
