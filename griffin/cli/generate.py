"""griffin generate: prompts in, continuations out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from griffin.cli import options
from griffin.errors import GriffinError

if TYPE_CHECKING:
    from griffin.infer.generate import Completion, Piece, TokenLogprob
    from griffin.tokenizer import Tokenizer


def generate(
    model: options.Model,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to continue; - reads one from stdin.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="A file with one prompt per line.")] = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.Penalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = None,
    chunk: options.Chunk = 512,
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
    loaded, tokenizer = options.open_model(model, device, dtype)

    from griffin.infer.generate import Options
    from griffin.infer.generate import generate as run

    ids = [
        tokenizer.encode_chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text) for text in texts
    ]
    waiting = options.Waiting("Reading the prompt" if len(texts) == 1 else "Reading the prompts")
    settings = Options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        logprobs=logprobs,
        prefill_chunk=chunk,
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

    Raises:
        GriffinError: there are none, or the file is not UTF-8.
    """
    texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    if file is not None:
        try:
            texts += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise GriffinError(f"{file}: not UTF-8 text ({error.reason}); convert it first") from error
    if not texts:
        raise GriffinError("no prompts; give a text, - for stdin, or --file with one prompt per line")
    return texts


def print_stream(pieces: Iterator[Piece], waiting: options.Waiting) -> None:
    for piece in pieces:
        waiting.stop()
        options.show(str(piece))
    typer.echo()


def print_completion(prompt: str, index: int, count: int, completion: Completion, tokenizer: Tokenizer) -> None:
    if count > 1:
        shown = " ".join(prompt.split())
        typer.echo(f"{'' if index == 0 else chr(10)}== {index + 1}: {shown if len(shown) < 70 else shown[:69] + '…'}")
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
    return json.dumps(content, ensure_ascii=False)
