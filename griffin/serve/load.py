"""A model from its name to an engine that turns. The only file here that imports torch, when it is called."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from griffin.errors import GriffinError
from griffin.serve.log import say
from griffin.serve.settings import Settings
from griffin.serve.worker import Loaded

if TYPE_CHECKING:
    from griffin.infer.engine import Engine
    from griffin.tokenizer import Tokenizer


def load(settings: Settings) -> Loaded:
    """Load model and tokenizer, and start the engine.

    Raises:
        GriffinError: the folder cannot be loaded, the device is not there, or the slots do not fit.
    """
    import torch

    from griffin import checkpoint
    from griffin.infer.engine import Engine
    from griffin.infer.sessions import Sessions
    from griffin.infer.snapshots import Snapshots
    from griffin.machine import find_device
    from griffin.memory import keep_freed_memory

    name = settings.model
    if name.startswith("gs://"):
        name = str(from_storage(name))
    tokenizer = checkpoint.load_tokenizer(name)
    if settings.chat_template is not None:
        tokenizer = tokenizer.with_chat_template(settings.chat_template)
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    model = checkpoint.load(name, device=find_device(settings.device), dtype=dtype)
    if model.device.type == "cpu":
        keep_freed_memory()
    snapshots = Snapshots(model, max_bytes=settings.snapshot_bytes, say=_warn) if settings.snapshot_bytes else None
    engine = Engine(
        model,
        tokenizer,
        slots=settings.slots,
        max_bytes=settings.max_bytes,
        chunk=settings.chunk,
        max_queue=settings.max_queue,
        snapshots=snapshots,
    )
    engine.start()
    warm_up(engine, tokenizer)
    state = model.new_state(1)
    return Loaded(
        engine=engine,
        tokenizer=tokenizer,
        facts={
            "chat_template": tokenizer.chat_template is not None,
            "vocab_size": model.config.vocab_size,
            "window": model.config.window,
            "state_bytes": None if model.config.window is None else state.nbytes,
            "slots": engine.slots,
            "embedding_width": model.config.width,
        },
        folds_system=refuses_system(tokenizer),
        snapshots=snapshots,
        sessions=Sessions(
            model,
            tokenizer.fingerprint(),
            folder=settings.state_folder,
            max_bytes=settings.session_bytes,
            say=_warn,
        ),
    )


def from_storage(uri: str) -> Path:
    """Download a model folder from Cloud Storage, with the credentials that this machine is lent."""
    from griffin.serve.vertex import fetch_model

    try:
        from google.cloud import storage
    except ImportError as error:
        raise GriffinError(f"{uri} needs google-cloud-storage; pip install 'griffin-lm[vertex]'") from error
    place = hashlib.sha256(uri.encode()).hexdigest()[:16]
    return fetch_model(uri, Path(tempfile.gettempdir()) / f"griffin-model-{place}", storage.Client())


def warm_up(engine: Engine, tokenizer: Tokenizer) -> None:
    """Answer once, so that the first client does not wait for what is made at first use."""
    from griffin.infer.request import Request

    engine.submit(Request(prompt=tuple(tokenizer.begin_ids) or (0,), max_tokens=2), keep_state=False).completion()


def _warn(text: str) -> None:
    say(logging.WARNING, text)


def refuses_system(tokenizer: Tokenizer) -> bool:
    """Whether the chat template has no place for a system's message, as Gemma's."""
    if tokenizer.chat_template is None:
        return False
    try:
        tokenizer.encode_chat([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
    except GriffinError:
        return True
    return False
