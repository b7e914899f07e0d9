"""What stands before every route: sizes, Host, keys, the body's limits, request ids and the line in the log.

Whoever is not let in here reaches no route, no parser of JSON and no tokenizer. The path is the server's own
(`scope["path"]`), never one rebuilt from headers.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from griffin.serve.errors import ApiError
from griffin.serve.log import say
from griffin.serve.metrics import Metrics
from griffin.serve.settings import Settings, digest

OPEN = frozenset({"/health", "/ready", "/livez", "/readyz", "/ping"})  # they tell nothing but a state
ADMIN = "/admin/"
IMPORT = "/v1/sessions/import"  # a state is larger than any other body
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: what is guarded.
        settings: the server's.
        metrics: the server's.
        open_paths: further paths that need no key: the page's own files, which ask for it; Vertex AI's, behind its IAM.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        settings: Settings,
        metrics: Metrics,
        open_paths: frozenset[str] = frozenset(),
    ) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._open = OPEN | open_paths
        self._names = {"localhost", "127.0.0.1", "[::1]", settings.host, f"[{settings.host}]", *settings.hosts}
        self.busy = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError("only HTTP is served")
        begun = time.monotonic()
        state = scope.setdefault("state", {})
        state["id"], state["arrival"] = _request_id(scope), begun
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", state["id"].encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        self.busy += 1
        try:
            self._admit(scope, state)
            await self.app(scope, self._limited(receive, scope), send_named)
        except ApiError as error:
            if status:
                raise
            await error.response()(scope, receive, send_named)
        finally:
            self.busy -= 1
            self._note(scope, state, status, time.monotonic() - begun)

    def _admit(self, scope: Scope, state: dict[str, Any]) -> None:
        """Let a request in, and say whose it is.

        Raises:
            ApiError: it is not let in.
        """
        limits, headers = self.settings.limits, scope["headers"]
        if (
            len(headers) > limits.headers
            or sum(len(name) + len(value) for name, value in headers) > limits.header_bytes
        ):
            raise ApiError(
                431, f"more than {limits.headers} headers, or {limits.header_bytes:,} bytes of them", close=True
            )
        found: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            found.setdefault(name, []).append(value)
        for name in (b"host", b"content-length", b"content-type", b"authorization", b"x-api-key"):
            if len(found.get(name, ())) > 1:
                raise ApiError(400, f"the header {name.decode()} is there twice", close=True)
        if b"content-length" in found and b"transfer-encoding" in found:
            # Two lengths: what stands before this server may take the other one, and the rest for another request.
            raise ApiError(400, "content-length and transfer-encoding in one request", close=True)
        length = found.get(b"content-length", [b"0"])[0]
        path = scope["path"]
        most = state["most_bytes"] = limits.import_bytes if path == IMPORT else limits.body_bytes
        if not length.isdigit() or len(length) > 15 or int(length) > most:
            raise ApiError(413, f"the body has more than {most:,} bytes", close=True)
        if path in self._open:
            state["tenant"], state["admin"] = "", False
            return
        self._check_key(path, found, state)
        if self.busy > limits.connections:
            self.metrics.refusals.labels("connections").inc()
            raise ApiError(429, f"{limits.connections} requests are being answered already", retry_after=1)

    def _check_key(self, path: str, headers: dict[bytes, list[bytes]], state: dict[str, Any]) -> None:
        settings = self.settings
        given = headers.get(b"x-api-key", [b""])[0]
        scheme, _, bearer = headers.get(b"authorization", [b""])[0].partition(b" ")
        if scheme.lower() == b"bearer":
            given = bearer.strip()
        made = digest(given)
        # Every key is compared, each in constant time: how long it takes tells nothing.
        is_user = sum(hmac.compare_digest(made, key) for key in settings.keys) > 0
        is_admin = sum(hmac.compare_digest(made, key) for key in settings.admin_keys) > 0
        if path.startswith(ADMIN) and not is_admin:
            if not settings.admin_keys:
                raise ApiError(403, "this server has no administrator's key (--admin-key-file)", code="no_admin_key")
            raise ApiError(401, "the administrator's key is needed", code="invalid_api_key")
        if settings.keys and not (is_user or is_admin):
            message = "wrong API key" if given else "no API key; send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
        if not settings.keys and not settings.insecure:
            self._check_host(headers)
        # A name of the tenant that tells nothing of the key: it is written into the files of sessions.
        state["tenant"] = digest(b"tenant" + made).hex()[:32] if is_user or is_admin else ""
        state["admin"] = is_admin

    def _check_host(self, headers: dict[bytes, list[bytes]]) -> None:
        """Without keys, only this machine's own programs: a page in its browser that calls us by a name of its own
        (DNS rebinding), or from another origin, is a stranger's."""
        host = headers.get(b"host", [b""])[0].decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in self._names:
            raise ApiError(
                403,
                f"this server is not called {name[:80]}; set a key, or name it with --allow-host",
                code="wrong_host",
            )
        origin = headers.get(b"origin", [b""])[0].decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            raise ApiError(403, "a page of another origin may not use this server without a key", code="wrong_origin")

    def _limited(self, receive: Receive, scope: Scope) -> Receive:
        """Count a body while it arrives: chunks announce no length."""
        limits, got, complete = self.settings.limits, 0, False
        most = scope["state"]["most_bytes"]
        until = time.monotonic() + limits.body_s

        async def take() -> Message:
            nonlocal got, complete
            if complete:  # waiting for the client to leave may take as long as the answer
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, f"the body took longer than {limits.body_s:g} s", close=True) from None
            if message["type"] == "http.request":
                got += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if got > most:
                    raise ApiError(413, f"the body has more than {most:,} bytes", close=True)
            return message

        return take

    def _note(self, scope: Scope, state: dict[str, Any], status: int, took_s: float) -> None:
        route = scope.get("route")
        name = getattr(route, "path", None) or ("unknown" if status != 401 else "refused")
        self.metrics.requests.labels(name, str(status)).inc()
        if scope["path"] in OPEN and status in (200, 503):
            return  # a probe every second would be most of the log
        say(
            logging.ERROR if status >= 500 and status != 503 else logging.INFO,
            "request",
            id=state["id"],
            method=scope["method"],
            path=scope["path"],
            status=status or "gone",
            ms=round(took_s * 1000, 1),
            tenant=state.get("tenant") or None,
            **state.get("noted", {}),
        )


def _request_id(scope: Scope) -> str:
    """The client's own id, where it is one, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            if _ID.fullmatch(text):
                return str(text)
    return secrets.token_hex(8)
