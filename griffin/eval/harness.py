"""lm-evaluation-harness over our model: log-likelihoods from forked states, generation by our engine.

`griffin eval --harness TASKS`, or the harness's own command with every option of it, which knows the model "griffin":

    python -m griffin.eval.harness run --model griffin --model_args pretrained=FOLDER --tasks arc_easy

(The harness finds models of others only once they are registered in its process; it has no hook for packages.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from griffin import checkpoint
from griffin.errors import GriffinError
from griffin.infer.generate import generate
from griffin.infer.request import Sampling
from griffin.machine import find_device
from griffin.model import Griffin
from griffin.score import log_likelihoods
from griffin.tokenizer import Tokenizer

MOST_NEW_TOKENS = 256  # of a generation whose task does not say
_IGNORED = {"do_sample"}  # normalised into the temperature by the harness


def model_class() -> Any:
    """Make the harness's model class around ours; importing this module needs no harness.

    Raises:
        GriffinError: the harness is not installed.
    """
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import normalize_gen_kwargs
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    except ImportError as error:
        raise GriffinError('lm-evaluation-harness is not installed: pip install "griffin-lm[eval]"') from error

    class GriffinLM(TemplateLM):  # type: ignore[misc]
        """`--model griffin`.

        Args:
            pretrained: a model folder, a Hugging Face id, or a loaded Griffin (then with `tokenizer`).
            tokenizer: of a loaded model.
            device, dtype, batch_size: as for `griffin.load`; the most rows at once.
            max_length: None: a text is read whole, however long. A number: texts longer than that are read in windows
                of so many tokens, each beginning anew, as models without a state must.
        """

        backend = "causal"

        def __init__(
            self,
            pretrained: str | Griffin,
            tokenizer: Tokenizer | None = None,
            device: str | None = "auto",
            dtype: str | None = None,
            batch_size: int | str = 32,
            max_length: int | None = None,
            max_batch_size: int | None = None,
        ) -> None:
            super().__init__()
            if isinstance(pretrained, str):
                kind = None if dtype in (None, "auto") else getattr(torch, dtype)
                self.griffin = checkpoint.load(pretrained, device=find_device(device or "auto"), dtype=kind)
                tokenizer = checkpoint.load_tokenizer(pretrained)
            else:
                self.griffin = pretrained
            if tokenizer is None:
                raise GriffinError("tokenizer=None with a loaded model: give its tokenizer")
            self.vocabulary, self.max_length = tokenizer, None if max_length is None else int(max_length)
            self.batch_rows = 32 if str(batch_size).startswith("auto") else int(batch_size)

        @property
        def eot_token_id(self) -> int:
            eos = self.vocabulary.eos_id
            return self.prefix_token_id if eos is None else eos

        @property
        def prefix_token_id(self) -> int:
            for token in (self.vocabulary.bos_id, self.vocabulary.eos_id):
                if token is not None:
                    return token
            raise GriffinError("this tokenizer has neither BOS nor EOS to begin a text with")

        @property
        def max_gen_toks(self) -> int:
            return MOST_NEW_TOKENS

        @property
        def tokenizer_name(self) -> str:
            return self.vocabulary.fingerprint()

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            # Control tokens in a text are read as such, as the harness does: chat templates write them.
            bos = self.vocabulary.decode([self.prefix_token_id], skip_special=False)
            begin = not string.startswith(bos) if add_special_tokens is None else add_special_tokens
            return self.vocabulary.encode(string, bos=begin, special=True)

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = [(self._cut(context, len(its)), its) for _, context, its in requests]
            found = log_likelihoods(self.griffin, pairs, batch_rows=self.batch_rows)
            answers = [(each.nats, each.greedy) for each in found]
            for (texts, _, _), answer in zip(requests, answers, strict=True):
                if texts is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            return answers

        def _cut(self, context: list[int], following: int) -> list[int]:
            """The end of a context that fits a window with what follows; all of it where there is no window."""
            return context if self.max_length is None else context[-max(1, self.max_length + 1 - following) :]

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            windows: list[Any] = []
            counts: list[int] = []
            for (text,) in (request.args for request in requests):
                tokens = self.tok_encode(text)
                pairs = get_rolling_token_windows(
                    tokens, self.prefix_token_id, max_seq_len=self.max_length or max(1, len(tokens)), context_len=1
                )
                its = [(None, *make_disjoint_window(pair)) for pair in pairs]
                windows, counts = windows + its, [*counts, len(its)]
            found = iter(self._loglikelihood_tokens(windows))
            totals = [sum(next(found)[0] for _ in range(count)) for count in counts]
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            texts: list[str] = []
            for start in range(0, len(requests), self.batch_rows):
                batch = [request.args for request in requests[start : start + self.batch_rows]]
                settings = [normalize_gen_kwargs(given, MOST_NEW_TOKENS) for _, given in batch]
                for each, (prompt, given) in zip(self._continued(batch, settings), batch, strict=True):
                    self.cache_hook.add_partial("generate_until", (prompt, given), each)
                    texts.append(each)
            return texts

        def _continued(self, batch: Sequence[Any], settings: Sequence[Mapping[str, Any]]) -> list[str]:
            """Prompts of like settings are continued together."""
            found = [""] * len(batch)
            keys = [repr({**each, "max_gen_toks": 0}) for each in settings]
            for key in dict.fromkeys(keys):
                rows = [row for row, each in enumerate(keys) if each == key]
                options = dict(settings[rows[0]])
                until, options["max_tokens"] = options.pop("until"), [settings[row]["max_gen_toks"] for row in rows]
                del options["max_gen_toks"]
                known = {field.name for field in fields(Sampling)} | {"max_tokens"}
                if unknown := options.keys() - known - _IGNORED:
                    raise GriffinError(f"generation option {min(unknown)} is not known here; there are {sorted(known)}")
                prompts = [self.tok_encode(batch[row][0]) for row in rows]
                done = generate(
                    self.griffin,
                    self.vocabulary,
                    prompts,
                    stop=[text for text in until if text],
                    **{name: value for name, value in options.items() if name not in _IGNORED},
                )
                for row, each in zip(rows, done, strict=True):
                    found[row] = each.text
            return found

        def apply_chat_template(
            self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
        ) -> str:
            return self.vocabulary.chat_text(chat_history, add_generation_prompt=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            return self.vocabulary.chat_template if chat_template else None

    return GriffinLM


def run_tasks(
    model: Griffin,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    batch_rows: int = 32,
) -> dict[str, Any]:
    """Run tasks of the harness.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        tasks: by name.
        include: a folder of YAML files with tasks of one's own.
        shots: examples before each question; None: as the task says.
        limit: the first so many documents of each task.
        chat: put prompts into the chat template.
        batch_rows: the most states at once.

    Returns:
        What `lm_eval.simple_evaluate` returns, without the samples.

    Raises:
        GriffinError: the harness is not installed, or has no such task.
    """
    made = model_class()(model, tokenizer, batch_size=batch_rows)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def unknown(manager: Any) -> list[str]:
        return [task for task in tasks if not manager.match_tasks([task])]

    own = None if include is None else str(include)
    manager = TaskManager(include_path=own, include_defaults=False) if own else None
    if manager is None or unknown(manager):  # the harness's own are 14,000 files, which take their time
        manager = TaskManager(include_path=own)
    if missing := unknown(manager):
        raise GriffinError(f"the harness has no task {missing[0]!r}; `lm-eval ls tasks` lists them")
    results: dict[str, Any] = simple_evaluate(
        model=made,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=0,
    )
    return results


def table(results: Mapping[str, Any]) -> str:
    """The harness's own table, as Markdown."""
    from lm_eval.utils import make_table

    return str(make_table(dict(results)))


def main() -> None:
    """The harness's command with `--model griffin`."""
    import lm_eval.models  # noqa: F401  (the registry fills itself with theirs only while it is empty)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    model_registry.register("griffin", target=model_class())
    cli_evaluate()


if __name__ == "__main__":
    main()
