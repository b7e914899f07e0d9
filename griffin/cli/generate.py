"""griffin generate: prompts in, continuations out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from griffin.cli import options, streams
from griffin.cli.waiting import Waiting
from griffin.errors import GriffinError
from griffin.infer.request import Sampling

if TYPE_CHECKING:
    from griffin.infer.request import Completion, Piece, TokenLogprob
    from griffin.tokenizer import Tokenizer


@options.with_sampling
def generate(
    model: options.Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue; - reads one from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    max_tokens: options.MaxTokens = 128,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    stop: options.Stop = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    chunk: options.Chunk = 512,
    adapter: options.Adapter = None,
    begin: options.Start = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts run at once.")] = 16,
    chat: Annotated[bool, typer.Option("--chat", help="Each prompt is a message: use the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per prompt and line.")] = False,
    logprobs: Annotated[
        int | None, typer.Option(help="Show log-probabilities, and those of the N likeliest tokens.")
    ] = None,
) -> None:
    """Continue each prompt and print what follows it.

    One prompt is printed as it is generated; several run together, and each gets what it would get alone.

    Examples:

        griffin generate my-model "Once upon a time"

        griffin generate google/recurrentgemma-2b-it --chat "Why is the sky blue?" --temperature 0.7

        griffin generate my-model - < chapter.txt --max-tokens 500 --seed 1

        griffin generate my-model --file prompts.txt --json > answers.jsonl
    """
    texts = read_prompts(prompts or [], file)
    loaded, tokenizer = options.open_model(model, device, dtype, adapter)

    from griffin.infer.generate import generate as run

    state, tokenizer = options.open_start(begin, loaded, tokenizer)
    ids = [
        tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text) for text in texts
    ]
    waiting = Waiting("Reading the prompt" if len(texts) == 1 else "Reading the prompts")
    settings: dict[str, Any] = dict(
        max_tokens=max_tokens,
        **asdict(sampling),
        stop=stop or (),
        logprobs=logprobs,
        prefill_chunk=chunk,
        state=state,
        progress=waiting.progress,
    )
    try:
        if len(texts) == 1 and not as_json and logprobs is None:
            print_stream(run(loaded, tokenizer, ids, stream=True, **settings), waiting)
            return
        for start in range(0, len(texts), batch):
            completions = run(loaded, tokenizer, ids[start : start + batch], **settings)
            waiting.stop()
            for index, completion in enumerate(completions, start):
                if as_json:
                    typer.echo(as_line(texts[index], completion))
                else:
                    print_completion(texts[index], index, len(texts), completion, tokenizer)
    finally:
        waiting.stop()


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Collect the prompts of the command line, of stdin where one is "-", and of the file.

    A line of the file ends with a line feed, or carriage return and line feed, and nothing else. A byte order mark is
    no text.

    Raises:
        GriffinError: there are none, or one is not UTF-8.
    """
    texts = []
    for number, prompt in enumerate(prompts, start=1):
        text = sys.stdin.read() if prompt == "-" else prompt
        streams.check_text(text, "stdin" if prompt == "-" else f"prompt {number}")
        texts.append(text)
    if file is not None:
        text = file.read_bytes().decode("utf-8-sig", errors="surrogateescape")
        streams.check_text(text, str(file))
        texts += [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line.strip()]
    if not texts:
        raise GriffinError("no prompts; give a text, - for stdin, or --file with one prompt per line")
    return texts


def print_stream(pieces: Iterator[Piece], waiting: Waiting) -> None:
    begun = False
    try:
        for piece in pieces:
            waiting.stop()
            begun = True
            options.show(str(piece))
    finally:
        if begun:  # what is said of an interrupt or an error has a line of its own
            typer.echo()


def print_completion(prompt: str, index: int, count: int, completion: Completion, tokenizer: Tokenizer) -> None:
    if count > 1:
        shown = " ".join(prompt.split())
        options.show(
            f"{'' if index == 0 else chr(10)}== {index + 1}: {shown if len(shown) < 70 else shown[:69] + '…'}\n"
        )
    options.show(completion.text + "\n")
    for each in completion.logprobs or ():
        typer.echo(logprob_line(each, tokenizer))


def logprob_line(each: TokenLogprob, tokenizer: Tokenizer) -> str:
    others = "   ".join(f"{value:.3f} {_shown(token, tokenizer)}" for token, value in each.top)
    return f"{each.logprob:9.3f}  {_shown(each.token, tokenizer):16} {others}".rstrip()


def _shown(token: int, tokenizer: Tokenizer) -> str:
    return repr(tokenizer.decode([token], skip_special=False))


def as_line(prompt: str, completion: Completion) -> str:
    content: dict[str, object] = {
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
    }
    if completion.logprobs is not None:
        content["logprobs"] = [asdict(each) for each in completion.logprobs]
    # An escape of stdout's for a character that its encoding has not would be no JSON.
    return json.dumps(content, ensure_ascii=not (sys.stdout.encoding or "utf-8").lower().startswith("utf"))
