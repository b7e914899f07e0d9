"""Snapshots on disk: one checksummed file each. What fails is said, and counted, and done without."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from griffin import fingerprint, state_file
from griffin.errors import GriffinError, one_line
from griffin.model import Griffin
from griffin.state import State

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Owner:
    """Who may be given a snapshot: what any two of must differ in none of these to share."""

    fingerprint: str  # of the model's weights
    adapter: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Found:
    """A file that was there already."""

    owner: Owner
    tokens: list[int]
    file: Path
    nbytes: int


class SnapshotFiles:
    """Files FOLDER/MODEL/NAME.safetensors, MODEL from its fingerprint, NAME from the owner and the tokens.

    A disk that is full, a folder that cannot be written, a file that is damaged or gone: each is given to `say` in one
    line, the same reason once, and counted; nothing is raised.

    Args:
        folder: made when first written to.
        model: whose states they are.
        int8_window: write windows in 8 bits.
        say: is told what failed.

    Attributes:
        failures: how many files could not be written or read.
    """

    def __init__(self, folder: Path, model: Griffin, *, int8_window: bool, say: Say) -> None:
        self.folder, self.model, self.int8_window, self.failures = folder, model, int8_window, 0
        self._say, self._said = say, ""
        self._more = {
            "tokens": state_file.Vector(torch.int32),
            "logits": state_file.Vector(torch.float32, model.config.vocab_size),
        }

    def write(
        self, owner: Owner, tokens: Sequence[int], state: State, logits: Tensor | None
    ) -> tuple[Path, int] | None:
        """Write a file, whole or not at all; give it and its bytes, or None where that failed."""
        file = self._place(owner.fingerprint) / _name(owner, tokens)
        more = {"tokens": torch.tensor(tokens, dtype=torch.int32, device="cpu")} | (
            {} if logits is None else {"logits": logits}
        )
        metadata = {"adapter": owner.adapter, "tenant": owner.tenant}
        try:
            state_file.save(state, file, self.model, metadata=metadata, more=more, int8_window=self.int8_window)
            size = file.stat().st_size
        except (GriffinError, OSError) as error:
            self._fail("a snapshot is not kept on disk", error)
            return None
        return file, size

    def read(self, owner: Owner, tokens: Sequence[int], file: Path) -> tuple[State, Tensor | None] | None:
        """Read a file; None where it is gone, damaged or another's. Such a file is removed."""
        try:
            loaded = state_file.load_all(file, self.model, self._more)
            told = loaded.more.get("tokens", torch.empty(0, dtype=torch.int32, device="cpu")).tolist()
            if told != list(tokens) or loaded.metadata != {"adapter": owner.adapter, "tenant": owner.tenant}:
                raise GriffinError(f"{file} is damaged: it is not the snapshot that its name says")
        except (GriffinError, OSError) as error:
            self._fail("a snapshot is read again from its text", error)
            self.remove(file)
            return None
        return loaded.state, loaded.more.get("logits")

    def remove(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            self._fail("a snapshot that is not needed stays on disk", error)

    def found(self) -> Iterator[Found]:
        """Give this model's files, the oldest first. Their states are believed when they are read, not before.

        A file whose owner and tokens are not those of its name is removed.
        """
        own = fingerprint.of(self.model)
        for _, file, size in sorted(self._files(own)):
            try:
                theirs, metadata, more = state_file.peek(file, {"tokens": self._more["tokens"]})
                owner = Owner(theirs, metadata.get("adapter", ""), metadata.get("tenant", ""))
                tokens = more.get("tokens", torch.empty(0, dtype=torch.int32, device="cpu")).tolist()
                if theirs != own or not tokens or file.name != _name(owner, tokens):
                    raise GriffinError(f"{file} is damaged: it is not the snapshot that its name says")
            except (GriffinError, OSError) as error:
                self._fail("a snapshot is not used", error)
                self.remove(file)
                continue
            yield Found(owner, tokens, file, size)

    def _files(self, own: str) -> Iterator[tuple[float, Path, int]]:
        try:
            files = list(self._place(own).glob("*.safetensors"))
        except OSError as error:
            self._fail("snapshots on disk are not used", error)
            return
        for file in files:
            try:
                status = file.stat()
            except OSError as error:  # another process' work
                self._fail("a snapshot is not used", error)
            else:
                yield status.st_mtime, file, status.st_size

    def _place(self, own: str) -> Path:
        return self.folder / own[:16]

    def _fail(self, what: str, error: Exception) -> None:
        self.failures += 1
        reason = f"{what}: {one_line(error)}"
        if reason != self._said:
            self._say(reason)
        self._said = reason


def _name(owner: Owner, tokens: Sequence[int]) -> str:
    told = repr((owner.fingerprint, owner.adapter, owner.tenant)).encode()
    return hashlib.sha256(told + array("i", tokens).tobytes()).hexdigest()[:32] + ".safetensors"
