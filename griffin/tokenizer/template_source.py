"""What a chat template's own text tells: its parts, Hugging Face's `generation` blocks, and whether it looks back."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

BEGIN = re.compile(r"\{[{%#]")
TOKEN = re.compile(r"""\s*("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^\W\d]\w*|\d[\w.]*|[^\w\s"'])""", re.DOTALL)
END_RAW = re.compile(r"\{%[-+]?\s*endraw\s*[-+]?%\}")

STATEMENTS = {"for", "if", "elif", "else", "endif", "endfor", "set", "continue", "generation", "endgeneration"}
KEYWORDS = {"if", "elif", "else", "and", "or", "not", "in", "is"}
FUNCTIONS = {"raise_exception", "strftime_now", "range"}
METHODS = {
    *("strip", "lstrip", "rstrip", "split", "lower", "upper", "title", "capitalize"),
    *("startswith", "endswith", "replace", "get", "items", "keys", "values"),
}
BEFORE_LOOP = {
    "",
    "if",
    "elif",
    "and",
    "or",
    "not",
    "(",
    "=",
    "else",
}  # after these, and before those, `loop.index0 % 2`
AFTER_LOOP = {"", ")", "=", "!", "and", "or", "is", "else", ","}  # is an operand of its own


@dataclass(frozen=True)
class Part:
    """`{{ ... }}` or `{% ... %}`: its tokens, without the marks, and where it is in the template."""

    is_statement: bool
    tokens: tuple[str, ...]
    start: int
    end: int


def parts(template: str) -> list[Part] | None:
    """Cut a template into its expressions and statements; None where it is not whole, and no template."""
    found: list[Part] = []
    at = 0
    while begin := BEGIN.search(template, at):
        if begin[0] == "{#":
            at = template.find("#}", begin.end()) + 2
            if at < 2:
                return None
            continue
        tokens, at = _tokens(template, begin.end(), "%}" if begin[0] == "{%" else "}}")
        if at < 0:
            return None
        found.append(Part(begin[0] == "{%", tokens, begin.start(), at))
        if found[-1].is_statement and tokens == ("raw",):
            if not (end := END_RAW.search(template, at)):
                return None
            at = end.end()
    return found


def _tokens(template: str, at: int, end: str) -> tuple[tuple[str, ...], int]:
    """Give the tokens up to the mark `end`, and the place behind it; -1 where it is not there."""
    at += template[at : at + 1] in ("-", "+")
    tokens: list[str] = []
    depth = 0  # within brackets, "}}" closes two of them
    while token := TOKEN.match(template, at):
        at = token.end()
        sign = token[1]
        if not depth and template.startswith(end, token.start(1)):
            if tokens and tokens[-1] in ("-", "+") and template[token.start(1) - 1] == tokens[-1]:
                tokens.pop()  # "-%}" takes the blanks behind it
            return tuple(tokens), token.start(1) + len(end)
        depth += (sign in "([{") - (sign in ")]}")
        tokens.append(sign)
    return (), -1


def without_generation(template: str) -> str:
    """Turn `{% generation %}`, which marks what a model is trained on, into the plain scope that it is."""
    written, at = "", 0
    for part in parts(template) or ():
        if part.is_statement and part.tokens in (("generation",), ("endgeneration",)):
            written += template[at : part.start]
            written += template[part.start : part.end].replace("generation", "with")
            at = part.end
    return written + template[at:]


def is_local(template: str) -> bool:
    """Whether a template certainly writes A(m_0) + sum_i B(m_i, m_0, i mod 2, is i first, is i last) + C(m_0).

    Then the text behind a message follows from the messages behind it, and the past need not be rendered to know it.
    True for a template with one loop over the messages that carries nothing from one to the next: Gemma's, ChatML's.
    False says nothing: only few forms of statements and expressions are known here, and all else is "no".
    """
    found = parts(template)
    if found is None:
        return False
    open_blocks: list[str] = []
    loops = 0
    for part in found:
        tokens = part.tokens
        if part.is_statement:
            if not tokens or (word := tokens[0]) not in STATEMENTS:
                return False
            if word in ("endif", "endfor", "endgeneration"):
                if not open_blocks or open_blocks.pop() != word.removeprefix("end"):
                    return False
            elif word in ("for", "if", "generation"):
                open_blocks.append(word)
            if word in ("for", "set") and not _binds_a_new_name(tokens):
                return False
            if word == "for" and tokens[2:] == ("in", "messages"):
                loops += 1
                if "for" in open_blocks[:-1]:
                    return False
                continue
        if not all(_is_local_use(*use) for use in _windows(tokens)):
            return False
    return loops == 1 and not open_blocks


def _binds_a_new_name(tokens: tuple[str, ...]) -> bool:
    name, sign = (*tokens[1:3], "", "")[:2]
    simple = sign == ("in" if tokens[0] == "for" else "=") and "messages" != name != "loop"
    return simple and name not in FUNCTIONS


def _windows(tokens: tuple[str, ...]) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    padded = (*tokens, *[""] * 6)
    for at, token in enumerate(tokens):
        yield (tokens[at - 1] if at else ""), token, padded[at + 1 : at + 7]


def _is_local_use(before: str, token: str, after: tuple[str, ...]) -> bool:
    """Whether a token can stand in a local template, given its neighbours."""
    if before == "." and token in ("messages", "loop"):
        return False
    if token == "messages":
        return after[:3] == ("[", "0", "]")
    if token == "loop":
        if after[:2] in ((".", "first"), (".", "last")):
            return True
        told = after[:4] in ((".", "index0", "%", "2"), (".", "index", "%", "2"))
        width = 4 if told else 5
        told = told or after[:5] in ((".", "index0", "=", "=", "0"), (".", "index", "=", "=", "1"))
        return told and before in BEFORE_LOOP and after[width] in AFTER_LOOP
    if token == "(":
        return before[:1] not in (")", "]", '"', "'")  # what stands there would be called; names are looked at below
    if after[0] == "(" and (token[0].isalpha() or token[0] == "_"):
        if before == ".":
            return token in METHODS
        return before in ("|", "is") or token in FUNCTIONS | KEYWORDS
    return token not in ("self", "recursive", "namespace")
