"""Files and folders appear whole or not at all, under the name that was asked for, with the usual permissions."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from griffin import GriffinError
from griffin.files import remove_folder, save_tensors, whole_file, whole_folder


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def tree(folder: Path) -> dict[str, str | None]:
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_text() if path.is_file() else None for path in paths}


def write(path: Path, text: str = "new") -> None:
    with whole_folder(path) as folder:
        (folder / "file").write_text(text)


def test_permissions_are_those_of_any_new_file(tmp_path: Path, umask: int) -> None:
    """Tensors too, which safetensors writes private, and whatever lies deeper in a folder."""
    with whole_folder(tmp_path / "folder") as folder:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b"):
            save_tensors({"x": torch.ones(2)}, folder / name, {})
        (folder / "c").write_text("")
    with whole_file(tmp_path / "file") as file:
        save_tensors({"x": torch.ones(2)}, file, {})
    for path in (tmp_path / "folder", tmp_path / "folder" / "deep"):
        assert mode(path) == 0o777 & ~umask
    for name in ("folder/a", "folder/deep/b", "folder/c", "file"):
        assert mode(tmp_path / name) == 0o666 & ~umask, name


def test_what_was_private_stays_private(tmp_path: Path) -> None:
    write(tmp_path / "folder")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").chmod(0o700)
    (tmp_path / "file").chmod(0o600)
    write(tmp_path / "folder")
    with whole_file(tmp_path / "file") as file:
        file.write_text("new")
    assert mode(tmp_path / "folder") == 0o700
    assert mode(tmp_path / "file") == 0o600


def test_a_link_still_leads_to_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    write(tmp_path / "big" / "real", "old")
    (tmp_path / "big" / "real.txt").write_text("old")
    (tmp_path / "link").symlink_to("big/real")
    (tmp_path / "link.txt").symlink_to("big/real.txt")
    (tmp_path / "dangling").symlink_to("big/later")
    write(tmp_path / "link")
    write(tmp_path / "dangling")
    with whole_file(tmp_path / "link.txt") as file:
        file.write_text("new")
    assert all((tmp_path / name).is_symlink() for name in ("link", "link.txt", "dangling"))
    new = {"real": None, "real/file": "new", "real.txt": "new", "later": None, "later/file": "new"}
    assert tree(tmp_path / "big") == dict(sorted(new.items()))
    assert sorted(os.listdir(tmp_path)) == ["big", "dangling", "link", "link.txt"]


def test_a_path_with_dots(tmp_path: Path) -> None:
    write(tmp_path / "m", "old")
    write(tmp_path / "m" / ".." / "m")
    assert tree(tmp_path) == {"m": None, "m/file": "new"}


def test_a_rename_that_fails_puts_the_old_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError(5, "Input/output error", str(self), None, str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        write(tmp_path / "m")
    assert tree(tmp_path) == {"m": None, "m/file": "old"}
    assert caught.value.filename == str(tmp_path / "m")


@pytest.mark.parametrize("whole", [whole_file, whole_folder])
def test_what_cannot_be_replaced_is_left(tmp_path: Path, whole: Callable[[Path], object]) -> None:
    if whole is whole_file:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "thesis").write_text("years of work")
        os.mkfifo(tmp_path / "pipe")
    else:
        (tmp_path / "x").write_text("years of work")
        (tmp_path / "pipe").symlink_to("x")
    before = tree(tmp_path) if whole is whole_folder else os.listdir(tmp_path)
    for name in ("x", "pipe"):
        with pytest.raises(GriffinError, match=f"{name} is no"), whole(tmp_path / name):  # type: ignore[attr-defined]
            pass
    assert (tree(tmp_path) if whole is whole_folder else os.listdir(tmp_path)) == before


def test_errors_name_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GriffinError, match=r"^model/none/x cannot be written: ") as wrong, whole_folder("model") as new:
        save_tensors({"x": torch.ones(2)}, new / "none" / "x", {})
    assert ".tmp" not in str(wrong.value)
    with pytest.raises(OSError, match=r"'model/none/x'") as gone, whole_folder("model") as new:
        (new / "none" / "x").write_text("")
    assert gone.value.filename == "model/none/x"
    (tmp_path / "x").write_text("old")
    with pytest.raises(GriffinError, match=r"^x is full$"), whole_file("x") as file:
        raise GriffinError(f"{file} is full")
    with pytest.raises(OSError, match="'x'"), whole_file("x") as file:
        file.unlink()
    assert tree(tmp_path) == {"x": "old"}


def test_the_longest_name_a_file_can_have(tmp_path: Path) -> None:
    for name in ("é" * 127, "x" * 255):
        write(tmp_path / name)
        assert (tmp_path / name / "file").read_text() == "new"


def test_removal_takes_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed half way through the files leaves nothing under the folder's own name."""
    write(tmp_path / "step_1")

    def killed(path: Path) -> None:
        (path / "file").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(tmp_path / "step_1")
    monkeypatch.undo()
    assert not (tmp_path / "step_1").exists()
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".step_1.")
    assert left.endswith(".old")
