"""A tokenizer from the files of a model folder, in every arrangement that released folders have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from griffin import chat_template
from griffin.errors import GriffinError
from griffin.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first that is there counts

# For a bare tokenizer.json, which does not say what its special tokens are for.
USUAL_NAMES = {
    "bos_token": ("<bos>", "<s>", "<|begin_of_text|>"),
    "eos_token": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
    "pad_token": ("<pad>",),
}


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Open the tokenizer of a model folder, or of a single tokenizer.json or SentencePiece `*.model` file.

    tokenizer.json is preferred to tokenizer.model; special tokens, chat template and stop ids come from the usual
    files beside it. Nothing in the folder is executed.

    Raises:
        GriffinError: a file is missing, truncated, contradicts another or is of a kind not supported; it is named.
    """
    path = Path(folder)
    file = path
    if path.is_dir():
        found = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        if not found:
            raise GriffinError(f"{path}: no tokenizer here; the folder needs a {' or a '.join(TOKENIZER_FILES)}")
        file = found[0]
    elif not path.is_file():
        raise GriffinError(f"{path}: no such file or folder; give a model folder, a tokenizer.json or a *.model file")
    beside = file.parent if file.name in TOKENIZER_FILES else None  # other names stand alone
    config = _read_settings(beside, "tokenizer_config.json")
    token_map = _read_settings(beside, "special_tokens_map.json")

    template = _chat_template(beside, config)
    if file.suffix == ".model":
        from griffin.sentencepiece import convert  # only Google's own folders have this kind of file

        backend, defaults = convert(file)
        if template is None and backend.token_to_id("<start_of_turn>") is not None:
            template = chat_template.GEMMA
    else:
        backend = _read_backend(file)
        specials = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        defaults = dict.fromkeys(USUAL_NAMES)
        if not config and not token_map:
            for name, usual in USUAL_NAMES.items():
                defaults[name] = next((token for token in usual if token in specials), None)
    for index, written in (config.get("added_tokens_decoder") or {}).items():
        content = _token_text(f"{beside}/tokenizer_config.json: added_tokens_decoder[{index}]", written)
        found_at = None if content is None else backend.token_to_id(content)
        if found_at is None or str(found_at) != index:
            raise GriffinError(
                f"{beside}/tokenizer_config.json says id {index} is {content!r}, but {file.name} has it at "
                f"{found_at}; open and save the folder once with transformers"
            )

    tokens: dict[str, str | None] = {}
    sources = (("tokenizer_config.json", config), ("special_tokens_map.json", token_map))
    for name, default in defaults.items():
        named = ((source, settings[name]) for source, settings in sources if name in settings)
        source, entry = next(named, (file.name, default))
        token = tokens[name] = _token_text(f"{file.parent / source}: {name}", entry)
        if token is not None and backend.token_to_id(token) is None:
            raise GriffinError(f"{file.parent / source}: {name} {token!r} is not in the vocabulary of {file.name}")
    return Tokenizer(
        backend,
        bos=tokens["bos_token"],
        eos=tokens["eos_token"],
        pad=tokens["pad_token"],
        chat_template=template,
        stop_ids=_stop_ids(beside),
    )


def _read_settings(folder: Path | None, name: str) -> dict[str, Any]:
    """Read a JSON object; {} where the file does not exist."""
    if folder is None or not (folder / name).is_file():
        return {}
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise GriffinError(f"{folder / name}: not valid JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise GriffinError(f"{folder / name}: a {type(content).__name__} where a JSON object belongs")
    return content


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise GriffinError(f"{file}: not a whole tokenizer.json ({error}); download or save it again") from error


def _token_text(where: str, entry: object) -> str | None:
    """A token as its files write it: a string, {"content": string} or null."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and not isinstance(text, str):
        raise GriffinError(f"{where} is {text!r}, not a string")
    return text


def _chat_template(folder: Path | None, config: dict[str, Any]) -> str | None:
    if folder is not None and (folder / "chat_template.jinja").is_file():
        try:
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except ValueError as error:
            raise GriffinError(f"{folder / 'chat_template.jinja'}: not UTF-8 text ({error})") from error
    for name, settings in (
        ("chat_template.json", _read_settings(folder, "chat_template.json")),
        ("tokenizer_config.json", config),
    ):
        entry = settings.get("chat_template")
        if isinstance(entry, list):  # several, by name
            try:
                named = {each["name"]: each["template"] for each in entry}
            except (TypeError, KeyError):
                named = {}
            entry = named.get("default", next(iter(named.values())) if len(named) == 1 else entry)
        if isinstance(entry, str):
            return entry
        if entry is not None:
            raise GriffinError(
                f"{folder}/{name}: chat_template must be a string, or a list of {{name, template}} with a 'default'"
            )
    return None


def _stop_ids(folder: Path | None) -> list[int]:
    entry = _read_settings(folder, "generation_config.json").get("eos_token_id")
    ids = [] if entry is None else entry if isinstance(entry, list) else [entry]
    if not all(type(index) is int for index in ids):
        raise GriffinError(
            f"{folder}/generation_config.json: eos_token_id is {entry!r}, not a number or a list of them"
        )
    return ids
