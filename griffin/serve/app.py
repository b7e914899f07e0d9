"""The application: routes, what stands before them, and the page."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import resources
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

import griffin
from griffin.serve import answers, openai, replies, responses, sessions, vertex
from griffin.serve.ask import check_chars, check_model, encode
from griffin.serve.body import JsonRoute
from griffin.serve.chat import prompt_of
from griffin.serve.errors import ApiError, api_error, asked_wrongly, http_error, validation_error
from griffin.serve.guard import Guard
from griffin.serve.log import say
from griffin.serve.metrics import CONTENT_TYPE
from griffin.serve.schema import DetokenizeBody, TokenizeBody
from griffin.serve.settings import Settings
from griffin.serve.worker import Loaded, Worker

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
# Nothing of the page may come from elsewhere, be framed, or be a script that somebody wrote into it.
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(settings: Settings, load: Callable[[Settings], Loaded] | None = None) -> FastAPI:
    """Make the application. `app.state.worker` is its worker, which the caller starts.

    Args:
        settings: the server's.
        load: makes the model ready; None: `griffin.serve.load.load`.
    """
    if load is None:
        from griffin.serve.load import load as from_folder

        load = from_folder
    worker = Worker(settings, load)
    app = FastAPI(
        title="griffin",
        version=griffin.__version__,
        docs_url=None,  # its scripts come from another's network
        redoc_url=None,
        redirect_slashes=False,  # a Location made of the Host header
    )
    app.state.worker = worker
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(Exception, _fault)
    app.include_router(openai.routes(worker))
    app.include_router(responses.routes(worker))
    app.include_router(sessions.routes(worker, openai.ERRORS))
    app.include_router(_routes(worker))
    if (contract := settings.vertex) is not None:

        async def health() -> JSONResponse:
            return _health(worker)

        app.include_router(vertex.routes(worker, contract, health))
        own = frozenset({contract.health_route, contract.predict_route})
    else:
        own = frozenset()
    page = _page_files() if settings.page else {}
    for path, (content, kind) in page.items():
        app.add_route(path, _static(content, kind), methods=["GET", "HEAD"], include_in_schema=False)
    app.add_middleware(Guard, settings=settings, metrics=worker.metrics, open_paths=own | frozenset(page))
    openapi = app.openapi

    def without_422() -> dict[str, Any]:
        return _as_answered(openapi())

    app.openapi = without_422  # type: ignore[method-assign]
    return app


async def _fault(request: HttpRequest, error: Exception) -> JSONResponse:
    """A mistake of ours: the client learns the request's id, the log the rest."""
    name = request.scope["state"]["id"]
    logging.getLogger("griffin.serve").error("fault", exc_info=error, extra={"fields": {"id": name}})
    return ApiError(500, f"a mistake of this server; its log has more under request id {name}").response()


def _routes(worker: Worker) -> APIRouter:
    router = APIRouter(route_class=JsonRoute, responses=openai.ERRORS)
    settings = worker.settings

    @router.get("/v1/models", response_model=None, responses={200: {"model": replies.ModelList}}, tags=["OpenAI"])
    async def models() -> replies.ModelList:
        """List the models there are."""
        return {"object": "list", "data": [_model(worker)]}

    @router.get(
        "/v1/models/{name:path}", response_model=None, responses={200: {"model": replies.ModelReply}}, tags=["OpenAI"]
    )
    async def model(name: str) -> replies.ModelReply:
        """Say what a model is."""
        check_model(name, settings.model_name, settings.model)
        return _model(worker)

    @router.post("/tokenize", response_model=None, responses={200: {"model": replies.TokenizeReply}}, tags=["Text"])
    async def tokenize(body: TokenizeBody) -> replies.TokenizeReply:
        """Turn a text, or messages, into ids."""
        check_model(body.model, settings.model_name, settings.model)
        loaded = worker.ready()
        if body.prompt is not None:
            check_chars(len(body.prompt), settings.limits, "prompt")
            ids = await encode(loaded, body.prompt, bos=body.add_special_tokens)
        else:
            assert body.messages is not None
            ids, _ = await prompt_of(body.messages, loaded, settings.limits, generation=body.add_generation_prompt)
        made: replies.TokenizeReply = {"count": len(ids), "tokens": ids}
        if body.return_token_strs:
            made["token_strs"] = [answers.token_name(loaded.tokenizer, token) for token in ids]
        return made

    @router.post("/detokenize", response_model=None, responses={200: {"model": replies.DetokenizeReply}}, tags=["Text"])
    async def detokenize(body: DetokenizeBody) -> replies.DetokenizeReply:
        """Turn ids into a text."""
        check_model(body.model, settings.model_name, settings.model)
        with asked_wrongly("tokens"):
            return {"prompt": worker.ready().tokenizer.decode(body.tokens)}

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}}, tags=["Life"])
    async def metrics() -> Response:
        """Give Prometheus what it counts."""
        return Response(worker.metrics.text(), media_type=CONTENT_TYPE)

    async def health() -> JSONResponse:
        """Say whether requests are answered: 200, or 503 while the model is loaded, has failed, or the server stops."""
        return _health(worker)

    for path in ("/health", "/ready", "/readyz", "/ping"):
        router.add_api_route(
            path,
            health,
            methods=["GET"],
            name=path.strip("/"),
            response_model=None,
            responses={status: {"model": replies.HealthReply, "description": "Its status."} for status in (200, 503)},
            tags=["Life"],
        )

    @router.get("/livez", response_model=None, responses={200: {"model": replies.HealthReply}}, tags=["Life"])
    async def livez() -> replies.HealthReply:
        """Say that the process answers, whatever the model does."""
        return {"status": worker.status}

    return router


def _model(worker: Worker) -> replies.ModelReply:
    return {
        "id": worker.settings.model_name,
        "object": "model",
        "created": worker.created,
        "owned_by": "griffin",
        "griffin": worker.ready().facts,
    }


def _health(worker: Worker) -> JSONResponse:
    """From memory: it waits for no lock of the engine's."""
    status = worker.status
    if status == "ok" and worker.stalled:
        status = "failed"
    return JSONResponse({"status": status}, 200 if status == "ok" else 503)


def _page_files() -> dict[str, tuple[bytes, str]]:
    """Read the page's files once: what is served is a table, and no path leads to the disk."""
    found: dict[str, tuple[bytes, str]] = {}
    for file in resources.files("griffin.serve").joinpath("page").iterdir():
        kind = _KINDS.get(file.name.rpartition(".")[2])
        if kind is not None:
            found["/" if file.name == "index.html" else f"/page/{file.name}"] = file.read_bytes(), kind
    return found


def _static(content: bytes, kind: str) -> Callable[[HttpRequest], Response]:
    async def serve(request: HttpRequest) -> Response:
        return Response(content, media_type=kind, headers=_PAGE_HEADERS)

    return serve  # type: ignore[return-value]


def _as_answered(document: dict[str, Any]) -> dict[str, Any]:
    """Take out of the published document what is never answered: FastAPI's own 422."""
    for operations in document["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    for name in ("HTTPValidationError", "ValidationError"):
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document


def warn_of(settings: Settings) -> None:
    """Say once, at the start, what an operator may not want."""
    if settings.insecure and not settings.keys:
        say(logging.WARNING, "no key: whoever reaches this address uses the model", host=settings.host)
