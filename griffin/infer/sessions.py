"""Sessions: conversations that a server keeps by names of its own, in memory and on disk.

A session is a value: a state, what has been said and not been read yet, and where its last answer was cut. It is
written no more once it is made; going on makes another, which takes its place under the name. So a fork copies nothing,
and whoever goes on from a session that has gone on meanwhile is told.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from base64 import b32encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from griffin import fingerprint
from griffin.errors import GriffinError, one_line
from griffin.infer import session_file
from griffin.infer.answered import Answered
from griffin.infer.batch import Held
from griffin.infer.handle import Handle
from griffin.infer.snapshot_files import Say
from griffin.model import Griffin
from griffin.state import check_origin

_NAME = re.compile(r"[a-z2-7]{26}")  # 128 bits: not to be guessed


class NoSession(GriffinError):  # noqa: N818  (an answer, not a fault)
    """There is no session of this name, or it is another tenant's, which is the same."""


class Changed(GriffinError):  # noqa: N818
    """The session has gone on, or is gone, since it was read."""


class Full(GriffinError):  # noqa: N818
    """There is no room for one more."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Session:
    """A conversation between two requests."""

    name: str
    tenant: str
    created_s: float  # since 1970
    used_s: float
    held: Held  # one row; written no more
    unread: tuple[int, ...] = ()  # said and not read: the beginning of the next prompt
    note: Mapping[str, str] = field(default_factory=dict)  # the server's own: messages, a title
    answered: Answered | None = None  # the last answer, if it was cut and may go on
    version: str = ""  # another each time the session goes on

    @property
    def tokens_read(self) -> int:
        return int(self.held.state.position[0])

    @property
    def start(self) -> Held | None:
        """What `Engine.submit` is given as `state`; None where nothing has been read."""
        return self.held if self.tokens_read else None

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.held.state.nbytes + (0 if self.held.logits is None else self.held.logits.nbytes)

    def after(self, handle: Handle, *, note: Mapping[str, str] | None = None) -> Session:
        """Give the session that has read a request which went on from this one, and its first answer, as shown.

        A request that was cancelled before its prompt was read changes nothing but the note.

        Args:
            handle: of the request, which has ended, with `keep_state`.
            note: in place of what there is.
        """
        completion = handle.completion()
        kept = dict(self.note if note is None else note)
        if completion.state is None:
            return replace(self, note=kept, used_s=time.time())
        answered = Answered.of(handle)
        state, unread = completion.state, completion.unread
        if answered is not None:  # its state may be a few tokens behind, before what may be a stop string
            state, unread = answered.state, answered.unread
        held = Held(state, None)
        return replace(self, held=held, unread=unread, answered=answered, note=kept, used_s=time.time())


class Sessions:
    """Sessions by name. Any thread uses it.

    Files are FOLDER/MODEL/NAME.session, MODEL from the model's fingerprint; what `save` wrote is there after a restart.

    Args:
        model: whose states they are.
        tokenizer: its tokenizer's fingerprint: ids of another would mean another text.
        folder: where they are saved; None: nowhere, and they end with the process.
        max_bytes: of memory, for the tensors of sessions; the least recently used leave it for the folder. A fork
            counts whole, though it shares.
        most: sessions in all.
        int8_window: save keys and values in 8 bits: what is restored is then not exact.
        say: is told of files that are passed over.

    Raises:
        ValueError: a budget is negative.
    """

    def __init__(
        self,
        model: Griffin,
        tokenizer: str,
        *,
        folder: Path | None = None,
        max_bytes: int = 4 * 2**30,
        most: int = 10_000,
        int8_window: bool = False,
        say: Say,
    ) -> None:
        if max_bytes < 0 or most < 0:
            raise ValueError(f"max_bytes={max_bytes} and most={most} must be 0 or more")
        self.model, self.tokenizer, self.max_bytes, self.most = model, tokenizer, max_bytes, most
        self.int8_window = int8_window
        self._say = say
        self._folder = None if folder is None else folder / fingerprint.of(model)[:16]
        self._lock = threading.RLock()  # guards what follows
        self._here: dict[str, Session] = {}  # in memory, the least recently used first
        self._on_disk: set[str] = set()
        self._unsaved: set[str] = set()  # in memory, and not on disk as they are
        self._owners: dict[str, str] = {}  # tenants, by name
        for file in sorted(self._folder.glob("*.session")) if self._folder is not None else ():
            try:
                if not _NAME.fullmatch(file.stem):
                    raise GriffinError(f"{file} is no name of a session; it is left alone")
                self._owners[file.stem] = session_file.peek_tenant(file)
                self._on_disk.add(file.stem)
            except (GriffinError, OSError) as error:
                say(one_line(error))

    def create(self, tenant: str = "", *, note: Mapping[str, str] | None = None) -> Session:
        """Make a session that has read nothing.

        Raises:
            Full: there are too many, or too many bytes.
        """
        held = Held(self.model.new_state(1), None)
        return self._add(Session(name="", tenant=tenant, created_s=0, used_s=0, held=held, note=dict(note or {})))

    def get(self, name: str, tenant: str = "") -> Session:
        """Give a session as it is now, from disk if it has left memory.

        Raises:
            NoSession: there is none, or it is another tenant's.
            GriffinError: its file is damaged.
        """
        with self._lock:
            self._check(name, tenant)
            if name not in self._here:
                self._here[name] = self._load(name, tenant)
                self._make_room(name)
            self._here[name] = session = self._here.pop(name)
            return session

    def put(self, before: Session, after: Session) -> Session:
        """Let a session go on: `after`, made from `before`, takes its place.

        Raises:
            Changed: `before` is not how it is now: somebody else has let it go on.
            NoSession: it is gone.
        """
        check_origin(after.held.state, self.model)
        with self._lock:
            if self.get(before.name, before.tenant).version != before.version:
                raise Changed(f"session {before.name} has gone on meanwhile; read it again, or fork it")
            after = replace(
                after, name=before.name, tenant=before.tenant, created_s=before.created_s, version=secrets.token_hex(8)
            )
            self._here[before.name] = after
            self._unsaved.add(before.name)
            self._make_room(before.name)
            return after

    def append(self, name: str, tokens: Sequence[int], tenant: str = "") -> Session:
        """Say tokens, to be read with the next request.

        Raises:
            GriffinError: an id is not in the vocabulary.
        """
        V = self.model.config.vocab_size
        if tokens and not 0 <= min(tokens) <= max(tokens) < V:
            raise GriffinError(f"ids {min(tokens)} .. {max(tokens)} are not all within 0 .. {V - 1}, the vocabulary")
        with self._lock:
            before = self.get(name, tenant)
            said = replace(before, unread=(*before.unread, *tokens), answered=None, used_s=time.time())
            return self.put(before, said)

    def fork(self, name: str, tenant: str = "") -> Session:
        """Make a session that is where another is. They go on independently."""
        return self._add(self.get(name, tenant))

    def save(self, name: str, tenant: str = "") -> None:
        """Write a session to disk, whole or not at all, unless it is there as it is.

        Raises:
            GriffinError: there is no folder, or it cannot be written.
        """
        with self._lock:
            self._save(self.get(name, tenant))

    def save_all(self) -> None:
        """Write every session that is not on disk as it is: before the process ends."""
        with self._lock:
            for session in list(self._here.values()):
                self._save(session)

    def restore(self, name: str, tenant: str = "") -> Session:
        """Go back to what `save` wrote last.

        Raises:
            NoSession: it was never saved.
        """
        with self._lock:
            self._check(name, tenant)
            if name not in self._on_disk:
                raise NoSession(f"session {name} was never saved; there is nothing to restore")
            session = self._load(name, tenant)
            self._here[name] = session
            self._unsaved.discard(name)
            return self.get(name, tenant)

    def export(self, name: str, path: Path, tenant: str = "") -> None:
        """Write a session as a file for another server of this model; it does not say whose it was."""
        session = replace(self.get(name, tenant), tenant="")
        session_file.write(session, path, self.model, self.tokenizer, int8_window=self.int8_window)

    def import_(self, source: BinaryIO, tenant: str = "") -> Session:
        """Make a session of what `export` wrote, which may be anything: no more is read than a session can have.

        Raises:
            GriffinError: it is too large, damaged, or another model's or tokenizer's.
            Full: there is no room.
        """
        with session_file.received(source, self.model) as file:
            session = session_file.read(file, self.model, self.tokenizer)
        return self._add(replace(session, tenant=tenant))

    def delete(self, name: str, tenant: str = "") -> None:
        """Forget a session, in memory and on disk."""
        with self._lock:
            self._check(name, tenant)
            if name in self._on_disk:
                self._place(name).unlink(missing_ok=True)
            self._here.pop(name, None)
            self._on_disk.discard(name)
            self._unsaved.discard(name)
            del self._owners[name]

    def names(self, tenant: str = "") -> list[str]:
        """List a tenant's sessions."""
        with self._lock:
            return sorted(name for name, owner in self._owners.items() if owner == tenant)

    @property
    def nbytes(self) -> int:
        """Of sessions in memory."""
        with self._lock:
            return sum(session.nbytes for session in self._here.values())

    def _add(self, session: Session) -> Session:
        name = b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()
        now = time.time()
        session = replace(session, name=name, created_s=now, used_s=now, version=secrets.token_hex(8))
        with self._lock:
            if len(self._owners) >= self.most:
                raise Full(f"there are {len(self._owners):,} sessions, the most there may; delete some")
            self._here[name], self._owners[name] = session, session.tenant
            self._unsaved.add(name)
            self._make_room(name)
            if (total := self.nbytes) > self.max_bytes:
                self.delete(name, session.tenant)
                raise Full(
                    f"sessions would take {total:,} bytes of {self.max_bytes:,}; delete some"
                    + (", or give a folder to keep them in" if self._folder is None else "")
                )
        return session

    def _check(self, name: str, tenant: str) -> None:
        if name not in self._owners and self._folder is not None and _NAME.fullmatch(name):
            self._adopt(name)
        if self._owners.get(name) != tenant or not _NAME.fullmatch(name):
            raise NoSession(f"there is no session {name!r:.60}")

    def _adopt(self, name: str) -> None:
        """Take up what another process of this model has saved in the same folder since this one began."""
        file = self._place(name)
        if file.is_file() and len(self._owners) < self.most:
            try:
                self._owners[name] = session_file.peek_tenant(file)
                self._on_disk.add(name)
            except (GriffinError, OSError) as error:
                self._say(one_line(error))

    def _place(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.session"

    def _load(self, name: str, tenant: str) -> Session:
        session = session_file.read(self._place(name), self.model, self.tokenizer)
        if (session.name, session.tenant) != (name, tenant):
            raise GriffinError(f"{self._place(name)} is another session's; use another copy")
        return session

    def _save(self, session: Session) -> None:
        if self._folder is None:
            raise GriffinError("sessions are not saved: there is no folder for them")
        if session.name in self._unsaved:
            place = self._place(session.name)
            session_file.write(session, place, self.model, self.tokenizer, int8_window=self.int8_window)
            self._on_disk.add(session.name)
            self._unsaved.discard(session.name)

    def _make_room(self, newest: str) -> None:
        """Let the least recently used leave memory for the disk, but not the newest."""
        total = self.nbytes
        for name, session in list(self._here.items()):
            if self._folder is None or total <= self.max_bytes:
                return
            if name != newest:
                try:
                    self._save(session)
                except (GriffinError, OSError) as error:
                    self._say(f"session {name} stays in memory: {one_line(error)}")
                    continue
                del self._here[name]
                total -= session.nbytes
