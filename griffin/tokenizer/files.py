"""A tokenizer from the files of a model folder, in every arrangement that released folders have."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from reprlib import repr as brief  # a file can hold anything
from typing import Any

import tokenizers

from griffin.errors import GriffinError
from griffin.reading import check_regular, read_json, read_text
from griffin.tokenizer import chat_template
from griffin.tokenizer.token_text import library_errors
from griffin.tokenizer.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first that is there counts
MOST_GROWTH = 1000  # times that a text may become longer before it is cut; in released folders it is below 50
DOWNLOAD = "download it again"

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

    A text begins with BOS as tokenizer_config.json says (`add_bos_token`), else as tokenizer.json's post-processor
    does; with tokenizer.model alone it does. So for EOS at the end, but with tokenizer.model alone there is none.

    Raises:
        GriffinError: a file is missing, truncated, contradicts another, is of a kind not supported, or could take up
            all memory; it is named.
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
        from griffin.tokenizer.sentencepiece import convert  # only Google's own folders have this kind of file

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
    named_ids = config.get("added_tokens_decoder") or {}
    if not isinstance(named_ids, dict):
        raise GriffinError(f"{beside}/tokenizer_config.json: added_tokens_decoder is {brief(named_ids)}, not an object")
    for index, written in named_ids.items():
        content = _token_text(f"{beside}/tokenizer_config.json: added_tokens_decoder[{brief(index)}]", written)
        found_at = None if content is None else backend.token_to_id(content)
        if found_at is None or str(found_at) != index:
            raise GriffinError(
                f"{beside}/tokenizer_config.json says id {index[:20]} is {brief(content)}, but {file.name} has it at "
                f"{found_at}; open and save the folder once with transformers"
            )

    tokens: dict[str, str | None] = {}
    sources = (("tokenizer_config.json", config), ("special_tokens_map.json", token_map))
    for name, default in defaults.items():
        named = ((source, settings[name]) for source, settings in sources if name in settings)
        source, entry = next(named, (file.name, default))
        token = tokens[name] = _token_text(f"{file.parent / source}: {name}", entry)
        if token is not None and backend.token_to_id(token) is None:
            raise GriffinError(f"{file.parent / source}: {name} {brief(token)} is not in the vocabulary of {file.name}")
    add_bos, add_eos = (config.get(name) for name in ("add_bos_token", "add_eos_token"))
    if not all(value in (None, True, False) for value in (add_bos, add_eos)):
        raise GriffinError(
            f"{beside}/tokenizer_config.json: add_bos_token is {brief(add_bos)}, add_eos_token {brief(add_eos)}; "
            "each must be true or false"
        )
    if add_bos is None or add_eos is None:
        written = (True, False) if file.suffix == ".model" else _adds(file, backend, tokens)
        add_bos = written[0] if add_bos is None else add_bos
        add_eos = written[1] if add_eos is None else add_eos
    return Tokenizer(
        backend,
        bos=tokens["bos_token"],
        eos=tokens["eos_token"],
        pad=tokens["pad_token"],
        chat_template=template,
        stop_ids=_stop_ids(beside),
        add_bos=add_bos,
        add_eos=add_eos,
    )


def _read_settings(folder: Path | None, name: str) -> dict[str, Any]:
    """Read a JSON object; {} where the file does not exist."""
    if folder is None or not (folder / name).exists():
        return {}
    return read_json(folder / name, mend=DOWNLOAD)


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    check_regular(file, mend=DOWNLOAD)
    with library_errors(f"{file}: not a whole tokenizer.json", "download or save it again"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    growth = _growth(_written(backend.normalizer)) * _growth(_written(backend.pre_tokenizer))
    if growth > MOST_GROWTH:
        raise GriffinError(
            f"{file}: its normaliser or pre-tokenizer can make a text {growth:,} times as long, more than "
            f"{MOST_GROWTH:,}, and so take up all memory; {DOWNLOAD}"
        )
    return backend


def _written(part: Any) -> dict[str, Any]:
    """A part of a backend as tokenizer.json has it; {} where there is none."""
    found: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return found


def _growth(part: dict[str, Any]) -> int:
    """Bound how many characters a normaliser or pre-tokenizer makes of one, Unicode's normal forms not counted."""
    kind, content = part.get("type"), part.get("content", "")
    growth = 1
    if kind == "Sequence":
        for step in part.get("normalizers") or part.get("pretokenizers") or ():
            growth *= _growth(step)
    elif kind == "Replace" and "String" in part["pattern"]:
        growth = -(-len(content) // max(1, len(part["pattern"]["String"])))
    elif kind == "Replace":
        growth = len(content) + bool(content)  # a pattern may match between all characters
    elif kind == "Prepend":
        growth = len(part["prepend"])
    elif kind == "ByteLevel":
        growth = 4
    elif kind == "Precompiled":
        table = base64.b64decode(part["precompiled_charsmap"])
        texts = table[4 + int.from_bytes(table[:4], "little") :]  # behind the trie that points into them
        growth = max(map(len, texts.split(b"\0")))
    return max(1, growth)


def _adds(file: Path, backend: tokenizers.Tokenizer, tokens: dict[str, str | None]) -> tuple[bool, bool]:
    """Whether tokenizer.json itself begins texts with BOS, and ends them with EOS."""
    begin, end = _around(_written(backend.post_processor))
    bos, eos = ([] if tokens[name] is None else [tokens[name]] for name in ("bos_token", "eos_token"))
    if begin not in ([], bos) or end not in ([], eos):
        raise GriffinError(
            f"{file} puts {brief(begin)} before and {brief(end)} behind every text, and bos_token is "
            f"{brief(tokens['bos_token'])}, eos_token {brief(tokens['eos_token'])}; only these can stand there: "
            "set add_bos_token and add_eos_token in tokenizer_config.json to true or false"
        )
    return bool(begin), bool(end)


def _around(processor: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The tokens that a post-processor puts before and behind a text."""
    kind = processor.get("type")
    begin: list[str] = []
    end: list[str] = []
    if kind == "Sequence":
        for step in processor["processors"]:
            before, behind = _around(step)
            begin, end = [*before, *begin], [*end, *behind]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        begin, end = [processor["cls"][0]], [processor["sep"][0]]
    elif kind == "TemplateProcessing":
        place = begin
        for piece in processor["single"]:
            if "Sequence" in piece:
                place = end
            else:
                place += processor["special_tokens"][piece["SpecialToken"]["id"]]["tokens"]
    return begin, end


def _token_text(where: str, entry: object) -> str | None:
    """A token as its files write it: a string, {"content": string} or null."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    if text is not None and not isinstance(text, str):
        raise GriffinError(f"{where} is {brief(text)}, not a string")
    return text


def _chat_template(folder: Path | None, config: dict[str, Any]) -> str | None:
    if folder is not None and (folder / "chat_template.jinja").exists():
        return read_text(folder / "chat_template.jinja", mend=DOWNLOAD)
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
            f"{folder}/generation_config.json: eos_token_id is {brief(entry)}, not a number or a list of them"
        )
    return ids
