"""What a server is told once, when it starts."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from griffin.errors import GriffinError
from griffin.reading import read_text

if TYPE_CHECKING:
    from griffin.serve.vertex import Vertex

MOST_KEY_CHARS = 512


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one caller may ask for. Everything is checked before a text is tokenised."""

    body_bytes: int = 8 * 2**20
    import_bytes: int = 2**30  # of a session that is imported; the model says how large one can be
    headers: int = 100
    header_bytes: int = 32 * 2**10  # of all of them
    prompt_chars: int = 4_000_000  # of all texts of a request
    max_tokens: int = 131_072  # what a request may ask for; it takes less than this where the engine is told so
    default_max_tokens: int = 1024  # of a chat whose request does not say
    connections: int = 1000  # open at once; more are refused with 429
    body_s: float = 30.0  # to send a body
    idle_s: float = 10.0  # to send a request's head
    write_s: float = 30.0  # to read what was written


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A server's options.

    Attributes:
        model: a model folder or a Hugging Face id.
        name: what clients call the model; None: the last part of `model`.
        host, port: where to listen; port 0 takes a free one.
        keys, admin_keys: sha256 of what opens the routes of the API, and those of the administrator. No key in either:
            the first are open, the second closed.
        hosts: further names by which clients may call this server while it has no keys (see `guard`).
        insecure: serve a public address without a key.
        slots, max_bytes: how many rows at once, or how many bytes for them; both None: the engine decides.
        max_queue: requests that may wait for a row.
        state_folder: where sessions are saved; None: nowhere.
        session_bytes: of memory, for sessions.
        snapshot_bytes: of memory, for states of texts that were read, so that they are not read again; 0: none.
        request_s: a request's time, from its arrival to its end; then what there is of it is its answer.
        shutdown_s: how long what runs may go on after SIGTERM.
        page: whether / is the chat page.
        vertex: the container's contract, where this is one: it listens for all, and IAM stands before it.
    """

    model: str
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    keys: frozenset[bytes] = frozenset()
    admin_keys: frozenset[bytes] = frozenset()
    hosts: frozenset[str] = frozenset()
    insecure: bool = False
    device: str = "auto"
    dtype: str | None = None
    slots: int | None = None
    max_bytes: int | None = None
    max_queue: int = 64
    chunk: int = 512
    chat_template: str | None = None  # its source; None: the model's own
    state_folder: Path | None = None
    session_bytes: int = 2**30
    snapshot_bytes: int = 2**30
    request_s: float = 600.0
    shutdown_s: float = 25.0
    page: bool = True
    vertex: Vertex | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise GriffinError(f"port={self.port} must be within 0 .. 65535 (0: any free one)")
        for name, value in (("request_s", self.request_s), ("shutdown_s", self.shutdown_s)):
            if not 0 <= value <= 86_400:
                raise GriffinError(f"{name}={value} must be within 0 .. 86400 seconds")
        if not self.keys and not self.insecure and not is_loopback(self.host):
            raise GriffinError(
                f"host={self.host} can be reached from other machines and no key is set: anyone could use the model; "
                "give --api-key-file, or --insecure if something in front of it asks for keys"
            )

    @property
    def model_name(self) -> str:
        return self.name or self.model.rstrip("/").rpartition("/")[2] or self.model


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address. A name other than localhost may mean anything."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(file: Path) -> frozenset[bytes]:
    """Read a file of keys, one a line; blank lines and those that begin with # are none.

    Raises:
        GriffinError: the file cannot be read, or holds no key, or one that no header can hold.
    """
    lines = [line.strip() for line in read_text(file, mend="give a file with one key a line").splitlines()]
    return digests([line for line in lines if line and not line.startswith("#")], str(file))


def digests(keys: Iterable[str], where: str) -> frozenset[bytes]:
    """Give what is kept of keys.

    Raises:
        GriffinError: there is none, or one is too short to keep anyone out, too long, or not ASCII without blanks.
    """
    keys = list(keys)
    if not keys:
        raise GriffinError(f"{where} holds no key; give one a line, for example: openssl rand -hex 32")
    for number, key in enumerate(keys, start=1):
        if not 8 <= len(key) <= MOST_KEY_CHARS or not all("!" <= letter <= "~" for letter in key):
            raise GriffinError(
                f"{where}: key {number} must be 8 to {MOST_KEY_CHARS} visible ASCII characters; "
                "for example: openssl rand -hex 32"
            )
    return frozenset(digest(key.encode()) for key in keys)
