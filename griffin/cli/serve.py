"""griffin serve: a model behind OpenAI's API and a chat page."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from griffin.cli import options
from griffin.errors import GriffinError, printable

if TYPE_CHECKING:
    from griffin.serve.vertex import Vertex

REPOSITORY = Path("/repository")  # where Hugging Face's Inference Endpoints put a model


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a Hugging Face id, or gs://BUCKET/FOLDER. Default in a container of Vertex AI or "
            "Hugging Face: what they give it.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="0.0.0.0 is reached from other machines, and needs a key. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="0 takes a free one. Default: 8000.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model. Default: its folder's name.")] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of keys, one a line. Or set GRIFFIN_API_KEY.")
    ] = None,
    admin_key_file: Annotated[
        Path | None, typer.Option(help="A file of administrators' keys. Or set GRIFFIN_ADMIN_KEY.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Serve a public address without a key.")] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name by which this server may be called without keys.")
    ] = None,
    slots: Annotated[int | None, typer.Option(min=1, help="Requests answered at once.")] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=1, help="Instead of --slots: as many as fit in this many bytes.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused with 429.")] = 64,
    request_timeout: Annotated[
        float | None, typer.Option(help="Seconds a request may take; then it ends as it is. Default: 600.")
    ] = None,
    shutdown_timeout: Annotated[float, typer.Option(help="Seconds that answers may go on after SIGTERM.")] = 25.0,
    state_folder: Annotated[Path | None, typer.Option(help="Where sessions are saved.")] = None,
    session_bytes: Annotated[int, typer.Option(min=0, help="Of memory, for sessions.")] = 2**30,
    snapshot_bytes: Annotated[
        int, typer.Option(min=0, help="Of memory, for states of texts that were read, so that they are not read again.")
    ] = 2**30,
    chat_template: Annotated[
        str | None, typer.Option(help="A file with a Jinja template, or gemma. Default: the model's own.")
    ] = None,
    no_page: Annotated[bool, typer.Option("--no-page", help="Do not serve the chat page at /.")] = False,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    chunk: options.Chunk = 512,
) -> None:
    """Serve a model: OpenAI's API under /v1, a chat page at /.

    The port answers at once; /health is 503 until the model is loaded. The log is JSON, on stderr. SIGTERM lets
    answers end. Keys: a caller sends Authorization: Bearer KEY.

    Examples:

        griffin serve runs/shakespeare/model

        griffin serve google/recurrentgemma-2b-it --dtype bfloat16 --slots 8

        openssl rand -hex 32 > keys; griffin serve my-model --host 0.0.0.0 --api-key-file keys
    """
    for package in ("fastapi", "uvicorn", "pydantic", "prometheus_client"):
        if find_spec(package) is None:
            raise GriffinError(f"griffin serve needs {package}; pip install 'griffin-lm[serve]'")

    from griffin.serve.run import serve as run
    from griffin.serve.settings import Settings, digests, read_keys
    from griffin.serve.vertex import Vertex

    def keys(file: Path | None, variable: str) -> frozenset[bytes]:
        found = frozenset() if file is None else read_keys(file)
        value = os.environ.get(variable)
        return found | digests([value], variable) if value else found

    vertex = Vertex.of(os.environ)
    settings = Settings(
        model=model_of(model, vertex),
        name=name,
        host=host or ("127.0.0.1" if vertex is None else "0.0.0.0"),
        port=port if port is not None else 8000 if vertex is None else vertex.port,
        vertex=vertex,
        keys=keys(api_key_file, "GRIFFIN_API_KEY"),
        admin_keys=keys(admin_key_file, "GRIFFIN_ADMIN_KEY"),
        hosts=frozenset(each.lower() for each in allow_host or ()),
        insecure=insecure or vertex is not None,  # its IAM stands before it
        device=device,
        dtype=None if dtype is None else dtype.value,
        slots=slots,
        max_bytes=max_bytes,
        max_queue=max_queue,
        chunk=chunk,
        chat_template=template_of(chat_template),
        state_folder=state_folder,
        session_bytes=session_bytes,
        snapshot_bytes=snapshot_bytes,
        # A shared endpoint of Vertex AI gives up after 60 s.
        request_s=request_timeout or (600.0 if vertex is None else 55.0),
        shutdown_s=shutdown_timeout,
        page=not no_page,
    )
    if sys.stderr.isatty() and settings.page and settings.port:
        typer.secho(printable(f"open http://{settings.host}:{settings.port}/ in a browser; Ctrl-C ends"), err=True)
    run(settings)


def model_of(given: str | None, vertex: Vertex | None) -> str:
    """Say which model is meant.

    Raises:
        GriffinError: none was given, and this is no container that was given one.
    """
    if given is not None:
        return given
    if vertex is not None and vertex.storage_uri is not None:
        return vertex.storage_uri
    if REPOSITORY.is_dir():
        return str(REPOSITORY)
    raise GriffinError("which model? griffin serve MODEL: a folder, or a Hugging Face id")


def template_of(given: str | None) -> str | None:
    """Read a template's source: a file, or the name of one that is known.

    Raises:
        GriffinError: the file cannot be read.
    """
    from griffin.reading import read_text
    from griffin.tokenizer.chat_template import GEMMA

    if given is None:
        return None
    return GEMMA if given == "gemma" else read_text(given, mend="give a file with a chat template, or gemma")
