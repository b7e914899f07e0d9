"""TrainConfig: everything that decides a run, and how a recipe, a command line and run/config.json say it."""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from griffin.config import GriffinConfig
from griffin.data.batches import Long
from griffin.data.chat import Learnt
from griffin.errors import GriffinError
from griffin.lora import LoRA
from griffin.reading import parse_json

Dtype = Literal["fp32", "bf16"]
Recompute = Literal["none", "cheap", "all"]
Schedule = Literal["cosine", "wsd"]
Target = Literal["text", "chat", "dpo", "ipo", "orpo"]
Base = Literal["fp32", "bf16", "int8", "int4"]
PAIRS = ("dpo", "ipo", "orpo")
_WARMUP_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run. Two runs of one config on one machine with as many threads give the same weights.

    Raises:
        GriffinError: a field is out of range, or two fields do not fit; the message gives the numbers.
    """

    model: GriffinConfig | None  # None: that of init_from
    train_data: str  # a text file, a folder of them, or a folder of tokens (griffin.data.shards)
    validation_data: str | None = None  # likewise; None: the last 5% of train_data
    tokenizer: str | None = "bpe:4096"  # bpe:SIZE (learnt from train_data), bytes, or a path; None: that of init_from
    init_from: str | None = None  # a model folder to go on from; None: random weights
    objective: Target = "text"  # chat: of each example what is `learnt`; dpo, ipo, orpo: preference pairs
    learnt: Learnt = "answers"  # of a chat: answers, last (the last of them), all
    raw: bool = False  # prompts and completions that are texts are joined as they are, though there is a chat template
    chat_template: str | None = None  # its source; None: the tokenizer's
    long: Long = "truncate"  # what becomes of an example that no row holds: truncate, drop, split, error
    bad_rows: Literal["stop", "skip"] = "stop"  # of examples that cannot be used
    validation_fraction: float = 0.05  # of examples, where validation_data is None
    divider: str | None = None  # a text that ends a document, "<|endoftext|>" say; of objective=text
    beta: float = 0.1  # dpo, ipo: how much it costs to leave the reference; orpo: the weight of the preference
    lora: LoRA | None = None  # train adapters over init_from, whose weights stay; None: all weights are trained
    state_tokens: int = 0  # train the state that rows begin in, as if so many tokens had been read; 0: all weights
    state_prompt: str = ""  # what that state has read before training; "": BOS, again and again
    base: Base = "fp32"  # what init_from's weights are kept in below lora or state_tokens
    batch_rows: int = 8  # B, rows in one forward pass
    row_tokens: int = 256  # T, tokens of a row
    grad_accumulation: int = 1  # forward passes for one step
    steps: int
    learning_rate: float = 2e-3  # the peak, at the end of the warm-up
    schedule: Schedule = (
        "cosine"  # after the warm-up: half a cosine down; or wsd, the peak until decay_steps before the end
    )
    min_learning_rate: float = 0.1  # at the last step, as a fraction of the peak
    decay_steps: int | None = None  # of wsd; None: a fifth of the steps; 0: the rate never falls, and a run has no end
    warmup_steps: int | None = None  # None: 50, or half of the steps where those are fewer than 100; see `warmup`
    weight_decay: float = 0.1  # of the matrices of linear layers; see griffin.train.optim
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    grad_clip: float = 1.0  # longest gradient, in the 2-norm over all parameters
    dtype: Dtype = "fp32"  # bf16: fp32 weights and optimizer with bf16 activations
    recompute: Recompute = "none"  # activations that the backward pass computes again: none, cheap, all (see Griffin)
    compile: bool = False  # the blocks, with torch.compile: for a GPU, a minute at the start; a CPU has kernels instead
    seed: int = 0  # of the initial weights and of the order of the data
    validate_every: int = 200  # steps; also at the end
    validation_rows: int = 64  # rows of row_tokens, the same ones each time, spread over the validation data
    checkpoint_every: int = 200  # steps; also at the end
    keep_checkpoints: int = 2  # the newest ones
    keep_best: bool = False  # the run ends with what was best at validation, not with its last step
    sample_every: int = 0  # steps; 0: only before and after
    sample_prompt: str = ""
    log_every: int = 10  # steps
    tensorboard: bool = False  # also write run/tensorboard
    threads: int | None = None  # of the CPU; None: PyTorch's choice
    device: str = "cpu"  # cuda, cuda:1; auto: a GPU if there is one
    peak_flops: float | None = None  # of the device in matrix products, for MFU; None: what is known of it

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON has lists
        for field in fields(self):
            value = getattr(self, field.name)
            _require(self, field.name, not isinstance(value, int) or value < 2**63, "below 2^63")
        positive = "batch_rows row_tokens grad_accumulation steps validate_every validation_rows checkpoint_every"
        for name in (*positive.split(), "keep_checkpoints", "log_every"):
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        _require(self, "warmup_steps", self.warmup_steps is None or self.warmup_steps >= 0, "0 or more, or None")
        for name in ("sample_every", "seed", "state_tokens"):
            _require(self, name, getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "eps", "grad_clip", "beta"):
            _require(self, name, 0 < getattr(self, name) < math.inf, "positive")
        _require(self, "weight_decay", 0 <= self.weight_decay < math.inf, "0 or more")
        _require(self, "min_learning_rate", 0 <= self.min_learning_rate <= 1, "a fraction of learning_rate, 0 .. 1")
        _require(self, "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        _require(self, "dtype", self.dtype in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}")
        _require(self, "recompute", self.recompute in get_args(Recompute), f"one of {', '.join(get_args(Recompute))}")
        _require(self, "peak_flops", self.peak_flops is None or 0 < self.peak_flops < math.inf, "positive, or None")
        _require(self, "threads", self.threads is None or self.threads >= 1, "at least 1, or None")
        for name, kind in (
            ("schedule", Schedule),
            ("objective", Target),
            ("learnt", Learnt),
            ("base", Base),
            ("long", Long),
        ):
            _require(self, name, getattr(self, name) in get_args(kind), f"one of {', '.join(get_args(kind))}")
        _require(self, "bad_rows", self.bad_rows in ("stop", "skip"), "stop or skip")
        _require(self, "validation_fraction", 0 < self.validation_fraction < 1, "between 0 and 1")
        _require(self, "decay_steps", self.decay_steps is None or self.decay_steps >= 0, "0 or more, or None")
        _require(self, "train_data", bool(self.train_data), "the path of a text")
        if self.init_from is None and (self.model is None or self.tokenizer is None):
            raise GriffinError("model and tokenizer may be None only with init_from: give both, or a model folder")
        if self.warmup_steps is not None and self.warmup_steps >= self.steps:
            raise GriffinError(
                f"warmup_steps={self.warmup_steps} must be below steps={self.steps}: set it lower, or to none"
            )

        self._check_tuning()

    def _check_tuning(self) -> None:
        if self.lora is not None and self.state_tokens:
            raise GriffinError(f"lora and state_tokens={self.state_tokens} are two ways to tune; give one")
        if self.partial and self.init_from is None:
            raise GriffinError("lora and state_tokens tune a model that is there; give it (init_from)")
        if self.base != "fp32" and not self.partial:
            raise GriffinError(f"base={self.base} is for lora and state_tokens; whole weights are trained in fp32")
        if self.state_tokens and self.objective in PAIRS:
            raise GriffinError(
                f"state_tokens={self.state_tokens} with objective={self.objective} is not trained here; use lora"
            )
        if self.lora is not None and self.lora.dropout and self.recompute != "none":
            raise GriffinError(
                f"lora.dropout={self.lora.dropout} with recompute={self.recompute}: what is computed again would drop "
                "other numbers; set one of them to 0 or none"
            )
        if self.decay_steps is not None and self.decay_steps + self.warmup > self.steps:
            raise GriffinError(
                f"warmup_steps={self.warmup} and decay_steps={self.decay_steps} are more than steps={self.steps}"
            )

    @property
    def partial(self) -> bool:
        """Whether only something beside the model's own weights is trained."""
        return self.lora is not None or self.state_tokens > 0

    @property
    def decay(self) -> int:
        """Steps of the decay at the end, that of the default too."""
        return self.decay_steps if self.decay_steps is not None else min(self.steps // 5, self.steps - self.warmup)

    @property
    def warmup(self) -> int:
        """Steps of the warm-up, that of the default too: it follows `steps`, which may be set without it."""
        return self.warmup_steps if self.warmup_steps is not None else min(_WARMUP_STEPS, self.steps // 2)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def config_from_json(text: str, where: str) -> TrainConfig:
    """Read what `to_json` wrote.

    Raises:
        GriffinError: it is not JSON, has a key that TrainConfig has not or lacks one, or a value does not fit.
    """
    data = parse_json(text, where)
    try:
        model, lora = data.pop("model"), data.pop("lora", None)
        if model is not None:
            model = GriffinConfig(**model)
        if lora is not None:
            lora = LoRA(**{**lora, "targets": tuple(lora["targets"])})
        return TrainConfig(model=model, lora=lora, **data)
    except (TypeError, AttributeError, KeyError, ValueError) as error:
        raise GriffinError(f"{where} is not the config of a training run: {error}") from error


def override(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """Change fields by name: override(config, ["steps=500", "model.width=128", "betas=0.9,0.95", "threads=none"]).

    All settings are applied together before anything is checked, so fields that must fit can change in any order.

    Raises:
        GriffinError: a setting is not NAME=VALUE, no field has that name (close ones are listed), or the value is not
            of the field's type.
    """
    changes: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise GriffinError(f"--set {setting}: write NAME=VALUE, for example steps=500")
        *owners, leaf = name.strip().split(".")
        target: Any = config
        place = changes
        for owner in owners:
            _field_type(target, owner, setting)
            target = getattr(target, owner)
            if target is None and owner == "lora":  # naming one of its fields asks for it
                config = replace(config, lora=LoRA(), init_from=config.init_from or "-")
                target = config.lora
            if not is_dataclass(target):
                raise GriffinError(f"--set {setting}: {owner} has no fields here; set {owner} as a whole")
            place = place.setdefault(owner, {})
        place[leaf] = _parse(_field_type(target, leaf, setting), text.strip(), setting)
    return _replace(config, changes)


def _replace(value: Any, changes: Mapping[str, Any]) -> Any:
    done = {
        name: _replace(getattr(value, name), new) if isinstance(new, dict) else new for name, new in changes.items()
    }
    try:
        return replace(value, **done)
    except GriffinError:
        raise
    except ValueError as error:
        raise GriffinError(str(error)) from error


def _field_type(owner: Any, name: str, setting: str) -> Any:
    names = [field.name for field in fields(owner)]
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(names)}"
        raise GriffinError(f"--set {setting}: {type(owner).__name__} has no field {name!r}; {hint}")
    return get_type_hints(type(owner))[name]


def _parse(kind: Any, text: str, setting: str) -> Any:
    if get_origin(kind) in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in get_args(kind):
            return None
        return _parse(next(arg for arg in get_args(kind) if arg is not type(None)), text, setting)
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise GriffinError(f"--set {setting}: {text!r} is not one of {', '.join(get_args(kind))}")
        return text
    if get_origin(kind) is tuple:
        return tuple(_parse(get_args(kind)[0], part.strip(), setting) for part in text.split(","))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise GriffinError(f"--set {setting}: {text!r} is neither true nor false")
        return text.lower() == "true"
    if kind is str:
        return text
    if kind not in (int, float):
        raise GriffinError(f"--set {setting}: set its fields one by one, as model.width=128")
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise GriffinError(f"--set {setting}: {text!r} is not {wanted}") from None


def _require(config: TrainConfig, name: str, holds: bool, wanted: str) -> None:
    if not holds:
        raise GriffinError(f"{name}={getattr(config, name)!r} must be {wanted}")
