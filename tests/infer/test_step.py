"""DecodeStep: the recorded step is the model's forward, bit for bit, wherever it can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from griffin import Griffin, State
from griffin.infer import step as module
from griffin.infer.step import DecodeStep
from griffin.ops.cpu import library
from griffin.ops.cpu.record import NotRecordableError, Program, recording
from griffin.quantize import quantize

MakeModel = Callable[..., Griffin]

needs_kernels = pytest.mark.skipif(not library.status()[0], reason=f"no kernels: {library.status()[1]}")


@pytest.fixture(params=["float32", "bfloat16", "int8", "int4"])
def model(request: pytest.FixtureRequest, make_lively: MakeModel) -> Griffin:
    return _model(make_lively, request.param)


def _model(make: MakeModel, form: str, preset: str = "griffin-tiny", **changes: object) -> Griffin:
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    made = make(preset, dtype=dtype, **changes)
    return quantize(made, form) if form.startswith("int") else made


@torch.no_grad()
def _forward(model: Griffin, tokens: Tensor, state: State) -> Tensor:
    return model.logits(model(tokens[:, None], state))[:, -1]


def _read(model: Griffin, lengths: list[int]) -> State:
    state = model.new_state(len(lengths))
    T = max(lengths)
    with torch.no_grad():
        model(torch.randint(0, model.config.vocab_size, (len(lengths), T)), state, lengths=torch.tensor(lengths))
    return state


def _follow(model: Griffin, state: State, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """What a step and the forward give for the same tokens; then the two states must be equal."""
    other, step = state.clone(), DecodeStep(model, state)
    for _ in range(steps):
        tokens = torch.randint(0, model.config.vocab_size, (state.batch_size,))
        yield step(tokens).clone(), _forward(model, tokens, other)
    assert (step.kept == "kernels") == library.status()[0]
    assert state.longest == other.longest
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, other.tensors()[name])


@pytest.mark.parametrize("lengths", [[1], [3, 30, 1]])
def test_a_step_is_the_forward(model: Griffin, lengths: list[int]) -> None:
    window = model.config.window
    assert window is not None
    for got, wanted in _follow(model, _read(model, lengths), window + 3):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("preset", ["hawk-tiny", "transformer-tiny"])
def test_a_step_of_other_architectures(make_lively: MakeModel, preset: str) -> None:
    model = _model(make_lively, "float32", preset)
    for got, wanted in _follow(model, _read(model, [2, 5]), 20):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("changes", [{"logits_soft_cap": None, "embedding_scale": "none"}, {"window": None}])
def test_a_step_of_other_settings(make_lively: MakeModel, changes: dict[str, object]) -> None:
    model = _model(make_lively, "float32", **changes)
    for got, wanted in _follow(model, _read(model, [2, 5]), 40):  # global attention grows several times
        assert torch.equal(got, wanted)


def test_a_new_state_starts_a_document(model: Griffin) -> None:
    for got, wanted in _follow(model, model.new_state(2), 3):
        assert torch.equal(got, wanted)


def test_no_rows(model: Griffin) -> None:
    assert DecodeStep(model, model.new_state(0))(torch.zeros(0, dtype=torch.int64)).shape == (
        0,
        model.config.vocab_size,
    )


@needs_kernels
def test_any_number_of_rows_gives_each_the_same_bits(model: Griffin) -> None:
    """Up to 16, whose products are our kernels': who decodes beside a row, and how many, cannot change it."""
    state, tokens = _read(model, [20] * 16), torch.randint(0, model.config.vocab_size, (16,))
    alone = torch.cat([DecodeStep(model, state.rows([row]))(tokens[row : row + 1]).clone() for row in range(16)])
    for count in range(2, 17):
        assert torch.equal(DecodeStep(model, state.rows(range(count)))(tokens[:count]), alone[:count])


@needs_kernels
def test_any_number_of_threads_gives_the_same_bits(make_lively: MakeModel) -> None:
    model, found = _model(make_lively, "float32"), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        step = DecodeStep(model, model.new_state(1))
        found.append(torch.cat([step(torch.tensor([token])).clone() for token in range(20)]))
    torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_kernels
@torch.no_grad()
def test_changed_and_moved_parameters_are_seen(make_lively: MakeModel) -> None:
    model, tokens = _model(make_lively, "float32"), torch.tensor([5])
    state = _read(model, [4])
    other, step = state.clone(), DecodeStep(model, state)
    assert torch.equal(step(tokens), _forward(model, tokens, other))
    model.embedding.mul_(2)
    assert torch.equal(step(tokens), _forward(model, tokens, other))
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5  # other memory, as model.to() gives
    assert torch.equal(step(tokens), _forward(model, tokens, other))
    assert torch.equal(step(tokens), _forward(model, tokens, other))


@needs_kernels
@torch.no_grad()
def test_replaced_parameters_and_modules_are_seen(make_lively: MakeModel) -> None:
    model, tokens = _model(make_lively, "float32"), torch.tensor([5])
    state = _read(model, [4])
    other, step = state.clone(), DecodeStep(model, state)

    def bias() -> None:
        model.model.layers[0].mlp_block.up_proj.bias = nn.Parameter(torch.randn(model.config.mlp_width))

    def module() -> None:
        layers = model.model.layers
        layers[0].mlp_block, layers[1].mlp_block = layers[1].mlp_block, layers[0].mlp_block

    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: model.load_state_dict(_model(make_lively, "float32", seed=5).state_dict(), assign=True),
        bias,
        module,
        lambda: quantize(model, "int8"),
    ]
    before = _forward(model, tokens, other.clone())
    for change in changes:
        change()
        for _ in range(2):
            wanted = _forward(model, tokens, other)
            assert torch.equal(step(tokens), wanted)
        assert change is changes[0] or not torch.equal(wanted, before)
        assert step.kept == "kernels"
        before = wanted


@needs_kernels
@pytest.mark.parametrize("inside", [(True, False), (False, True)])
def test_inference_mode_may_come_and_go(make_lively: MakeModel, inside: tuple[bool, bool]) -> None:
    for preset in ("griffin-tiny", "transformer-tiny"):
        model = _model(make_lively, "float32", preset)
        state = _read(model, [4])
        other, tokens = state.clone(), torch.tensor([5])
        with torch.inference_mode(inside[0]), torch.no_grad():
            step = DecodeStep(model, state)
        for index in range(12):
            with torch.inference_mode(inside[index % 2]), torch.no_grad():
                assert torch.equal(step(tokens).add_(0), _forward(model, tokens, other))


@needs_kernels
def test_autocast_changes_nothing(make_lively: MakeModel) -> None:
    model = _model(make_lively, "float32")
    state = _read(model, [4])
    other, step, tokens = state.clone(), DecodeStep(model, state), torch.tensor([5])
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = step(tokens)
        assert torch.equal(found, _forward(model, tokens, other))
    assert step.kept == "kernels"


@needs_kernels
def test_what_is_no_kernel_is_not_recorded_but_computed(make_lively: MakeModel) -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    model = _model(make_lively, "float32")
    last = model.model.layers[-1]
    last.mlp_block = Doubled(last.mlp_block)
    state = _read(model, [4])
    other, step = state.clone(), DecodeStep(model, state)
    tokens = torch.tensor([5])
    with pytest.warns(UserWarning, match=r"operation by operation.*aten\.mul"):
        assert torch.equal(step(tokens), _forward(model, tokens, other))
    assert step.kept is None
    assert torch.equal(step(tokens), _forward(model, tokens, other))
    assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), other.tensors().values(), strict=True))


def test_without_kernels_every_step_is_a_forward(make_lively: MakeModel) -> None:
    model = _model(make_lively, "float32")
    with library.without_kernels():
        for got, wanted in _follow(model, _read(model, [3, 1]), 4):
            assert torch.equal(got, wanted)


class Repeated:
    """What `Captured` does of a function, on a CPU: two calls that count for nothing, then one for each launch."""

    def __init__(self, function: Callable[[], Tensor], device: torch.device) -> None:
        self.function = function
        function(), function()

    def __call__(self) -> Tensor:
        return self.function()


@pytest.mark.parametrize("preset", ["griffin-tiny", "transformer-tiny"])
def test_a_graph_is_the_forward(make_lively: MakeModel, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """The bookkeeping around a CUDA graph: what its warm-up does to the state is undone, and slots may grow."""
    monkeypatch.setattr(module, "Captured", Repeated)
    model = _model(make_lively, "float32", preset)
    state = _read(model, [3, 1])
    other, step = state.clone(), DecodeStep(model, state, lambda logits: logits.argmax(dim=-1))
    step.kept = "graph"
    tokens = torch.tensor([5, 7])
    for _ in range(12):
        wanted = _forward(model, tokens, other).argmax(dim=-1)
        tokens = step(tokens)
        assert torch.equal(tokens, wanted)
    assert state.longest == other.longest
    for name, tensor in state.tensors().items():
        assert torch.equal(
            tensor[:, : other.tensors()[name].shape[1]] if tensor.dim() > 1 else tensor, other.tensors()[name]
        )


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["griffin-tiny", "transformer-tiny"])
def test_a_cuda_graph_is_the_forward(make_lively: MakeModel, preset: str) -> None:
    model = _model(make_lively, "bfloat16", preset).cuda()
    state = model.new_state(2)
    other, step = state.clone(), DecodeStep(model, state)
    for token in range(20):
        tokens = torch.tensor([token, 2 * token], device="cuda")
        torch.testing.assert_close(step(tokens), _forward(model, tokens, other))


def test_wrong_tokens_change_nothing(model: Griffin) -> None:
    state = _read(model, [4])
    step, before = DecodeStep(model, state), state.clone()
    for _ in range(2):
        with pytest.raises(ValueError, match=f"token {model.config.vocab_size} is not in the vocabulary"):
            step(torch.tensor([model.config.vocab_size]))
        with pytest.raises(ValueError, match="the state has 1 rows"):
            step(torch.tensor([1, 2]))
        assert all(torch.equal(a, b) for a, b in zip(state.tensors().values(), before.tensors().values(), strict=True))
        step(torch.tensor([1]))
        before = state.clone()


@needs_kernels
@torch.no_grad()
def test_a_program_reads_what_is_there_now() -> None:
    x, y = torch.ones(5), torch.ones(5)
    with recording() as calls:
        z = x + y + y
    program = Program(calls)
    del calls
    x.fill_(10)
    program.run()
    assert z.tolist() == [12] * 5
    with pytest.raises(NotRecordableError, match=r"aten\.mul"), recording():
        (x + y) * 2
