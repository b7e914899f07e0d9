"""States on disk: exact, refused when damaged or of another model, never half-written."""

from __future__ import annotations

import copy
import errno
import gc
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from griffin import PRESETS, Griffin, GriffinError, State, state_file
from griffin import files as files_module
from griffin.state_file import load_both, load_metadata
from tests.fuzz import attack

MakeModel = Callable[..., Griffin]


def advanced(model: Griffin, T: int = 40) -> State:
    state = model.new_state(2)
    with torch.no_grad():
        model(torch.randint(0, 259, (2, T)), state)
    return state


@pytest.mark.parametrize("family", ["griffin-tiny", "hawk-tiny", "transformer-tiny"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(make_model: MakeModel, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = make_model(family, dtype=dtype)
    state = advanced(model)
    state.save(tmp_path / "s.safetensors", model, metadata={"text": "à bientôt"})
    back = State.load(tmp_path / "s.safetensors", model)
    for name, tensor in state.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    assert load_metadata(tmp_path / "s.safetensors") == {"text": "à bientôt"}
    following = torch.randint(0, 259, (2, 30))
    with torch.no_grad():
        assert torch.equal(model(following, back), model(following, state))


def test_another_model_s_state_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    advanced(model).save(tmp_path / "s", model)
    with pytest.raises(GriffinError, match="another model"):
        State.load(tmp_path / "s", make_model(seed=1))
    with pytest.raises(GriffinError, match="another model"):
        State.load(tmp_path / "s", make_model(window=15))


def test_another_dtype_is_refused_with_the_reason(make_model: MakeModel, tmp_path: Path) -> None:
    rounded = make_model(dtype=torch.bfloat16)
    advanced(rounded).save(tmp_path / "s", rounded)
    wide = make_model()
    wide.load_state_dict({name: p.float() for name, p in rounded.state_dict().items()})
    with pytest.raises(GriffinError, match="the dtype it had when the state was saved"):
        State.load(tmp_path / "s", wide)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_is_refused_or_changes_nothing(
    make_model: MakeModel, tmp_path: Path, where: float, bit: int, cut: bool
) -> None:
    model = make_model()
    torch.manual_seed(0)
    state = advanced(model)
    state.save(tmp_path / "s", model, metadata={"text": "to be or not to be"})
    data = bytearray((tmp_path / "s").read_bytes())
    place = int(where * len(data))
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    (tmp_path / "s").write_bytes(data)
    try:
        back, metadata = load_both(tmp_path / "s", model)
    except GriffinError:
        return
    except Exception as error:
        pytest.fail(f"byte {place}: {type(error).__name__}: {error}")
    assert same(back, state), place  # a blank of the header
    assert metadata == {"text": "to be or not to be"}


def same(left: State, right: State) -> bool:
    """Bit for bit."""
    mine, theirs = left.tensors(), right.tensors()
    return left.longest == right.longest and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def forge(
    path: Path,
    *,
    tensors: dict[str, Tensor] | None = None,
    fields: dict[str, str] | None = None,
    text: str | None = None,
) -> None:
    """Change a file as an adversary would, who makes the checksum fit."""
    with safe_open(path, "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        told = {**file.metadata(), **(fields or {})}
    held |= tensors or {}
    if text is not None:
        held["metadata"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    save_file(held, path, {**told, "sha256": state_file._digest(told, held)})


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("family", ["griffin-tiny", "transformer-tiny"])
@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        ({"position": torch.tensor([40, -7])}, {}, r"a row stands at -7, not in 0 \.\. 40"),
        ({"position": torch.tensor([2**63 - 1, 0])}, {}, r"stands at 9223372036854775807, not in 0 \.\. 40"),
        ({"position": torch.tensor([-(2**63), 0])}, {}, "stands at -9223372036854775808"),
        ({}, {"longest": "39"}, r"stands at 40, not in 0 \.\. 39"),
        ({}, {"longest": "-5"}, "'-5' tokens read"),
        ({}, {"longest": "4_0"}, "'4_0' tokens read"),
        ({}, {"longest": "9" * 5000}, "tokens read"),
        ({}, {"longest": str(2**48)}, "tokens read"),
        ({}, {"longest": "\u0664\u0660"}, "tokens read"),
        ({"position": torch.zeros(2, dtype=torch.int16)}, {}, "'position' is I16"),
        ({"position": torch.zeros(2, dtype=torch.int32)}, {}, "position is torch.int32, and this model needs"),
        ({"position": torch.zeros(2)}, {}, r"position is torch\.float32, and this model needs torch\.int64"),
        ({"position": torch.tensor(40)}, {}, r"position is \(\), and this model needs"),
        ({"position": torch.zeros(2_000_000, dtype=torch.int64)}, {}, r"this model needs \(2000000, "),
        ({"layers.9.h": torch.zeros(2, 48)}, {}, "'layers.9.h' is in one of them only"),
        ({}, {"fingerprint": "0" * 64}, "another model"),
        ({}, {"format": "griffin-state-1"}, "is of an older version .* read its text again with this version"),
        ({}, {"format": "\n"}, r"its format is '\\n'"),
        ({}, {"more": "fields"}, "its header is not one of griffin-state-2"),
    ],
)
def test_forged_values_are_refused_in_one_line(
    make_model: MakeModel,
    tmp_path: Path,
    family: str,
    tensors: dict[str, Tensor],
    fields: dict[str, str],
    message: str,
) -> None:
    model = make_model(family)
    advanced(model).save(tmp_path / "s", model)
    forge(tmp_path / "s")
    State.load(tmp_path / "s", model)
    forge(tmp_path / "s", tensors=tensors, fields=fields)
    with pytest.raises(GriffinError, match=message) as caught:
        State.load(tmp_path / "s", model)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["layers.0.h", "layers.1.conv", "layers.2.keys", "layers.2.values"])
def test_nan_and_infinity_are_neither_loaded_nor_saved(
    make_model: MakeModel, tmp_path: Path, name: str, value: float
) -> None:
    model = make_model()
    state = advanced(model)
    state.save(tmp_path / "s", model)
    before = (tmp_path / "s").read_bytes()
    state.tensors()[name].view(-1)[-1] = value
    with pytest.raises(GriffinError, match=rf"the state holds NaN or infinity \({name}\)"):
        state.save(tmp_path / "s", model)
    assert (tmp_path / "s").read_bytes() == before
    forge(tmp_path / "s", tensors={name: state.tensors()[name]})
    with pytest.raises(GriffinError, match=rf"holds NaN or infinity \({name}\)"):
        State.load(tmp_path / "s", model)


def test_slots_of_global_attention_must_hold_what_was_read(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("transformer-tiny")
    state = advanced(model)
    state.save(tmp_path / "s", model)
    few = {name: state.tensors()[name][:, :39].contiguous() for name in state.growing()}
    forge(tmp_path / "s", tensors=few)
    with pytest.raises(GriffinError, match="39 slots for 40 tokens"):
        State.load(tmp_path / "s", model)
    state.save(tmp_path / "s", model)
    forge(tmp_path / "s", tensors={"layers.0.keys": few["layers.0.keys"]})
    with pytest.raises(GriffinError, match="different numbers of slots"):
        State.load(tmp_path / "s", model)


def test_nothing_of_a_forged_size_is_made(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    advanced(model).save(tmp_path / "s", model)
    forge(tmp_path / "s", tensors={"position": torch.zeros(300_000, dtype=torch.int64)})
    made: list[int] = []
    new_state = model.new_state
    monkeypatch.setattr(model, "new_state", lambda rows: made.append(rows) or new_state(rows))
    with pytest.raises(GriffinError, match="damaged"):
        State.load(tmp_path / "s", model)
    assert made == [0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 200_000, "nested more than 100 deep"),
        ("[]", "is not an object of strings"),
        ("null", "is not an object of strings"),
        ('{"a": 1}', "is not an object of strings"),
        ('{"a": "\\ud800"}', "half a surrogate pair"),
        ("{", "is not JSON"),
    ],
)
def test_forged_metadata_is_refused(make_model: MakeModel, tmp_path: Path, text: str, message: str) -> None:
    model = make_model()
    advanced(model).save(tmp_path / "s", model)
    forge(tmp_path / "s", text=text)
    for read in (lambda: State.load(tmp_path / "s", model), lambda: load_metadata(tmp_path / "s")):
        with pytest.raises(GriffinError, match=message) as caught:
            read()
        assert len(str(caught.value).splitlines()) == 1
    forge(tmp_path / "s", tensors={"metadata": torch.full((3,), 255, dtype=torch.uint8)})
    with pytest.raises(GriffinError, match="metadata is not UTF-8"):
        State.load(tmp_path / "s", model)


def test_headers_that_cannot_be(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GriffinError, match="is a pipe"):
        State.load(tmp_path / "pipe", model)
    names = {f"n{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(30_000)}
    header = json.dumps({"__metadata__": {"format": "griffin-state-2"}, **names}).encode()
    (tmp_path / "many").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(GriffinError, match="has a header of"):
        State.load(tmp_path / "many", model)
    # Tensors that do not begin where their dtype may: no matter.
    state = advanced(model)
    state.save(tmp_path / "s", model, metadata={"a": "b"})
    data = (tmp_path / "s").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    told = json.loads(data[8 : 8 + length])
    size = told["metadata"]["data_offsets"][1] - told["metadata"]["data_offsets"][0]
    assert size % 8
    for name, entry in told.items():
        if name != "__metadata__":
            offsets = [offset + size for offset in entry["data_offsets"]]
            entry["data_offsets"] = [0, size] if name == "metadata" else offsets
    header = json.dumps(told).encode()
    start = 8 + length
    body = data[len(data) - size :] + data[start : len(data) - size]
    (tmp_path / "s").write_bytes(struct.pack("<Q", len(header)) + header + body)
    assert same(State.load(tmp_path / "s", model), state)


@pytest.mark.parametrize("family", ["griffin-tiny", "transformer-tiny"])
def test_a_fuzzer_finds_nothing(make_model: MakeModel, tmp_path: Path, family: str) -> None:
    model = make_model(family)
    state = advanced(model)
    state.save(tmp_path / "s", model, metadata={"text": "to be"})

    def read() -> tuple[State, dict[str, str]]:
        back, metadata = load_both(tmp_path / "s", model)
        assert load_metadata(tmp_path / "s") == metadata
        return back, metadata

    attack([tmp_path / "s"], read, lambda got: same(got[0], state) and got[1] == {"text": "to be"}, seconds=1)


@pytest.mark.parametrize("family", ["griffin-tiny", "transformer-tiny"])
def test_a_fuzzer_finds_nothing_behind_the_checksum(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """An adversary's checksum fits. Values may be others then, but what is accepted can be gone on from."""
    model = make_model(family)
    advanced(model).save(tmp_path / "s", model, metadata={"text": "to be"})
    monkeypatch.setattr(state_file, "_digest", lambda fields, tensors: fields.get("sha256"))

    def go_on() -> bool:
        back, metadata = load_both(tmp_path / "s", model)
        with torch.no_grad():
            for T in (1, 20):
                model(torch.zeros(back.batch_size, T, dtype=torch.int64), back)
        return all(isinstance(text, str) for text in metadata.values())

    attack([tmp_path / "s"], go_on, bool, seconds=1)


def test_a_state_is_tensors_and_plain_values(make_model: MakeModel) -> None:
    model = make_model("griffin-mini" if "griffin-mini" in PRESETS else "griffin-tiny")
    state = advanced(model)
    assert len(pickle.dumps(state)) < state.nbytes + 10_000
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert same(twin, state)
        assert not any(isinstance(value, torch.nn.Module) for value in gc.get_referents(twin))
        with torch.no_grad():
            following = torch.randint(0, 259, (2, 5))
            assert torch.equal(model(following, twin), model(following, state.clone()))


def test_a_state_is_saved_with_the_model_that_made_it(make_model: MakeModel, tmp_path: Path) -> None:
    model, other = make_model(), make_model(seed=1)
    state = advanced(model)
    with pytest.raises(GriffinError, match="made by another model"):
        state.save(tmp_path / "s", other)
    assert not (tmp_path / "s").exists()
    twin = copy.deepcopy(model)
    state.save(tmp_path / "s", twin)  # a copy is the same model
    back = State.load(tmp_path / "s", make_model())  # and so is one of equal weights
    assert same(back, state)
    with torch.no_grad():
        twin.embedding[7, 3] += 1
    with pytest.raises(GriffinError, match="another model"):
        State.load(tmp_path / "s", twin)


def test_neither_default_device_nor_default_dtype_matters(make_model: MakeModel, tmp_path: Path) -> None:
    for family in ("griffin-tiny", "transformer-tiny"):
        model = make_model(family)
        state = advanced(model)
        torch.set_default_dtype(torch.float64)
        try:
            with torch.device("meta"):
                fresh, twin = model.new_state(2), state.clone()
                fresh.set_rows_(range(2), state.rows(torch.tensor([0, 1], device="cpu")))
                assert same(twin, state)
                assert same(fresh, state) or family == "transformer-tiny"  # slots may be more
                state.save(tmp_path / "s", model, metadata={"a": "b"})
                back, metadata = load_both(tmp_path / "s", model)
        finally:
            torch.set_default_dtype(torch.float32)
        assert same(back, state)
        assert metadata == {"a": "b"}
        assert back.position.device.type == "cpu"


def test_home_is_understood(make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = make_model()
    state = advanced(model)
    state.save("~/s", model, metadata={"a": "b"})
    assert same(State.load(tmp_path / "s", model), state)
    assert load_metadata("~/s") == {"a": "b"}
    with pytest.raises(GriffinError, match="does not exist"):
        State.load("~nobody-of-this-name/s", model)


def test_missing_and_foreign_files(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(GriffinError, match="does not exist"):
        State.load(tmp_path / "none", model)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(GriffinError, match=r"text cannot be read \(.* give a state saved with State\.save"):
        State.load(tmp_path / "text", model)
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(GriffinError, match="is not a state"):
        State.load(tmp_path / "other", model)


def test_a_full_disk_leaves_the_old_file(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    advanced(model, 10).save(tmp_path / "s", model)
    old = (tmp_path / "s").read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        advanced(model, 20).save(tmp_path / "s", model)
    assert (tmp_path / "s").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
