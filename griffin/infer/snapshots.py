"""Snapshots: states of texts that were read, found again by the tokens of the longest one that a prompt begins with.

A state has a fixed size, so that a prompt's beginning costs the same to keep however long it is, and no step to go on
from. Kept are states of one row, in a prefix tree, under a budget of bytes: what was used least recently goes first, to
a folder if there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from griffin import fingerprint
from griffin.infer.batch import Held
from griffin.infer.pages import PAGE, Cut, Page, cut, join
from griffin.infer.prefix_tree import Node, PrefixTree
from griffin.infer.snapshot_files import Owner, Say, SnapshotFiles
from griffin.model import Griffin
from griffin.state import check_origin


@dataclass(frozen=True, slots=True)
class Stats:
    """What was asked of snapshots and what they hold. Counts are since the beginning, sizes are now."""

    hits: int = 0  # `find` gave a snapshot
    misses: int = 0
    tokens_asked: int = 0  # of the prompts that were looked for
    tokens_saved: int = 0  # of them, not to be read
    snapshots: int = 0  # in memory
    nbytes: int = 0  # of their tensors, shared ones once, and the tree's tokens
    evictions: int = 0  # for want of room: gone from memory
    thinned: int = 0  # by the rule: gone for good
    refused: int = 0  # larger than the whole budget
    files: int = 0  # on disk
    file_bytes: int = 0
    file_hits: int = 0  # of the hits, read from disk
    file_failures: int = 0  # not written, gone or damaged


@dataclass(slots=True, eq=False)
class _Entry:
    """What a node of the tree has."""

    owner: Owner
    lasting: bool
    cut: Cut | None = None  # in memory
    file: Path | None = None  # on disk
    file_bytes: int = 0


class Snapshots:
    """Keep states by the text they have read.

    Two texts share only what one owner - tenant, adapter, the model's weights - has kept. Weights that change make a
    new owner: nothing of before is found again. A change is another tensor or a write that PyTorch counts; of another,
    through `.data` or by a fused optimizer, tell with `clear`.

    One thread uses it; `stats` may be read from any.

    Args:
        model: whose states they are.
        max_bytes: of memory, for states, logits and tokens; while one is being kept there is that one more. Python's
            own objects, some 10 kB a snapshot, are not counted.
        folder: where what leaves memory goes, and what is there is found again, after a restart too. None: it is
            dropped. Lasting snapshots only, whole ones: files share no pages.
        max_file_bytes: of that folder.
        int8_window: keep keys and values in 8 bits (`griffin.state.to_int8`): almost half the bytes, and going on from
            a snapshot is then not exact any more. Off by default.
        say: is told of files that fail, in one line.

    Raises:
        ValueError: a budget is negative.
    """

    def __init__(
        self,
        model: Griffin,
        *,
        max_bytes: int,
        folder: Path | None = None,
        max_file_bytes: int = 64 * 2**30,
        int8_window: bool = False,
        say: Say = warnings.warn,
    ) -> None:
        if max_bytes < 0 or max_file_bytes < 0:
            raise ValueError(f"max_bytes={max_bytes} and max_file_bytes={max_file_bytes} must be 0 or more")
        self.model, self.max_bytes, self.max_file_bytes, self.int8_window = (
            model,
            max_bytes,
            max_file_bytes,
            int8_window,
        )
        self.stats = Stats()  # replaced whole, never written: any thread may read it
        self._tree = PrefixTree()
        self._weights: list[tuple[Tensor, int]] = []  # and how often each had been written when they were looked at
        self._fingerprint = ""
        self._kept: dict[Node, _Entry] = {}  # in memory, the least recently used first
        self._filed: dict[Node, _Entry] = {}  # on disk, alike
        self._holders: dict[Page, int] = {}  # how many snapshots share a page
        self._bytes = 0  # of pages and what is no page
        self._file_bytes = 0
        self._files = None if folder is None else SnapshotFiles(folder, model, int8_window=int8_window, say=say)
        if self._files is not None:
            for found in self._files.found():
                node = self._tree.insert(found.owner, found.tokens)
                node.value = _Entry(found.owner, lasting=True)
                self._file(node, found.file, found.nbytes)
            self._make_room()
            self._count()

    def find(self, tokens: Sequence[int], tenant: str = "", *, adapter: str = "") -> tuple[int, Held] | None:
        """Give the longest kept beginning of `tokens`: how many tokens it is, and the state that has read them.

        The state is a copy, the caller's own. One that has read all of `tokens` counts only if its logits are known.
        """
        path = self._tree.path(self._owner(tenant, adapter), tokens)
        for node in reversed(path):
            held = None if node.value is None else self._open(node, needs_logits=node.depth == len(tokens))
            if held is not None:
                stats = self.stats
                self._count(
                    hits=stats.hits + 1,
                    tokens_asked=stats.tokens_asked + len(tokens),
                    tokens_saved=stats.tokens_saved + node.depth,
                )
                return node.depth, held
        self._count(misses=self.stats.misses + 1, tokens_asked=self.stats.tokens_asked + len(tokens))
        return None

    def longest(self, tokens: Sequence[int], tenant: str = "", *, adapter: str = "") -> int:
        """How many tokens `find` would give, if no file fails. Nothing is counted, used or read."""
        path = self._tree.path(self._owner(tenant, adapter), tokens)
        fits = (node.depth for node in reversed(path) if _may_serve(node, node.depth == len(tokens)))
        return next(fits, 0)

    def keep(
        self, tokens: Sequence[int], held: Held, tenant: str = "", *, adapter: str = "", lasting: bool = True
    ) -> None:
        """Keep a copy of a state that has read `tokens`.

        What is there already stays, and is the most recently used again.

        Args:
            tokens: all that the state has read.
            held: the state, of one row, and its logits.
            tenant: whose it is: texts of different tenants are never compared. It is written to disk as it is: give a
                salt, not a key.
            adapter: what else than the model's weights made the state.
            lasting: it ends where texts are likely to part: at a message's border, a prompt's or an answer's end.
                Others lie on the way there, are thinned out further back than a window, and are not written to disk.

        Raises:
            ValueError: the state is not one row that has read so many tokens.
            GriffinError: it is another model's.
        """
        state = held.state
        check_origin(state, self.model)
        if state.batch_size != 1 or not tokens or int(state.position[0]) != len(tokens):
            raise ValueError(f"a state at {state.position.tolist()} does not fit {len(tokens)} tokens; give its own")
        owner = self._owner(tenant, adapter)
        node = self._tree.insert(owner, tokens)
        entry = node.value or _Entry(owner, lasting)
        entry.lasting |= lasting
        node.value = entry
        if entry.cut is None or (entry.cut.logits is None and held.logits is not None):
            outdated = entry.file if entry.cut is not None else None  # written before the logits were known
            self._forget(node)
            self._remember(node, cut(state, held.logits, int8=self.int8_window, earlier=_earlier(node)))
            if outdated is not None and self._files is not None:
                self._files.remove(outdated)
                self._unfile(node)
        self._touch(node)
        self._thin(node)
        self._make_room()
        if node.value is None:
            self._count(refused=self.stats.refused + 1)
        self._count()

    def save(self) -> None:
        """Write every lasting snapshot that is not on disk yet: before the process ends."""
        for node, entry in list(self._kept.items()):
            self._write(node, entry)
        self._make_room()
        self._count()

    def clear(self) -> None:
        """Forget all that is in memory, and what the weights were. Files stay."""
        self._weights = []
        for node in list(self._kept):
            self._drop(node)
        self._count()

    def _owner(self, tenant: str, adapter: str) -> Owner:
        # `fingerprint.of` looks at values of every tensor that may be trained: 14 ms of 484, this takes 0.5.
        now = [
            (weight, 0 if weight.is_inference() else weight._version)
            for weight in (*self.model.parameters(), *self.model.buffers())
        ]
        if len(now) != len(self._weights) or any(
            a is not b or m != n for (a, m), (b, n) in zip(now, self._weights, strict=True)
        ):
            self._fingerprint, self._weights = fingerprint.of(self.model), now
        return Owner(self._fingerprint, adapter, tenant)

    def _open(self, node: Node, *, needs_logits: bool) -> Held | None:
        """The snapshot of a node, from memory or disk; None where it cannot serve."""
        if not _may_serve(node, needs_logits):
            return None
        entry: _Entry = node.value
        if entry.cut is not None:
            self._touch(node)
            logits = entry.cut.logits
            return Held(
                join(entry.cut, self.model), None if logits is None else logits.to(self.model.device, copy=True)
            )
        assert self._files is not None
        assert entry.file is not None
        read = self._files.read(entry.owner, node.text(), entry.file)
        if read is None:
            self._unfile(node)
            return None
        state, logits = read
        if needs_logits and logits is None:
            return None
        self._remember(node, cut(state, logits, int8=self.int8_window, earlier=_earlier(node)))
        self._touch(node)
        self._make_room()
        self._count(file_hits=self.stats.file_hits + 1)
        return Held(state, None if logits is None else logits.to(self.model.device))

    def _remember(self, node: Node, kept: Cut) -> None:
        for page in kept.pages:
            self._bytes += 0 if page in self._holders else page.nbytes
            self._holders[page] = self._holders.get(page, 0) + 1
        self._bytes += kept.own_bytes()
        node.value.cut = kept
        self._kept[node] = node.value

    def _forget(self, node: Node) -> None:
        """Take a snapshot out of memory; its file and its node stay."""
        kept: Cut | None = node.value.cut
        if kept is None:
            return
        for page in kept.pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._bytes -= page.nbytes
        self._bytes -= kept.own_bytes()
        node.value.cut = None
        del self._kept[node]

    def _drop(self, node: Node) -> None:
        """Take a snapshot out of memory, and its node out of the tree if it has no file."""
        self._forget(node)
        self._prune(node)

    def _file(self, node: Node, file: Path, nbytes: int) -> None:
        node.value.file, node.value.file_bytes = file, nbytes
        self._filed[node] = node.value
        self._file_bytes += nbytes

    def _unfile(self, node: Node) -> None:
        """Forget a file, and the node if nothing is in memory."""
        self._file_bytes -= self._filed.pop(node).file_bytes
        node.value.file, node.value.file_bytes = None, 0
        self._prune(node)

    def _prune(self, node: Node) -> None:
        if node.value.cut is None and node.value.file is None:
            owner, node.value = node.value.owner, None
            self._tree.prune(owner, node)

    def _touch(self, node: Node) -> None:
        for used in (self._kept, self._filed):
            if node in used:
                used[node] = used.pop(node)

    def _write(self, node: Node, entry: _Entry) -> None:
        if self._files is None or entry.file is not None or not entry.lasting or entry.cut is None:
            return
        written = self._files.write(entry.owner, node.text(), join(entry.cut, self.model), entry.cut.logits)
        if written is not None:
            self._file(node, *written)

    def _make_room(self) -> None:
        """Evict the least recently used until the budgets hold."""
        evictions = 0
        while self._total() > self.max_bytes and self._kept:
            node, entry = next(iter(self._kept.items()))
            self._write(node, entry)
            self._drop(node)
            evictions += 1
        while self._filed and (self._file_bytes > self.max_file_bytes or self._total() > self.max_bytes):
            node, entry = next(iter(self._filed.items()))
            assert self._files is not None
            assert entry.file is not None
            self._files.remove(entry.file)
            self._unfile(node)
        if evictions:
            self._count(evictions=self.stats.evictions + evictions)

    def _thin(self, node: Node) -> None:
        """Drop snapshots on the way here that are closer to each other than this far back is worth.

        In the newest window all stay. From 2^k windows to 2^(k+1) windows back, those at multiples of 2^(k+1) pages.
        """
        window = self.model.config.window or 2048
        above, thinned = node.parent, 0
        while above is not None:
            higher = above.parent
            windows = (node.depth - above.depth) // window
            entry: _Entry | None = above.value
            sparse = PAGE << windows.bit_length()
            if windows and entry is not None and not entry.lasting and above.depth % sparse:
                self._drop(above)
                thinned += 1
            above = higher
        if thinned:
            self._count(thinned=self.stats.thinned + thinned)

    def _total(self) -> int:
        return self._bytes + self._tree.edge_bytes

    def _count(self, **counts: int) -> None:
        self.stats = replace(
            self.stats,
            snapshots=len(self._kept),
            nbytes=self._total(),
            files=len(self._filed),
            file_bytes=self._file_bytes,
            file_failures=0 if self._files is None else self._files.failures,
            **counts,
        )


def _may_serve(node: Node, needs_logits: bool) -> bool:
    """Whether a node has a snapshot; of a file it is not known whether it has logits."""
    entry: _Entry | None = node.value
    if entry is None:
        return False
    return not needs_logits or (entry.file is not None if entry.cut is None else entry.cut.logits is not None)


def _earlier(node: Node) -> Cut | None:
    """The nearest snapshot in memory on the way to a node."""
    above = node.parent
    while above is not None:
        if above.value is not None and above.value.cut is not None:
            return above.value.cut
        above = above.parent
    return None
