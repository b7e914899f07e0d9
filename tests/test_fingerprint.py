"""Every bit of every weight counts, no device or memory layout does, and no change is missed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from griffin import PRESETS, Griffin
from griffin import fingerprint as module
from griffin.fingerprint import fingerprint
from griffin.fingerprint import of as fingerprint_of
from griffin.quantize import quantize
from griffin.train.config import TrainConfig
from griffin.train.optim import make_optimizer

MakeModel = Callable[..., Griffin]
CONFIG = PRESETS["griffin-tiny"]


def of(tensor: Tensor) -> str:
    return fingerprint(CONFIG, {"a": tensor})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_one_bit_anywhere_changes_it(dtype: torch.dtype) -> None:
    bits = torch.randint(
        0, 256, (8 * 4096 * 9 + 24,), dtype=torch.uint8
    )  # nine rows of words, more than a block of them
    whole = of(bits.view(dtype))
    for place in (0, 1, 7, 8, 8 * 4096 - 1, 8 * 4096, 8 * 4096 * 8 + 3, len(bits) - 1):
        for bit in (0, 6, 7):
            bits[place] ^= 1 << bit
            assert of(bits.view(dtype)) != whole
            bits[place] ^= 1 << bit
    assert of(bits.view(dtype)) == whole


def test_changes_that_cancel_in_plain_sums_change_it() -> None:
    weights = torch.randn(5000)
    whole = of(weights)
    swapped, negated, moved = weights.clone(), weights.clone(), weights.clone()
    swapped[[3, 4001]] = weights[[4001, 3]]
    negated[[3, 5, 9, 11]] *= -1  # the highest bit of a word, which an odd factor leaves where it is
    moved[10], moved[11] = 0.0, -0.0
    zeros = torch.zeros(5000)
    assert len({whole, of(swapped), of(negated), of(moved), of(zeros), of(zeros[:4999])}) == 6
    assert of(zeros) != of(zeros.view(50, 100)) != of(zeros.view(50, 100).T.contiguous())
    assert of(zeros) != of(zeros.view(torch.int32))
    assert fingerprint(CONFIG, {"b": weights}) != whole


def test_neither_layout_order_nor_threads_nor_mode_change_it() -> None:
    weights = torch.randn(300, 500)
    whole = of(weights)
    assert of(weights.T.contiguous().T) == whole
    torch.set_num_threads(3)
    assert of(weights) == whole
    torch.set_num_threads(1)
    with torch.inference_mode():
        assert of(weights) == of(weights.clone()) == whole
    both = {"a": weights, "b": weights[:1]}
    assert fingerprint(CONFIG, both) == fingerprint(CONFIG, dict(reversed(both.items())))
    # Written down, so that files of one machine and version are read on others.
    assert of(torch.arange(10_000, dtype=torch.int64)) == (
        "1f17ff910dc1cabb23b72cfb264627c8194760da406155f9375ede433156c225"
    )


def test_models_that_differ_in_a_row_or_in_trained_tokens_differ(make_model: MakeModel) -> None:
    seen = set()
    for change in range(4):
        model = make_model()
        with torch.no_grad():
            if change == 1:
                model.embedding[1] += 1
            elif change == 2:
                model.embedding[100:110] += 1
            elif change == 3:
                model.model.layers[0].mlp_block.down_proj.weight[3] *= -5
        seen.add(fingerprint_of(model))
    assert len(seen) == 4


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []

    def counting(*args: object) -> str:
        calls.append(1)
        return fingerprint(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "fingerprint", counting)
    return calls


def test_it_is_computed_once_and_again_after_every_kind_of_change(make_model: MakeModel, counted: list[int]) -> None:
    model = make_model()
    fused = torch.optim.AdamW(model.parameters(), fused=True)  # its steps are not counted as writes
    ours = make_optimizer(
        [("o_proj.weight", model.embedding)], TrainConfig(model=CONFIG, train_data="-", steps=9, warmup_steps=1)
    )

    def step(optimizer: torch.optim.Optimizer) -> None:
        model(torch.zeros(1, 3, dtype=torch.int64)).square().sum().backward()
        optimizer.step()

    def replace() -> None:
        model.model.final_norm.weight = nn.Parameter(torch.ones(32))

    changes: list[Callable[[], object]] = [
        torch.no_grad()(lambda: model.embedding[5, 5].add_(1)),
        lambda: step(ours),
        lambda: step(fused),
        replace,
        lambda: setattr(model.embedding, "data", model.embedding.data + 1),
        # New memory twice, the second time often where the first was: neither address nor count of writes tells it.
        lambda: model.half().float(),
        lambda: model.load_state_dict(make_model(seed=3).state_dict()),
        lambda: model.load_state_dict(make_model(seed=4).state_dict(), assign=True),
        model.double,
        lambda: quantize(model, "int8"),
    ]
    seen = {fingerprint_of(model), fingerprint_of(model)}
    assert len(seen) == len(counted) == 1
    for index, change in enumerate(changes):
        change()
        seen |= {fingerprint_of(model), fingerprint_of(model)}
        assert len(seen) == len(counted) == index + 2
        assert fingerprint_of(model) == fingerprint(model.config, dict(model.named_parameters()))


def test_our_optimizer_has_its_writes_counted(make_model: MakeModel) -> None:
    model = make_model()
    before = [parameter._version for parameter in model.parameters()]
    optimizer = make_optimizer(
        model.named_parameters(), TrainConfig(model=CONFIG, train_data="-", steps=9, warmup_steps=1)
    )
    model(torch.zeros(1, 3, dtype=torch.int64)).square().sum().backward()
    optimizer.step()
    assert all(p._version > version for p, version in zip(model.parameters(), before, strict=True))


def test_copies_compute_their_own(make_model: MakeModel) -> None:
    model = make_model()
    whole = fingerprint_of(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fingerprint_of(twin) == whole
        with torch.no_grad():
            twin.embedding[0] += 1
        assert fingerprint_of(twin) != whole == fingerprint_of(model)


def test_weights_made_in_inference_mode_and_weights_that_are_not_there() -> None:
    with torch.inference_mode():
        model = Griffin(CONFIG, generator=torch.Generator().manual_seed(0))
        before = fingerprint_of(model)
        model.embedding.add_(1)  # PyTorch counts no writes here
        assert fingerprint_of(model) != before
    with pytest.raises(ValueError, match="on the meta device and has no values"):
        fingerprint_of(Griffin(CONFIG, device="meta"))
    assert Griffin(CONFIG, device="meta").new_state(1).nbytes > 0
