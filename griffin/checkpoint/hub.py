"""Where a model is: a folder here, or a repository of the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from griffin.checksums import verify
from griffin.errors import GriffinError
from griffin.tokenizer import Tokenizer
from griffin.tokenizer import load_tokenizer as read_tokenizer


def resolve(path_or_hub_id: str | Path) -> Path:
    """Give the folder itself, or download a Hugging Face repository's model files and give their folder.

    Raises:
        GriffinError: neither a folder nor a repository that can be had.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if path.exists():
        raise GriffinError(f"{name} is a file; give the model folder it is in")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
        raise GriffinError(f"{name} does not exist; give a model folder or a Hugging Face id such as org/name")
    from huggingface_hub import snapshot_download  # not needed for folders

    try:
        wanted = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # many kinds, from many libraries below: network, licence, names
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise GriffinError(
            f"{name} is no folder here, and the Hugging Face hub did not give it: {reason[0]}"
        ) from error


def load_tokenizer(path_or_hub_id: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder or Hugging Face id.

    Raises:
        GriffinError: there is none, or it is damaged.
    """
    folder = resolve(path_or_hub_id)
    tokenizer = read_tokenizer(folder)
    verify(
        folder, [path.name for path in sorted(folder.iterdir()) if re.match(r"tokenizer|generation|chat_t", path.name)]
    )
    return tokenizer
