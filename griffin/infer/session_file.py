"""A session as a file: a state's file, with what else going on takes. Files come from strangers, too."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from griffin import state_file
from griffin.errors import GriffinError
from griffin.infer.answered import Answered
from griffin.infer.batch import Held, place_bytes
from griffin.infer.grammar import Grammar
from griffin.infer.request import Request, Sampling, TokenLogprob
from griffin.model import Griffin
from griffin.reading import MOST_TEXT_BYTES, parse_json
from griffin.state import State

if TYPE_CHECKING:
    from griffin.infer.sessions import Session

_KEY = "session"
_FIELDS = {"name", "tenant", "version", "created_s", "used_s", "unread", "note", "tokenizer", "answered"}
_MOST_STOPS, _MOST_STOP_CHARS, _MOST_GRAMMAR_CHARS = 64, 4096, 2**20
_MOST_GROWN_BYTES = 4 * 2**30  # of a state that grows with the text
_MEND = "use another copy"


def write(session: Session, path: Path, model: Griffin, tokenizer: str, *, int8_window: bool) -> None:
    """Write a session, whole or not at all.

    Raises:
        GriffinError: the state holds NaN or infinity, or the file cannot be written.
    """
    content = {
        "name": session.name,
        "tenant": session.tenant,
        "version": session.version,
        "created_s": session.created_s,
        "used_s": session.used_s,
        "unread": session.unread,
        "note": dict(session.note),
        "tokenizer": tokenizer,
        "answered": None if session.answered is None else _told(session.answered),
    }
    logits = session.held.logits
    state_file.save(
        session.held.state,
        path,
        model,
        metadata={_KEY: json.dumps(content)},
        more={} if logits is None else {"logits": logits},
        int8_window=int8_window,
    )


def read(path: Path, model: Griffin, tokenizer: str) -> Session:
    """Read what `write` wrote, and refuse all else.

    Raises:
        GriffinError: the file is missing, damaged, no session, or belongs to another model or tokenizer.
    """
    from griffin.infer.sessions import Session

    vector = state_file.Vector(torch.float32, model.config.vocab_size)
    loaded = state_file.load_all(path, model, {"logits": vector})
    if _KEY not in loaded.metadata or loaded.state.batch_size != 1:
        raise GriffinError(f"{path} holds a state of {loaded.state.batch_size} rows and no session; {_MEND}")
    where = f"{path}, {_KEY}"
    content = parse_json(loaded.metadata[_KEY], where, mend=_MEND)
    check = _Check(where, model.config.vocab_size)
    check.that(isinstance(content, dict) and content.keys() == _FIELDS, "the fields", content)
    if content["tokenizer"] != tokenizer:
        raise GriffinError(f"{path} was saved with another tokenizer; load it with the one it was made by")
    note = content["note"]
    check.that(isinstance(note, dict) and all(isinstance(text, str) for text in note.values()), "note", note)
    for name in ("name", "tenant", "version"):
        check.that(isinstance(content[name], str), name, content[name])
    for name in ("created_s", "used_s"):
        check.number(content[name], name)
    try:
        answered = None if content["answered"] is None else _answered(content["answered"], loaded.state, check)
    except (TypeError, ValueError) as error:  # a sampling or a request that cannot be; GriffinError is one
        raise GriffinError(f"{where}: {error}") from error
    return Session(
        name=content["name"],
        tenant=content["tenant"],
        version=content["version"],
        created_s=content["created_s"],
        used_s=content["used_s"],
        held=Held(loaded.state, loaded.more.get("logits")),
        unread=tuple(check.ids(content["unread"], "unread")),
        note=note,
        answered=answered,
    )


def peek_tenant(path: Path) -> str:
    """Say whose session a file is, without reading its state."""
    _, metadata, _ = state_file.peek(path)
    content = parse_json(metadata.get(_KEY, ""), f"{path}, {_KEY}", mend=_MEND)
    if not isinstance(content, dict) or not isinstance(tenant := content.get("tenant"), str):
        raise GriffinError(f"{path} is no session; {_MEND}")
    return tenant


@contextmanager
def received(source: BinaryIO, model: Griffin) -> Iterator[Path]:
    """Copy a stream into a temporary file, but no more than a session of this model can have.

    Raises:
        GriffinError: there is more.
    """
    grows = _MOST_GROWN_BYTES if model.new_state(0).growing() else 0
    most = place_bytes(model)[0] + 4 * model.config.vocab_size + MOST_TEXT_BYTES + 2**20 + grows
    with tempfile.TemporaryDirectory(prefix="griffin-") as folder:
        file = Path(folder) / "imported"
        with file.open("wb") as out:
            while chunk := source.read(2**20):
                out.write(chunk)
                if out.tell() > most:
                    raise GriffinError(f"more than {most:,} bytes, which no session of this model has")
        yield file


# What of a request and its sampling is written. A field that is not here must be at its default.
_REQUEST = ("prompt", "max_tokens", "min_tokens", "sampling", "stop", "stop_ids", "logprobs", "grammar")
_NUMBERS = (
    *("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("top_k", "seed"),
)


def _told(answered: Answered) -> dict[str, Any]:
    request, sampling = answered.request, answered.request.sampling
    for of, known in ((request, _REQUEST), (sampling, (*_NUMBERS, "logit_bias"))):
        for each in fields(of):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if each.name not in known and getattr(of, each.name) != default:
                raise GriffinError(f"an answer with {each.name}={getattr(of, each.name)!r:.60} cannot be saved")
    return {
        "request": {
            **{name: getattr(request, name) for name in _REQUEST},
            "sampling": asdict(sampling),
            "stop_ids": sorted(request.stop_ids),
            "grammar": None if request.grammar is None else asdict(request.grammar),
        },
        "tokens": answered.tokens,
        "seed": answered.seed,
        "num_read": answered.num_read,
        "logprobs": None if answered.logprobs is None else [(each.logprob, each.top) for each in answered.logprobs],
    }


def _answered(content: Any, state: State, check: _Check) -> Answered:
    check.keys(content, ("request", "tokens", "seed", "num_read", "logprobs"), "answered")
    asked = content["request"]
    check.keys(asked, _REQUEST, "request")
    check.that(isinstance(asked["sampling"], dict), "sampling", asked["sampling"])
    stop = asked["stop"]
    check.that(isinstance(stop, list) and len(stop) <= _MOST_STOPS, "stop", stop)
    for each in stop:
        check.that(isinstance(each, str) and 0 < len(each) <= _MOST_STOP_CHARS, "stop", each)
    for name in ("max_tokens", "min_tokens"):
        check.whole(asked[name], name)
    if (logprobs := asked["logprobs"]) is not None:
        check.whole(logprobs, "logprobs")
    request = Request(
        prompt=tuple(check.ids(asked["prompt"], "prompt")),
        max_tokens=asked["max_tokens"],
        min_tokens=asked["min_tokens"],
        sampling=_sampling(asked["sampling"], check),
        stop=tuple(stop),
        stop_ids=frozenset(check.ids(asked["stop_ids"], "stop_ids")),
        logprobs=logprobs,
        grammar=None if asked["grammar"] is None else _grammar(asked["grammar"], check),
    )
    for name in ("seed", "num_read"):
        check.whole(content[name], name, most=2**64)
    tokens = tuple(check.ids(content["tokens"], "tokens"))
    return Answered(
        request=request,
        tokens=tokens,
        seed=content["seed"],
        num_read=content["num_read"],
        state=state,
        logprobs=None if content["logprobs"] is None else _logprobs(content["logprobs"], tokens, check),
    )


def _grammar(content: Any, check: _Check) -> Grammar:
    """Read a grammar; whether it can be followed is seen when the answer goes on."""
    check.keys(content, ("kind", "text"), "grammar")
    kind, text = content["kind"], content["text"]
    check.that(kind in ("json", "regex", "lark"), "grammar", kind)
    check.that(isinstance(text, str) and len(text) <= _MOST_GRAMMAR_CHARS, "grammar", text)
    return Grammar(kind, text)


def _sampling(content: dict[str, Any], check: _Check) -> Sampling:
    check.keys(content, (*_NUMBERS, "logit_bias"), "sampling")
    for name in _NUMBERS:
        if content[name] is not None:
            (check.whole if name in ("top_k", "seed") else check.number)(content[name], name)
    bias = content["logit_bias"]
    if bias is not None:
        check.that(isinstance(bias, dict) and all(key.isascii() and key.isdigit() for key in bias), "logit_bias", bias)
        for value in bias.values():
            check.that(value == -math.inf or check.is_number(value), "logit_bias", value)
        check.ids([int(key[:20]) for key in bias], "logit_bias")
        bias = {int(key): value for key, value in bias.items()}
    return Sampling(**{**content, "logit_bias": bias})


def _logprobs(content: Any, tokens: tuple[int, ...], check: _Check) -> tuple[TokenLogprob, ...]:
    check.that(isinstance(content, list) and len(content) == len(tokens), "logprobs", content)
    found = []
    for token, each in zip(tokens, content, strict=True):
        check.that(isinstance(each, list) and len(each) == 2 and isinstance(each[1], list), "logprobs", each)
        logprob, top = each
        check.number(logprob, "logprobs")
        for pair in top:
            check.that(isinstance(pair, list) and len(pair) == 2, "logprobs", pair)
            check.ids(pair[:1], "logprobs")
            check.number(pair[1], "logprobs")
        found.append(TokenLogprob(token, logprob, tuple((index, value) for index, value in top)))
    return tuple(found)


class _Check:
    """Refuses what is not of the kind it must be, in one line. type() is int: True is an int as well."""

    def __init__(self, where: str, vocab_size: int) -> None:
        self._where, self._vocab_size = where, vocab_size

    def that(self, holds: bool, name: str, value: object) -> None:
        if not holds:
            raise GriffinError(f"{self._where}: {name} is {value!r:.60}, which no session has; {_MEND}")

    def keys(self, value: Any, wanted: tuple[str, ...], name: str) -> None:
        self.that(isinstance(value, Mapping) and value.keys() == set(wanted), name, value)

    def is_number(self, value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def number(self, value: Any, name: str) -> None:
        self.that(self.is_number(value), name, value)

    def whole(self, value: Any, name: str, *, most: int = 2**63) -> None:
        self.that(type(value) is int and 0 <= value < most, name, value)

    def ids(self, value: Any, name: str) -> list[int]:
        fits: Callable[[Any], bool] = lambda token: type(token) is int and 0 <= token < self._vocab_size  # noqa: E731
        self.that(isinstance(value, list) and all(map(fits, value)), name, value)
        return list(value)
