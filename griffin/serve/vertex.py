"""Vertex AI's contract for a container: where to listen, what to load, and the bodies of its predict route.

Source: https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fastapi import APIRouter
from pydantic import ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from griffin.errors import GriffinError
from griffin.files import whole_folder
from griffin.serve import answers, openai
from griffin.serve.ask import LEGACY_MAX_TOKENS, check_model, prompts_of, request_of
from griffin.serve.body import parse
from griffin.serve.chat import is_forced, prompt_of, tools_of
from griffin.serve.errors import ApiError, invalid
from griffin.serve.grammars import grammar_of
from griffin.serve.respond import GONE, Asked, choice_of, note
from griffin.serve.schema import ChatBody, CompletionBody
from griffin.serve.worker import ClientGoneError, Loaded, Worker, while_connected

MOST_INSTANCES = 64
_FORMAT = "@requestFormat"
_KEPT = (".safetensors", ".json", ".model", ".jinja", "SHA256SUMS")
_Body = ChatBody | CompletionBody


@dataclass(frozen=True, kw_only=True)
class Vertex:
    """What Vertex AI tells a container by its environment."""

    port: int
    health_route: str
    predict_route: str
    storage_uri: str | None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Vertex | None:
        """Read the variables; None where AIP_MODE is not set: this is no such container.

        Raises:
            GriffinError: one is not what it must be.
        """
        if not environment.get("AIP_MODE"):
            return None
        endpoint = environment.get("AIP_ENDPOINT_ID", "ENDPOINT")
        model = environment.get("AIP_DEPLOYED_MODEL_ID", "DEPLOYED_MODEL")
        usual = f"/v1/endpoints/{endpoint}/deployedModels/{model}:predict"  # of both, one by GET, one by POST
        port = environment.get("AIP_HTTP_PORT", "8080")
        if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise GriffinError(f"AIP_HTTP_PORT={port!r:.20} must be a port, 1 .. 65535")
        routes = [environment.get(name) or usual for name in ("AIP_HEALTH_ROUTE", "AIP_PREDICT_ROUTE")]
        for route in routes:
            if not route.startswith("/") or "{" in route or "?" in route:
                raise GriffinError(f"the route {route!r:.80} must be a path that begins with /")
        return cls(
            port=int(port),
            health_route=routes[0],
            predict_route=routes[1],
            storage_uri=environment.get("AIP_STORAGE_URI") or None,
        )


def routes(worker: Worker, vertex: Vertex, health: Any) -> APIRouter:
    """Make the two routes, which are no part of the published document. What the server has already stays."""
    router = APIRouter(include_in_schema=False)
    taken = {"/health", "/ready", "/readyz", "/ping", "/livez"}
    if vertex.health_route not in taken:
        router.add_api_route(vertex.health_route, health, methods=["GET"], response_model=None)
    if vertex.predict_route not in ("/v1/completions", "/v1/chat/completions"):

        async def predict_route(http: HttpRequest) -> Response:
            return await predict(worker, http)

        router.add_api_route(vertex.predict_route, predict_route, methods=["POST"], response_model=None)
    return router


async def predict(worker: Worker, http: HttpRequest) -> Response:
    """Answer any body of the predict route: instances with parameters, or OpenAI's own, whole or as a stream.

    Raises:
        ApiError: one instance is wrong, and so all of them: there is no answer to some.
    """
    body = parse(await http.body())
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object: instances and parameters, or OpenAI's")
    if "instances" not in body:
        return await _openai(worker, _body(body, ""), http)
    instances, parameters = body["instances"], body.get("parameters")
    parameters = {} if parameters is None else parameters
    if not isinstance(instances, list) or not 1 <= len(instances) <= MOST_INSTANCES:
        raise ApiError(400, f"instances must be a list of 1 to {MOST_INSTANCES}", param="instances")
    if not isinstance(parameters, dict):
        raise ApiError(400, "parameters must be an object", param="parameters")
    form = body.get(_FORMAT)
    if unknown := sorted(body.keys() - {"instances", "parameters", _FORMAT}):
        raise ApiError(400, f"unknown field: {unknown[0][:60]}", param=unknown[0][:60], code="unknown_parameter")
    bodies, whole = [], []
    for place, instance in enumerate(instances):
        given = {"prompt": instance} if isinstance(instance, str) else instance
        if not isinstance(given, dict):
            raise ApiError(400, f"instances[{place}] must be a text or an object", param=f"instances[{place}]")
        merged = {**parameters, **given}
        whole.append(merged.pop(_FORMAT, form) is not None)
        bodies.append(_body(merged, f"instances[{place}]"))
    if len(bodies) == 1 and bodies[0].stream:
        return await _openai(worker, bodies[0], http)
    return await _all(worker, bodies, whole, http)


async def _openai(worker: Worker, body: _Body, http: HttpRequest) -> Response:
    if isinstance(body, ChatBody):
        return await openai.chat(worker, body, http)
    return await openai.complete(worker, body, http)


async def _all(worker: Worker, bodies: list[_Body], whole: list[bool], http: HttpRequest) -> Response:
    loaded = worker.has_room()
    requests, asked = [], []
    for place, body in enumerate(bodies):
        if body.stream or body.session is not None:
            raise ApiError(400, f"instances[{place}]: stream and session are for one instance at a time")
        check_model(body.model, worker.settings.model_name, worker.settings.model)
        request, how = await _request(worker, loaded, body, place)
        requests.append(request)
        asked.append(how)
    answer = await worker.submit(
        requests, tenant=http.state.tenant, until=http.state.arrival + worker.settings.request_s, whole=True
    )
    try:
        await while_connected(http.receive, answer.wait())  # type: ignore[arg-type]
        predictions: list[Any] = []
        for handle, how, is_whole in zip(answer.handles, asked, whole, strict=True):
            completions = handle.completions(timeout=5)
            count = len(handle.request.prompt), sum(len(each.tokens) for each in completions)
            usage = answers.usage(*count, handle.from_snapshots)
            if is_whole:
                choices = [choice_of(index, each, how, loaded) for index, each in enumerate(completions)]
                predictions.append(
                    {
                        "id": f"{'chatcmpl' if how.form == 'chat' else 'cmpl'}-{secrets.token_hex(12)}",
                        "object": "chat.completion" if how.form == "chat" else "text_completion",
                        "created": int(time.time()),
                        "model": worker.settings.model_name,
                        "choices": choices,
                        "usage": usage,
                    }
                )
            else:
                texts = [each.text for each in completions]
                predictions.append(
                    {
                        "content": texts[0] if len(texts) == 1 else texts,
                        "finish_reason": answers.finish(completions[0].finish_reason),
                        "usage": usage,
                    }
                )
        note(http, answer)
        return JSONResponse({"predictions": predictions})
    except ClientGoneError:
        return Response(status_code=GONE)
    finally:
        answer.close()


async def _request(worker: Worker, loaded: Loaded, body: _Body, place: int) -> tuple[Any, Asked]:
    limits = worker.settings.limits
    if isinstance(body, ChatBody):
        tools = tools_of(body)
        ids, _ = await prompt_of(body.messages, loaded, limits, tools=tools, forced=is_forced(body))
        request = request_of(
            body,
            loaded,
            ids,
            max_tokens=body.max_completion_tokens or body.max_tokens or limits.default_max_tokens,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar_of(body, tools, forced=is_forced(body)),
        )
        return request, Asked(form="chat", logprobs=request.logprobs, tools=tools)
    prompts = await prompts_of(body, loaded, limits, bos=True)
    if len(prompts) != 1:
        raise ApiError(400, f"instances[{place}]: one prompt an instance", param=f"instances[{place}].prompt")
    request = request_of(
        body,
        loaded,
        prompts[0],
        max_tokens=LEGACY_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        grammar=grammar_of(body),
        prompt_logprobs=body.logprobs if body.echo else None,
    )
    return request, Asked(form="text", logprobs=body.logprobs, echo=prompts if body.echo else None)


def _body(given: dict[str, Any], where: str) -> _Body:
    """Check one body. @requestFormat may stand in it, and names the form that it has."""
    given = {key: value for key, value in given.items() if key != _FORMAT}
    try:
        if "messages" in given:
            return ChatBody.model_validate(given)
        return CompletionBody.model_validate(given)
    except ValidationError as error:
        raise invalid(error.errors(), prefix=where) from error


def fetch_model(uri: str, folder: Path, client: Any) -> Path:
    """Download a model folder from Cloud Storage: whole or not at all, each file against its checksum.

    Args:
        uri: gs://BUCKET/FOLDER.
        folder: where to; what is there already is used as it is.
        client: google.cloud.storage.Client().

    Returns:
        The folder.

    Raises:
        GriffinError: there is no such folder, or it holds no weights in safetensors.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, prefix = rest.partition("/")
    if scheme != "gs" or not bucket:
        raise GriffinError(f"{uri!r:.200} is no gs://BUCKET/FOLDER")
    if folder.exists():
        return folder
    prefix = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
    found = {}
    for blob in client.list_blobs(bucket, prefix=prefix):
        name = PurePosixPath(blob.name[len(prefix) :])
        if len(name.parts) == 1 and name.name.endswith(_KEPT):  # no folders, no code
            found[name.name] = blob
    if not any(name.endswith(".safetensors") for name in found):
        raise GriffinError(f"{uri} holds no weights in safetensors; upload what griffin.save wrote")
    with whole_folder(folder) as temporary, ThreadPoolExecutor(8) as pool:
        files = [
            pool.submit(blob.download_to_filename, str(temporary / name), checksum="crc32c")
            for name, blob in found.items()
        ]
        for file in files:
            file.result()
    return folder
