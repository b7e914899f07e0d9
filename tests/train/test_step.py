"""One step's arithmetic: packed rows, accumulation, steps that are skipped, learning at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from griffin import PRESETS, Griffin, Tokenizer
from griffin.data.packing import Batch, pack
from griffin.data.shards import Shard, open_shard, write_shard
from griffin.errors import GriffinError
from griffin.loss import NOT_COUNTED, cross_entropy
from griffin.score import Validation
from griffin.train.config import TrainConfig
from griffin.train.objective import LanguageModel
from griffin.train.optim import make_optimizer, set_learning_rate
from griffin.train.step import take_step

CONFIG = TrainConfig(model=PRESETS["griffin-tiny"], train_data="-", tokenizer="bytes", steps=100)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are slower on many threads, and far slower where those are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shard_of(folder: Path, lengths: list[int]) -> Shard:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    parts = ((number, ids, len(ids)) for number, ids in enumerate(documents))
    write_shard(folder / "s", parts, vocab_size=259, tokenizer="")
    return open_shard(folder / "s")


def nats(model: Griffin, batch: Batch) -> torch.Tensor:
    hidden = model(batch.tokens, positions=batch.positions)
    return cross_entropy(hidden, model.embedding, batch.targets, soft_cap=model.config.logits_soft_cap)[0]


def test_packed_documents_equal_the_documents_alone(tmp_path: Path, make_model: Callable[..., Griffin]) -> None:
    model = make_model(dtype=torch.float64)
    shard = shard_of(tmp_path, [7, 1, 30, 2, 24])  # row of 64, window 16
    packed = nats(model, pack(shard, [0], 64))
    alone = torch.zeros((), dtype=torch.float64)
    for start, end in zip(shard.starts, shard.starts[1:], strict=False):
        tokens = torch.from_numpy(shard.tokens[start:end].astype("int64"))[None]
        if tokens.shape[1] > 1:
            hidden = model(tokens[:, :-1])
            alone += cross_entropy(hidden, model.embedding, tokens[:, 1:], soft_cap=model.config.logits_soft_cap)[0]
    assert_close(packed, alone, rtol=1e-12, atol=0)


def test_accumulated_batches_equal_the_big_batch(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, [50, 3, 1, 1, 60, 2, 80])
    parts = [pack(shard, rows, 16) for rows in ([0, 1, 2, 3], [4, 5], [12])]  # the last row is mostly filled up
    whole = pack(shard, [0, 1, 2, 3, 4, 5, 12], 16)
    results = []
    for batches in ([whole], parts):
        model = Griffin(PRESETS["griffin-tiny"], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        optimizer = make_optimizer(model.named_parameters(), CONFIG)
        results.append(
            (take_step(model, LanguageModel(), optimizer, batches, 1.0), [p.detach() for p in model.parameters()])
        )
    (a, weights_a), (b, weights_b) = results
    assert (a.count, a.num_tokens) == (b.count, b.num_tokens)
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-10)
    # AdamW's first step is a sign: where a gradient is all but zero it magnifies rounding.
    assert_close(weights_a, weights_b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    tmp_path: Path, where: str, make_model: Callable[..., Griffin]
) -> None:
    model = make_model()
    batch = pack(shard_of(tmp_path, [64]), [0, 1], 16)
    optimizer = make_optimizer(model.named_parameters(), CONFIG)
    assert take_step(model, LanguageModel(), optimizer, [batch], 1.0).taken
    norm = model.model.final_norm.weight
    if where == "weight":
        norm.data[3] = torch.inf  # the loss is not finite
    else:
        norm.register_hook(lambda gradient: gradient * torch.inf)  # the loss is, its gradient is not
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    averages = {p: {key: value.clone() for key, value in state.items()} for p, state in optimizer.state.items()}
    result = take_step(model, LanguageModel(), optimizer, [batch], 1.0)
    assert not result.taken
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
        assert parameter.grad is None
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(value, averages[parameter][key]), (name, key)


def test_the_gradient_is_clipped(tmp_path: Path) -> None:
    batch = pack(shard_of(tmp_path, [64]), [0, 1], 16)
    weights = []
    for clip in (1e-3, 1e3):
        model = Griffin(PRESETS["griffin-tiny"], generator=torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        result = take_step(model, LanguageModel(), optimizer, [batch], clip)
        moved = torch.stack([(p.detach() - b).norm() for p, b in zip(model.parameters(), before, strict=True)]).norm()
        weights.append((float(moved), result.grad_norm))
    (clipped, norm), (free, norm_again) = weights
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    assert free == pytest.approx(norm, rel=1e-3)
    assert norm == norm_again


def test_one_batch_is_learnt_by_heart(tmp_path: Path) -> None:
    model = Griffin(PRESETS["griffin-tiny"], generator=torch.Generator().manual_seed(0))
    batch = pack(shard_of(tmp_path, [20, 28]), [0, 1, 2], 16)
    optimizer = make_optimizer(model.named_parameters(), CONFIG)
    set_learning_rate(optimizer, 1e-2)
    losses = [
        result.loss / result.count
        for result in (take_step(model, LanguageModel(), optimizer, [batch], 1.0) for _ in range(120))
    ]
    assert losses[0] > 5
    assert losses[-1] < 0.02


def test_bits_per_byte_of_a_model_that_knows_nothing(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    text = "é, and two bytes\n" * 5
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    parts = [(number, ids, tokenizer.token_bytes(ids)) for number in range(2)]
    write_shard(tmp_path / "s", parts, vocab_size=259, tokenizer="")
    model = Griffin(PRESETS["griffin-tiny"])
    with torch.no_grad():
        model.embedding.zero_()  # every logit is 0
    validation = Validation.of(
        open_shard(tmp_path / "s"),
        tokenizer,
        num_rows=100,
        row_tokens=32,
        batch_rows=3,
        device=torch.device("cpu"),
    )
    loss, bits = validation.measure(model)
    tokens, num_bytes = 2 * (len(ids) - 1), 2 * len(text.encode())
    assert loss == pytest.approx(torch.tensor(259.0).log().item())
    assert bits == pytest.approx(torch.tensor(259.0).log2().item() * tokens / num_bytes)


def test_a_step_without_a_token_to_predict_changes_nothing(make_model: Callable[..., Griffin], tmp_path: Path) -> None:
    """Documents of one token each: weight decay alone would move the weights."""
    model = make_model()
    optimizer = make_optimizer(model.named_parameters(), CONFIG)
    batch = pack(shard_of(tmp_path, [1] * 64), [0, 1], 16)
    assert not (batch.targets != NOT_COUNTED).any()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    result = take_step(model, LanguageModel(), optimizer, [batch, batch], 1.0)
    assert (result.loss, result.count, result.taken) == (0.0, 0, False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_gradients_left_behind_are_no_part_of_the_step(make_model: Callable[..., Griffin], tmp_path: Path) -> None:
    batch = pack(shard_of(tmp_path, [64]), [0, 1], 16)
    results = []
    for left in (False, True):
        model = make_model()
        optimizer = make_optimizer(model.named_parameters(), CONFIG)
        if left:
            nats(model, batch).backward()
        results.append(
            (take_step(model, LanguageModel(), optimizer, [batch], 1.0), [p.detach() for p in model.parameters()])
        )
        assert all(parameter.grad is None for parameter in model.parameters())
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_validation_text_with_nothing_to_predict_is_refused_by_name(tmp_path: Path) -> None:
    shard = shard_of(tmp_path, [1] * 8)
    how = {"num_rows": 2, "row_tokens": 4, "batch_rows": 1, "device": torch.device("cpu")}
    with pytest.raises(GriffinError, match="the text to validate on has nothing to predict"):
        Validation.of(shard, Tokenizer.bytes(), **how)  # type: ignore[arg-type]


def test_a_target_that_does_not_count_has_no_gradient(make_model: Callable[..., Griffin]) -> None:
    """Of a chat the answers count: the gradient is that of their logits alone, written out."""
    model = make_model(dtype=torch.float64, logits_soft_cap=None)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 259, (2, 24), generator=generator)
    targets = torch.randint(0, 259, (2, 24), generator=generator)
    counted = torch.zeros(2, 24, dtype=torch.bool)
    counted[0, 5:9], counted[1, 20:] = True, True
    batch = Batch(tokens, torch.where(counted, targets, NOT_COUNTED), torch.arange(24).expand(2, 24))
    objective = LanguageModel()
    assert objective.count(batch) == 8
    gradients = torch.autograd.grad(objective.loss(model, batch), list(model.parameters()))

    hidden = model(tokens)
    logits = hidden @ model.embedding.T
    wanted = (logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0])[counted].sum()
    expected = torch.autograd.grad(wanted, list(model.parameters()))
    assert_close(gradients, expected, rtol=1e-9, atol=1e-12)

    other = Batch(tokens, torch.where(counted, targets, NOT_COUNTED), batch.positions)
    other.tokens[0, 9:] = 7  # nothing counts behind it
    again = torch.autograd.grad(objective.loss(model, other), list(model.parameters()))
    assert_close(again, gradients, rtol=1e-12, atol=1e-14)
