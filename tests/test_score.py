"""Log-likelihoods of continuations: against a forward over each whole text, in any batch; what is read how often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from griffin import Griffin
from griffin.score import LogLikelihood, log_likelihoods, token_logprobs

Pair = tuple[list[int], list[int]]


def one_by_one(model: Griffin, pair: Pair) -> LogLikelihood:
    context, continuation = pair
    tokens = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model.logits(model(tokens))[0, len(context) - 1 : -1].double()
    target = torch.tensor(continuation)
    nats = logits.log_softmax(-1).gather(1, target[:, None]).sum()
    return LogLikelihood(float(nats), bool((logits.argmax(-1) == target).all()))


def make_pairs(model: Griffin) -> list[Pair]:
    """Contexts shared, nested, with a common beginning; continuations of 1 to 40 tokens, one of them the likeliest."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(0, model.config.vocab_size, (count,), generator=generator).tolist()

    shots = ids(30)
    questions = [[*shots, *ids(count)] for count in (1, 5, 23)] + [shots, shots[:7], ids(1), ids(50)]
    pairs = [(question, ids(count)) for question in questions for count in (1, 3, 40)]
    likeliest: list[int] = []
    with torch.no_grad():
        for _ in range(5):
            text = torch.tensor([questions[1] + likeliest])
            likeliest.append(int(model.logits(model(text))[0, -1].argmax()))
    return [*pairs, (questions[1], likeliest), pairs[0]]


@pytest.mark.parametrize("preset", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
@pytest.mark.parametrize(("batch_rows", "chunk"), [(32, 512), (5, 8), (1, 3)])
def test_each_pair_gets_what_it_gets_alone(
    make_model: Callable[..., Griffin], preset: str, batch_rows: int, chunk: int
) -> None:
    model = make_model(preset, dtype=torch.float64)
    pairs = make_pairs(model)
    found = log_likelihoods(model, pairs, batch_rows=batch_rows, chunk=chunk)
    for pair, each in zip(pairs, found, strict=True):
        expected = one_by_one(model, pair)
        assert each.nats == pytest.approx(expected.nats, abs=2e-5)  # logits are fp32
        assert each.greedy == expected.greedy
    assert [each.greedy for each in found].count(True) >= 1


def test_what_contexts_share_is_read_once(make_model: Callable[..., Griffin], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    shots = list(range(100))
    pairs = [([*shots, 100 + question, 7], [choice, 1, 2]) for question in range(6) for choice in range(4)]
    read = 0
    forward = Griffin.forward

    def counting(self: Griffin, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal read
        read += tokens.numel()
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Griffin, "forward", counting)
    for batch_rows in (24, 8):
        read = 0
        log_likelihoods(model, pairs, batch_rows=batch_rows)
        assert read == 100 + 6 * 2 + 24 * 2  # the examples; six questions; all but the last of each continuation


def test_what_cannot_be_scored_is_refused(make_model: Callable[..., Griffin]) -> None:
    model = make_model()
    assert log_likelihoods(model, []) == []
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(ValueError, match="pair 1 has"):
            log_likelihoods(model, [([1], [2]), pair])
    with pytest.raises(ValueError, match="batch_rows=0"):
        log_likelihoods(model, [([1], [2])], batch_rows=0)
    with pytest.raises(ValueError, match="259"):
        log_likelihoods(model, [([259], [2])])


def test_logprobs_in_chunks(make_model: Callable[..., Griffin], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(vocab_size=2**17)  # 64 tokens a chunk
    hidden, targets = torch.randn(150, 32), torch.randint(0, 2**17, (150,))
    logprobs, greedy = token_logprobs(model, hidden, targets)
    whole = model.logits(hidden).log_softmax(-1)
    torch.testing.assert_close(logprobs, whole.gather(1, targets[:, None])[:, 0], atol=1e-4, rtol=0)
    assert not greedy.any()
    assert token_logprobs(model, hidden, whole.argmax(-1))[1].all()
