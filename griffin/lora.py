"""LoRA: y = W x + b + s B A x with W frozen, A (r, K) and B (O, r) trained, s = alpha / r (alpha / sqrt(r): rsLoRA).

Over any linear, quantised ones too, and over the gates' block-diagonal weights where asked for. An adapter's files are
PEFT's (adapter_config.json, adapter_model.safetensors), whose names `transformers` has for the same modules: each opens
what the other wrote. Hu et al. 2021, arXiv:2106.09685; Kalajdzievski 2023, arXiv:2312.03732.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from griffin.errors import GriffinError
from griffin.files import save_tensors
from griffin.model import RGLRU, Griffin, Linear
from griffin.ops import linear
from griffin.quantize import QuantizedLinear
from griffin.reading import open_tensors, read_json
from griffin.replace import replace

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Every linear of both kinds of block and of the MLP.
TARGETS = (
    *("linear_x", "linear_y", "linear_out"),
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
GATES = ("input_gate_weight", "recurrent_gate_weight")  # PEFT wraps the first inside the second
_PREFIX = "base_model.model."
_MEND = "use another copy"


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """How a model is adapted.

    Raises:
        GriffinError: a field is out of range.
    """

    rank: int = 16  # r
    alpha: float = 32.0  # the size of the change: s = alpha / rank
    dropout: float = 0.0  # of what A reads, while training
    targets: tuple[str, ...] = TARGETS  # names of linears, or the ends of their full names
    gates: bool = False  # also the RG-LRU's two gates, without dropout
    rslora: bool = False  # s = alpha / sqrt(rank): the change keeps its size as the rank grows

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise GriffinError(f"LoRA's rank={self.rank} must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise GriffinError(f"LoRA's alpha={self.alpha} must be positive")
        if not 0 <= self.dropout < 1:
            raise GriffinError(f"LoRA's dropout={self.dropout} must be in [0, 1)")
        if not self.targets and not self.gates:
            raise GriffinError("LoRA has no targets; name some, or let it take its own")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A linear and what is added to it."""

    def __init__(self, base: Linear | QuantizedLinear, lora: LoRA) -> None:
        super().__init__()
        out_width, in_width = base.weight.shape if isinstance(base, Linear) else (base.weight_q.shape[0], base.in_width)
        self.base, self.lora, self.on = base, lora, True
        self.lora_a = nn.Parameter(torch.empty(lora.rank, in_width, dtype=torch.float32, device=_device(base)))
        self.lora_b = nn.Parameter(torch.zeros(out_width, lora.rank, dtype=torch.float32, device=_device(base)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.on:
            return y
        if self.lora.dropout and self.training and torch.is_grad_enabled():
            x = F.dropout(x, self.lora.dropout)
        low = linear(x, self.lora_a)
        return y + linear(low if self.lora.scale == 1 else low * self.lora.scale, self.lora_b)

    def delta(self, dtype: torch.dtype) -> Tensor:
        """s B A: (O, K)."""
        return self.lora_b.to(dtype) @ self.lora_a.to(dtype) * self.lora.scale


class LoRAGate(nn.Module):
    """What is added to a gate's weight (N, i, j): of block n, s B_n A_n, with A (N r, j) and B (i, r N) as PEFT's."""

    def __init__(self, weight: Tensor, lora: LoRA) -> None:
        super().__init__()
        N, i, j = weight.shape
        self.lora, self.on = lora, True
        self.lora_a = nn.Parameter(torch.empty(N * lora.rank, j, dtype=torch.float32, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(i, lora.rank * N, dtype=torch.float32, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        if not self.on:
            return weight
        N, i, j = weight.shape
        b, a = self.lora_b.view(i, self.lora.rank, N), self.lora_a.view(N, self.lora.rank, j)
        return weight + (torch.einsum("irn,nrj->nij", b, a) * self.lora.scale).to(weight.dtype)


@dataclass(frozen=True)
class Coverage:
    """What an adapter changes of a model."""

    modules: int  # linears and gates adapted
    of_modules: int  # linears and gates there are
    parameters: int  # trained
    of_parameters: int  # the model's own

    def __str__(self) -> str:
        return (
            f"{self.modules} of {self.of_modules} linears and gates, {self.parameters:,} parameters beside "
            f"{self.of_parameters:,} ({self.parameters / self.of_parameters:.2%})"
        )


def add(model: Griffin, lora: LoRA, generator: torch.Generator | None = None) -> Coverage:
    """Put adapters over a model that change nothing yet: A uniform within 1 / sqrt(K), B zero. All else is frozen.

    Args:
        model: changed in place.
        lora: how.
        generator: of A; None is PyTorch's default generator.

    Raises:
        GriffinError: the model has adapters already, or a target matches nothing.
    """
    if adapted(model):
        raise GriffinError("the model has an adapter already; merge that first")
    linears = {name: each for name, each in model.named_modules() if isinstance(each, Linear | QuantizedLinear)}
    names = [name for name in linears if _matches(name, lora.targets)]
    for target in lora.targets:
        if not any(_matches(name, (target,)) for name in linears):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            raise GriffinError(f"the LoRA target {target!r} matches no linear of this model; there are {there}")
    gates = [each for each in model.modules() if isinstance(each, RGLRU)]
    if lora.gates and not gates:
        raise GriffinError("this model has no RG-LRU whose gates could be adapted; leave gates out")
    own = _count(model)
    model.requires_grad_(False)
    replace(model, lambda module: LoRALinear(module, lora), names)
    for gate in gates if lora.gates else ():
        for name in GATES:
            parametrize.register_parametrization(gate, name, LoRAGate(getattr(gate, name), lora))
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            if name.endswith(".lora_a"):
                bound = parameter.shape[1] ** -0.5
                parameter.uniform_(-bound, bound, generator=generator)
    trained = sum(parameter.numel() for parameter in adapters(model).values())
    changed = len(names) + (len(GATES) * len(gates) if lora.gates else 0)
    return Coverage(changed, len(linears) + len(GATES) * len(gates), trained, own)


def adapters(model: Griffin) -> dict[str, nn.Parameter]:
    """The parameters of a model's adapters, by name."""
    return {name: each for name, each in model.named_parameters() if name.endswith((".lora_a", ".lora_b"))}


def adapted(model: nn.Module) -> LoRA | None:
    """How a model is adapted; None where it is not."""
    return next((each.lora for each in model.modules() if isinstance(each, LoRALinear | LoRAGate)), None)


@contextmanager
def off(model: Griffin) -> Iterator[None]:
    """Let a model be what it was without its adapter: the reference of preferences needs no memory of its own."""
    parts = [each for each in model.modules() if isinstance(each, LoRALinear | LoRAGate)]
    before = [each.on for each in parts]
    for each in parts:
        each.on = False
    try:
        yield
    finally:
        for each, was in zip(parts, before, strict=True):
            each.on = was


@contextmanager
def settled(model: Griffin) -> Iterator[None]:
    """Let s stand in B for a while: a decode step over linears is then kernels alone, which are recorded."""
    modules = [each for each in model.modules() if isinstance(each, LoRALinear)]
    before = [(each.lora_b.detach().clone(), each.lora) for each in modules]
    for each in modules:
        _settle(each)
    try:
        yield
    finally:
        with torch.no_grad():
            for each, (b, how) in zip(modules, before, strict=True):
                each.lora_b.copy_(b)
                each.lora = how


@torch.no_grad()
def _settle(module: LoRALinear) -> None:
    module.lora_b.mul_(module.lora.scale)
    module.lora = dataclasses.replace(module.lora, alpha=float(module.lora.rank), rslora=False)


@torch.no_grad()
def merge(model: Griffin, *, keep_quantized: bool = False) -> Griffin:
    """Add what adapters add into the weights, in place: W + s B A in fp32 (fp64 for fp64), rounded once to W's dtype.

    Args:
        model: with adapters.
        keep_quantized: leave those over quantised weights where they are, s in B; else they are refused.

    Returns:
        The same model. Nothing of it is left frozen but what is quantised.

    Raises:
        GriffinError: a weight is quantised: adding to it would quantise it anew.
    """
    names = [name for name, each in model.named_modules() if isinstance(each, LoRALinear)]
    over_quantized = [name for name in names if not isinstance(model.get_submodule(name).base, Linear)]
    if over_quantized and not keep_quantized:
        raise GriffinError(
            f"{over_quantized[0]} is quantised, and an adapter cannot be merged into it; merge it into the model that "
            "was quantised, and quantise the result"
        )

    def merged(module: LoRALinear) -> nn.Module:
        weight = module.base.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.copy_(weight.to(wide) + module.delta(wide))
        return module.base

    replace(model, merged, [name for name in names if name not in over_quantized])
    for name in over_quantized:
        module = model.get_submodule(name)
        assert isinstance(module, LoRALinear)
        _settle(module)
    for gate in [each for each in model.modules() if isinstance(each, RGLRU)]:
        for name in GATES:
            if parametrize.is_parametrized(gate, name):
                parametrize.remove_parametrizations(gate, name, leave_parametrized=True)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not over_quantized:
            parameter.requires_grad_(True)
    return model


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter as its files have it."""

    folder: Path
    lora: LoRA
    tensors: dict[str, Tensor]  # by the names of `adapters`


def write_adapter(model: Griffin, folder: Path, base: str | None) -> None:
    """Write a model's adapter into a folder that exists, as PEFT's two files.

    Args:
        model: with adapters.
        folder: inside `whole_folder`, so that no one sees a part.
        base: the path or id of the model below, for those who read the config.
    """
    lora = adapted(model)
    if lora is None:
        raise GriffinError("the model has no adapter to write; add one")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted(lora.targets),
        "target_parameters": [f"rg_lru.{name}" for name in GATES] if lora.gates else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {_theirs(name): each.detach().cpu().contiguous() for name, each in adapters(model).items()}
    save_tensors(tensors, folder / WEIGHTS, {"format": "pt"})


def read_adapter(path: str | Path) -> Adapter:
    """Read PEFT's two files.

    Raises:
        GriffinError: a file is missing or damaged, it is no LoRA, or it asks for something that is not computed here.
    """
    folder = Path(path)
    config = read_json(folder / CONFIG, mend="give the folder of a LoRA adapter")
    lora = _config(config, str(folder / CONFIG))
    file = open_tensors(folder / WEIGHTS)
    return Adapter(folder, lora, {_ours(name): file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def attach(model: Griffin, adapter: Adapter) -> Coverage:
    """Put an adapter that was read over a model.

    Raises:
        GriffinError: a tensor is missing, has another shape, or belongs to no module of this model; or it is not
            finite.
    """
    lora, where = adapter.lora, adapter.folder / WEIGHTS
    coverage = add(model, lora)
    places = adapters(model)
    if places.keys() != adapter.tensors.keys():
        name = min(places.keys() ^ adapter.tensors.keys())
        raise GriffinError(
            f"{where} {'lacks' if name in places else 'has'} {_theirs(name)!r}, which this model with the targets of "
            f"{CONFIG} {'has' if name in places else 'does not have'}; it is another model's"
        )
    with torch.no_grad():
        for name, place in places.items():
            tensor = adapter.tensors[name]
            if tensor.shape != place.shape:
                raise GriffinError(
                    f"{where}: {_theirs(name)} is {tuple(tensor.shape)}, and this model needs {tuple(place.shape)}; "
                    "it is another model's"
                )
            if not tensor.isfinite().all():
                raise GriffinError(f"{where}: {_theirs(name)} holds NaN or infinity; {_MEND}")
            place.copy_(tensor)
    return coverage


# Keys of adapter_config.json that say nothing about what is computed from the weights beside it.
_SAYING_NOTHING = {
    *("base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"),
    *("qalora_group_size", "megatron_core", "runtime_config", "layers_pattern", "ensure_weight_tying"),
}
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "target_parameters"),
    *("bias", "init_lora_weights"),
}


def _config(data: Mapping[str, Any], where: str) -> LoRA:
    if data.get("peft_type") != "LORA":
        raise GriffinError(f"{where} is of kind {data.get('peft_type')!r:.40}; LoRA adapters are read")
    for name, value in data.items():
        if name not in _SAYING_NOTHING | _READ and value not in (None, False, {}, []):
            raise GriffinError(f"{where}: {name}={value!r:.60} is not computed here")
    if data.get("bias", "none") != "none":
        raise GriffinError(f"{where}: bias={data['bias']!r:.40} is not computed here; only 'none' is")
    if data.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise GriffinError(
            f"{where}: init_lora_weights={data['init_lora_weights']!r:.40} changes the weights below, which are not "
            "in these files; convert the adapter to plain LoRA with PEFT"
        )
    targets, gates = data.get("target_modules"), data.get("target_parameters")
    if isinstance(targets, str):
        raise GriffinError(
            f"{where}: target_modules={targets!r:.60} is a pattern; write the names of modules as a list"
        )
    names = {str(name).rpartition(".")[2] for name in gates or ()}
    if names not in (set(), set(GATES)):
        raise GriffinError(f"{where}: target_parameters={gates!r:.80} are not both gates, or others than gates")
    try:
        return LoRA(
            rank=data["r"],
            alpha=float(data["lora_alpha"]),
            dropout=float(data.get("lora_dropout", 0.0)),
            targets=tuple(targets or ()),
            gates=bool(names),
            rslora=bool(data.get("use_rslora", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise GriffinError(f"{where} is not the config of a LoRA adapter: {error}; {_MEND}") from error


def _theirs(name: str) -> str:
    """model.layers.0....linear_x.lora_a -> base_model.model.model.layers.0....linear_x.lora_A.weight"""
    owner, _, leaf = name.rpartition(".")
    inner, outer = GATES
    owner = owner.replace(f".parametrizations.{outer}.0", "").replace(f".parametrizations.{inner}.0", ".base_layer")
    return f"{_PREFIX}{owner}.lora_{leaf[-1].upper()}.weight"


def _ours(name: str) -> str:
    """The other way round; a name that is not PEFT's for this family stays as it is, and is found to be unknown."""
    owner, _, leaf = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
    inner, outer = GATES
    if owner.endswith(".rg_lru.base_layer"):
        owner = owner.removesuffix("base_layer") + f"parametrizations.{inner}.0"
    elif owner.endswith(".rg_lru"):
        owner = f"{owner}.parametrizations.{outer}.0"
    return f"{owner}.{leaf.lower()}" if owner else name


def _matches(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _count(model: Griffin) -> int:
    return sum(
        each.weight_q.shape[0] * each.in_width if isinstance(each, QuantizedLinear) else 0 for each in model.modules()
    ) + sum(parameter.numel() for parameter in model.parameters() if parameter.is_floating_point())


def _device(base: nn.Module) -> torch.device:
    return next(base.parameters()).device
