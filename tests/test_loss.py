"""The chunked loss against the plain one: value, count, gradients; and what it never holds."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from griffin.loss import bits_per_byte, cross_entropy
from griffin.model import soft_cap
from griffin.ops.cpu import library


@given(
    T=st.integers(1, 30),
    cap=st.sampled_from([None, 30.0, 1.5]),
    chunk=st.integers(1, 70),
    scale=st.sampled_from([1.0, 40.0]),
)
def test_equals_the_plain_formula(T: int, cap: float | None, chunk: int, scale: float) -> None:
    hidden = (scale * torch.randn(2, T, 8, dtype=torch.float64)).requires_grad_()
    embedding = torch.randn(37, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, 37, (2, T))
    nats, count = cross_entropy(hidden, embedding, targets, soft_cap=cap, chunk_tokens=chunk)
    logits = soft_cap(hidden @ embedding.T, cap).flatten(0, 1)
    expected = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
    assert_close(nats, expected)
    assert int(count) == int((targets >= 0).sum())
    for found, wanted in zip(
        torch.autograd.grad(3 * nats, (hidden, embedding)),
        torch.autograd.grad(3 * expected, (hidden, embedding)),
        strict=True,
    ):
        assert_close(found, wanted)


def test_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 chunks of 5 tokens nothing of more than 5 rows of the vocabulary exists."""
    from griffin.ops import products

    largest = 0
    plain = products.product

    def watched(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        product = plain(a, b)
        if product.shape[-1] == 1000:
            largest = max(largest, product.shape[0])
        return product

    monkeypatch.setattr(products, "product", watched)
    hidden, embedding = torch.randn(1, 15, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    cross_entropy(hidden, embedding, torch.randint(0, 1000, (1, 15)), chunk_tokens=5)[0].backward()
    assert largest == 5


def test_fp32_and_bf16_hidden_states() -> None:
    hidden, embedding = torch.randn(2, 50, 64), torch.randn(300, 64) / 8
    targets = torch.randint(0, 300, (2, 50))
    expected = cross_entropy(hidden.double(), embedding.double(), targets, soft_cap=30.0)[0]
    assert_close(cross_entropy(hidden, embedding, targets, soft_cap=30.0)[0].double(), expected, rtol=1e-6, atol=1e-6)
    rounded = hidden.bfloat16()
    for instructions in library.offered() or (None,):
        with library.using(instructions) if instructions else nullcontext():
            # Where products are of bf16, the masters of the weights are rounded to it.
            narrow = embedding.to(torch.bfloat16 if instructions == "avx512bf16" else torch.float32)
            exact = cross_entropy(rounded.double(), narrow.double(), targets, soft_cap=30.0)[0]
            found = cross_entropy(rounded, embedding, targets, soft_cap=30.0)[0]
            assert found.dtype == torch.float32
            assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


def test_gradients_of_bf16_hidden_states() -> None:
    """Slopes are rounded to bf16 where products are of bf16: off by 2^-9 each, and by no more in the sums."""
    hidden, embedding = torch.randn(2, 50, 64).bfloat16(), (torch.randn(300, 64) / 8).bfloat16().float()
    targets = torch.randint(-1, 300, (2, 50))
    exact = [hidden.double().requires_grad_(), embedding.double().requires_grad_()]
    wanted = torch.autograd.grad(cross_entropy(*exact, targets, soft_cap=30.0)[0], exact)
    for instructions in library.offered() or (None,):
        with library.using(instructions) if instructions else nullcontext():
            ours = [hidden.clone().requires_grad_(), embedding.clone().requires_grad_()]
            found = torch.autograd.grad(cross_entropy(*ours, targets, soft_cap=30.0, chunk_tokens=33)[0], ours)
            for mine, right in zip(found, wanted, strict=True):
                assert (mine.double() - right).norm() < 3e-3 * right.norm()


def test_nothing_counted_is_zero_with_zero_gradient() -> None:
    hidden, embedding = torch.randn(1, 4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    nats, count = cross_entropy(hidden, embedding, torch.full((1, 4), -1))
    nats.backward()
    assert nats.item() == 0
    assert count.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_errors_and_units() -> None:
    hidden, embedding = torch.randn(1, 4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match="target 5 is neither"):
        cross_entropy(hidden, embedding, torch.tensor([[1, 5, 0, 0]]))
    with pytest.raises(ValueError, match="target -2"):
        cross_entropy(hidden, embedding, torch.tensor([[1, -2, 0, 0]]))
    with pytest.raises(ValueError, match="targets is"):
        cross_entropy(hidden, embedding, torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be"):
        cross_entropy(hidden, torch.randn(5, 4), torch.zeros(1, 4, dtype=torch.int64))
    assert bits_per_byte(math.log(2) * 80, 10) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="num_bytes=0"):
        bits_per_byte(1.0, 0)


def test_a_second_derivative_is_refused_not_dropped() -> None:
    """A gradient penalty would otherwise train on another loss without a word."""
    hidden, embedding = torch.randn(1, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    nats, _ = cross_entropy(hidden, embedding, torch.tensor([[1, 2, 3]]))
    for tensor in (hidden, embedding):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(nats, tensor, create_graph=True)
    assert torch.autograd.grad(nats, hidden)[0].any()


def test_autocast_changes_neither_value_nor_gradient() -> None:
    hidden, embedding = torch.randn(2, 9, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(0, 40, (2, 9))
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            nats, _ = cross_entropy(hidden, embedding, targets, soft_cap=30.0)
        found.append((nats, *torch.autograd.grad(nats, (hidden, embedding))))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_frozen_embedding_costs_no_gradient() -> None:
    """The hidden states' is what it was, and nothing of the embedding's size is made for it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 9, 8, generator=generator).requires_grad_()
    embedding = torch.randn(50, 8, generator=generator)
    targets = torch.randint(0, 50, (2, 9), generator=generator)
    found = []
    for trained in (True, False):
        nats, _ = cross_entropy(
            hidden, embedding.clone().requires_grad_(trained), targets, soft_cap=5.0, chunk_tokens=4
        )
        found.append(torch.autograd.grad(nats, hidden, retain_graph=True)[0])
        kept = [tensor for tensor in nats.grad_fn.saved_tensors if tensor is not None]  # type: ignore[union-attr]
        assert sum(tensor.numel() for tensor in kept) == hidden.numel() + trained * embedding.numel()
    assert torch.equal(*found)
