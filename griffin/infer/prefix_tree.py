"""A prefix tree of token ids: which of the texts kept is the longest beginning of another."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from typing import Any

_WORD = array("i").itemsize


class Node:
    """Where a text ends, or where texts part. Between it and its parent lie the tokens of `edge`."""

    __slots__ = ("children", "depth", "edge", "parent", "value")

    def __init__(self, edge: bytes, parent: Node | None, depth: int) -> None:
        self.edge, self.parent, self.depth = edge, parent, depth  # depth: tokens from the root to here
        self.children: dict[bytes, Node] = {}  # by their first token
        self.value: Any = None  # None: no text ends here

    def text(self) -> list[int]:
        """The tokens from the root to here."""
        edges: list[bytes] = []
        node: Node | None = self
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return array("i", b"".join(reversed(edges))).tolist()


class PrefixTree:
    """Nodes by their owner and tokens. Tokens are compared, every one of them; they take four bytes each.

    Attributes:
        edge_bytes: of all tokens it holds.
    """

    def __init__(self) -> None:
        self.edge_bytes = 0
        self._roots: dict[Hashable, Node] = {}

    def path(self, owner: Hashable, tokens: Sequence[int]) -> list[Node]:
        """Give the owner's nodes that are beginnings of `tokens`, the shortest first."""
        node, key, at = self._roots.get(owner), _key(tokens), 0
        found: list[Node] = []
        if node is None:
            return found
        while (child := node.children.get(key[at : at + _WORD])) is not None and key.startswith(child.edge, at):
            at += len(child.edge)
            node = child
            found.append(node)
        return found

    def insert(self, owner: Hashable, tokens: Sequence[int]) -> Node:
        """Give the node of these tokens, one at least, made if there is none."""
        key, node, at = _key(tokens), self._roots.setdefault(owner, Node(b"", None, 0)), 0
        while at < len(key):
            child = node.children.get(key[at : at + _WORD])
            if child is None:
                child = node.children[key[at : at + _WORD]] = Node(key[at:], node, len(key) // _WORD)
                self.edge_bytes += len(child.edge)
            elif not key.startswith(child.edge, at):
                child = self._part(child, _common(child.edge, key[at : at + len(child.edge)]))
            at += len(child.edge)
            node = child
        return node

    def prune(self, owner: Hashable, node: Node) -> None:
        """Take out what no text needs any more, a node without a value first."""
        while node.value is None and node.parent is not None and not node.children:
            del node.parent.children[node.edge[:_WORD]]
            self.edge_bytes -= len(node.edge)
            node = node.parent
        if node.value is None and node.parent is not None and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge, child.parent = node.edge + child.edge, node.parent
            node.parent.children[node.edge[:_WORD]] = child
        if node.parent is None and not node.children:
            del self._roots[owner]

    def _part(self, node: Node, length: int) -> Node:
        """Make a node `length` bytes into the edge above another, which stays the node it is."""
        assert node.parent is not None
        upper = Node(node.edge[:length], node.parent, node.depth - (len(node.edge) - length) // _WORD)
        node.parent.children[node.edge[:_WORD]] = upper
        node.edge, node.parent = node.edge[length:], upper
        upper.children[node.edge[:_WORD]] = node
        return upper


def _key(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def _common(left: bytes, right: bytes) -> int:
    """The bytes of the longest common beginning, in whole tokens."""
    low, high = 0, min(len(left), len(right)) // _WORD
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if left[: middle * _WORD] == right[: middle * _WORD] else (low, middle - 1)
    return low * _WORD
