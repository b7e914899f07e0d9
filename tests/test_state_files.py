"""States on disk: exact, refused when damaged or of another model, never half-written."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from griffin import Griffin, GriffinError, State
from griffin import files as files_module
from griffin.state import load_metadata

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
    state.save(tmp_path / "s.safetensors", metadata={"text": "à bientôt"})
    back = State.load(tmp_path / "s.safetensors", model)
    for name, tensor in state.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    assert load_metadata(tmp_path / "s.safetensors") == {"text": "à bientôt"}
    following = torch.randint(0, 259, (2, 30))
    with torch.no_grad():
        assert torch.equal(model(following, back), model(following, state))


def test_another_model_s_state_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    advanced(make_model()).save(tmp_path / "s")
    with pytest.raises(GriffinError, match="another model"):
        State.load(tmp_path / "s", make_model(seed=1))
    with pytest.raises(GriffinError, match="another model"):
        State.load(tmp_path / "s", make_model(window=15))


def test_another_dtype_is_refused_with_the_reason(make_model: MakeModel, tmp_path: Path) -> None:
    rounded = make_model(dtype=torch.bfloat16)
    advanced(rounded).save(tmp_path / "s")
    wide = make_model()
    wide.load_state_dict({name: p.float() for name, p in rounded.state_dict().items()})
    with pytest.raises(GriffinError, match="the dtype it had when the state was saved"):
        State.load(tmp_path / "s", wide)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_any_damage_is_refused(make_model: MakeModel, tmp_path: Path, where: float, bit: int, cut: bool) -> None:
    model = make_model()
    advanced(model).save(tmp_path / "s")
    data = bytearray((tmp_path / "s").read_bytes())
    place = int(where * len(data))
    if cut:
        del data[place:]
    else:
        data[place] ^= 1 << bit
    (tmp_path / "s").write_bytes(data)
    try:
        back = State.load(tmp_path / "s", model)
    except GriffinError:
        return
    except Exception as error:
        pytest.fail(f"byte {place}: {type(error).__name__}: {error}")
    # A flip may fall on what carries nothing (the header's blanks, its metadata's text); then the state is the state.
    (tmp_path / "t").unlink(missing_ok=True)
    assert int(back.position[0]) == 40


def test_missing_and_foreign_files(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(GriffinError, match="does not exist"):
        State.load(tmp_path / "none", model)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(GriffinError, match="cannot be read as a state"):
        State.load(tmp_path / "text", model)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(GriffinError, match="is not a state"):
        State.load(tmp_path / "other", model)


def test_a_full_disk_leaves_the_old_file(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    advanced(model, 10).save(tmp_path / "s")
    old = (tmp_path / "s").read_bytes()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        advanced(model, 20).save(tmp_path / "s")
    assert (tmp_path / "s").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
