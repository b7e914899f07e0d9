from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from griffin import GriffinError
from griffin.infer.request import Sampling
from griffin.infer.sampling import Filters, invert, penalised, sample, weights_of


def keep(sampling: Sampling, logits: list[float], seen: set[int]) -> dict[int, float]:
    """The definition, one token at a time: the distribution over what the filters leave."""
    penalty = sampling.repetition_penalty or 1.0
    scores = {i: (s / penalty if s > 0 else s * penalty) if i in seen else s for i, s in enumerate(logits)}
    ranked = sorted(scores, key=lambda i: (-scores[i], i))
    peak = scores[ranked[0]]
    weights = {i: math.exp((scores[i] - peak) / sampling.temperature) for i in ranked}
    if sampling.top_k is not None:
        weights = {i: weights[i] for i in ranked[: sampling.top_k]}
    if sampling.top_p is not None and sampling.top_p < 1:
        total, mass, left = sum(weights.values()), 0.0, {}
        for i in weights:
            if mass >= sampling.top_p * total:
                break
            left[i] = weights[i]
            mass += weights[i]
        weights = left
    if sampling.min_p is not None:
        weights = {i: w for i, w in weights.items() if w >= sampling.min_p}
    total = sum(weights.values())
    return {i: w / total for i, w in weights.items() if w > 0}


def distribution(logits: Tensor, samplings: list[Sampling], seen: Tensor | None = None, first: int = 1024) -> Tensor:
    filters = Filters.of(samplings, logits.shape[1], logits.device)
    scores = logits if seen is None or filters.penalty is None else penalised(logits, filters.penalty, seen)
    weights = weights_of(scores, filters, first)
    assert torch.equal(weights, weights_of(scores, filters, None))  # as a CUDA graph computes it
    return weights / weights.sum(dim=-1, keepdim=True)


# Multiples of a quarter: ties are frequent, and no filter's border is within rounding of a probability by accident.
logit = st.integers(-20, 20).map(lambda n: n / 4)
samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.3, 0.7, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.sampled_from([1e-6, 0.1234567, 0.5123, 0.87654, 0.999, 1.0]),
    min_p=st.none() | st.sampled_from([0.0, 0.01234, 0.3456, 1.0]),
    repetition_penalty=st.none() | st.sampled_from([0.8, 1.0, 1.7]),
)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), V=st.integers(1, 12), B=st.integers(1, 3))
def test_filters_are_their_definition(data: st.DataObject, V: int, B: int) -> None:
    rows = [data.draw(st.lists(logit, min_size=V, max_size=V)) for _ in range(B)]
    options = [data.draw(samplings) for _ in range(B)]
    seen = [data.draw(st.sets(st.integers(0, V - 1))) for _ in range(B)]
    mask = torch.tensor([[i in row for i in range(V)] for row in seen])
    got = distribution(torch.tensor(rows), options, mask)
    for row in range(B):
        wanted = keep(options[row], rows[row], seen[row])
        assert {i for i in range(V) if got[row, i] > 0} == wanted.keys()
        for i, probability in wanted.items():
            assert got[row, i].item() == pytest.approx(probability, rel=1e-5)


def test_top_p_beyond_the_first_candidates() -> None:
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * 0.1
    for p in (0.1, 0.9):
        got = distribution(logits, [Sampling(top_p=p), Sampling(top_p=p)])
        for row in range(2):
            wanted = keep(Sampling(top_p=p), logits[row].tolist(), set())
            assert {i for i in range(5000) if got[row, i] > 0} == wanted.keys()


def test_draws_follow_the_distribution() -> None:
    sampling = Sampling(temperature=0.8, top_k=6, top_p=0.95, min_p=0.02, seed=7)
    logits = torch.tensor([[1.0, 0.2, -1.0, 0.7, 1.1, -0.3, 0.0, -4.0, 0.4]])
    wanted = keep(sampling, logits[0].tolist(), set())
    generator, N = sampling.generator(), 4000
    counts = [0] * 9
    for _ in range(N // 100):
        for token in sample(logits.expand(100, 9), 100 * [sampling], 100 * [generator]).ids:
            counts[token] += 1
    assert all(counts[i] == 0 for i in range(9) if i not in wanted)
    chi_square = sum((counts[i] - N * p) ** 2 / (N * p) for i, p in wanted.items())
    assert len(wanted) == 6
    assert chi_square < 20.5  # 5 degrees of freedom: 0.1 %


def test_a_row_does_not_see_the_others() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1)) * 3
    options = [
        Sampling(seed=1),
        Sampling(temperature=0),
        Sampling(temperature=0.5, top_k=3, seed=2),
        Sampling(top_p=0.4, repetition_penalty=1.5, seed=3),
        Sampling(min_p=0.2, seed=4),
    ]
    seen = torch.rand(5, 300, generator=torch.Generator().manual_seed(2)) < 0.3
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1], [3], [1, 3]):
        together, alone = [option.generator() for option in options], [option.generator() for option in options]
        for _ in range(5):
            got = sample(
                logits[order], [options[i] for i in order], [together[i] for i in order], seen[order], num_top=2
            )
            for place, i in enumerate(order):
                one = sample(logits[i : i + 1], [options[i]], [alone[i]], seen[i : i + 1], num_top=2)
                assert (got.ids[place], got.logprobs[place], got.top[place]) == (
                    one.ids[0],
                    one.logprobs[0],
                    one.top[0],
                )


def test_greedy_takes_the_lowest_of_equals_and_draws_nothing() -> None:
    sampling = Sampling(temperature=0, seed=5)
    generator = sampling.generator()
    assert sample(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), [sampling], [generator]).ids == [1]
    assert torch.equal(generator.get_state(), sampling.generator().get_state())


def test_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]])
    got = sample(logits, [Sampling(temperature=0.1, top_k=1)], [torch.Generator()], num_top=4)
    wanted = logits.log_softmax(dim=-1)[0].tolist()
    assert got.logprobs[0] == pytest.approx(wanted[1])
    assert [token for token, _ in got.top[0]] == [1, 2, 0, 3]
    assert [value for _, value in got.top[0]] == pytest.approx([wanted[i] for i in (1, 2, 0, 3)])


def test_the_end_of_the_distribution_stays_inside() -> None:
    # u * total rounds up to the total for some totals; the draw is then the last token with any weight.
    weights = torch.tensor([[0.0, 1.0, 2**-52, 0.0]], dtype=torch.float64)
    almost_one = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert invert(weights, almost_one).item() in (1, 2)
    assert invert(weights, torch.tensor([1.0], dtype=torch.float64)).item() == 2
    assert invert(weights, torch.tensor([0.0], dtype=torch.float64)).item() == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_name_the_row(bad: float) -> None:
    logits = torch.zeros(3, 4)
    logits[1, 2] = bad
    with pytest.raises(GriffinError, match=r"row 1: the largest logit is (nan|inf)"):
        sample(logits, 3 * [Sampling()], [torch.Generator() for _ in range(3)])
    with pytest.raises(GriffinError, match="row 0"):
        sample(torch.full((1, 4), -torch.inf), [Sampling()], [torch.Generator()])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.5},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
)
def test_an_option_out_of_range_is_named(options: dict[str, float]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        Sampling(**options)  # type: ignore[arg-type]
