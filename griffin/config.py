"""The architecture: what changes a weight's shape or a logit's value, and nothing else.

Device, dtype, kernels and quantisation are arguments of `griffin.load` and `Griffin`, never fields here, so that a
saved config does not remember yesterday's hardware. Each field that the papers and the released code disagree on says
so; the default is what the released RecurrentGemma models were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from reprlib import repr as brief  # a value read from a file can be of any length, a message cannot
from types import MappingProxyType
from typing import Literal, get_args

BlockType = Literal["recurrent", "attention"]
EmbeddingScale = Literal["bf16", "exact", "none"]
Init = Literal["recurrentgemma", "paper"]

MOST_LAYERS = 10_000  # the deepest network we know of has 2,500; a layer takes a millisecond before it has any weights
MOST_SIZE = 2**31 - 1  # of an axis: kernels and token ids are 32 bits
MOST_PARAMETERS = 10**15  # more have no number of bytes in 63 bits


@dataclass(frozen=True, kw_only=True)
class GriffinConfig:
    """A Griffin, Hawk, RecurrentGemma or multi-query Transformer.

    Raises:
        ValueError: a field is out of range or two fields do not fit; the message gives both numbers.
    """

    vocab_size: int  # V, rows of the embedding, which is also the output matrix
    width: int  # D, the residual stream
    mlp_width: int  # E, each of the two branches of the gated MLP (Hugging Face's intermediate_size is twice this)
    lru_width: int  # R, the recurrence and its convolution
    num_heads: int  # H, query heads; a head is width / num_heads wide
    block_types: tuple[BlockType, ...]  # the temporal mixing of every layer, written out
    num_kv_heads: int = 1  # key and value heads; 1 is multi-query attention, as in all published models
    # Blocks of the two gate matrices. Paper: 16 "for all experiments". Released models: as many as there are heads.
    num_gate_blocks: int
    # W: earlier tokens a query sees; the token itself is not counted, so W + 1 keys are visible (Google's rule).
    # None is global attention, the Transformer baseline, whose state grows.
    window: int | None = 2048
    conv_width: int = 4  # taps of the causal convolution, the current token included
    rms_norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    rope_fraction: float = 0.5  # first part of each head that is rotated. Paper: "RoPE". Code: the first half.
    # Factor sqrt(D) on embeddings going in (never on the tied output). bf16: rounded to bf16 first, as the released
    # models were trained (50.5 for D=2560). Griffin's paper models have none.
    embedding_scale: EmbeddingScale = "bf16"
    logits_soft_cap: float | None = 30.0  # cap * tanh(logits / cap); None: none (Griffin's paper)
    # Bound of d sqrt(1 - a^2): RecurrentGemma's 1000 keeps gradients finite as a -> 1. None: no bound.
    max_sqrt_gradient: float | None = 1000.0
    # The first token of a document enters h unscaled: its factor sqrt(1 - a^2) is 1. In the code, not in the papers.
    unscaled_first_token: bool = True
    # Complex-gated recurrence, R / 2 complex channels instead of R real ones: Griffin's appendix B, which found no gain
    # from it for text. In no released model; there are no kernels for it.
    complex_recurrence: bool = False
    # recurrentgemma: Google JAX's standard deviations, a^2 uniform on [0.9^2, 0.999^2].
    # paper: gates LeCun within a block, a^c uniform on [0.9, 0.999].
    init: Init = "recurrentgemma"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "mlp_width", "lru_width", "num_heads", "num_kv_heads", "num_gate_blocks"):
            _require_positive(name, getattr(self, name))
        _require_positive("conv_width", self.conv_width)
        object.__setattr__(self, "block_types", tuple(self.block_types))  # JSON has lists
        if not self.block_types:
            raise ValueError("block_types is empty: name each layer 'recurrent' or 'attention'")
        if len(self.block_types) > MOST_LAYERS:
            raise ValueError(f"{len(self.block_types)} layers are more than {MOST_LAYERS}")
        for index, block in enumerate(self.block_types):
            if block not in get_args(BlockType):
                raise ValueError(f"block_types[{index}]={brief(block)} is not one of {get_args(BlockType)}")
        for whole, part in (("width", "num_heads"), ("num_heads", "num_kv_heads"), ("lru_width", "num_gate_blocks")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole}={getattr(self, whole)} is not a multiple of {part}={getattr(self, part)}; "
                    f"choose {part} to divide it"
                )
        if self.window is not None:
            _require_positive("window", self.window)
        if not _is_number(self.rope_fraction) or not 0.0 <= self.rope_fraction <= 1.0:
            raise ValueError(f"rope_fraction={brief(self.rope_fraction)} is not in [0, 1]")
        if (rotated := self.head_width * self.rope_fraction) % 2:
            raise ValueError(
                f"rope_fraction={self.rope_fraction} of head width {self.head_width} rotates {rotated} channels; "
                "it must be an even whole number"
            )
        for name in ("rms_norm_eps", "rope_base"):
            _require_float32(name, getattr(self, name))
        for name in ("logits_soft_cap", "max_sqrt_gradient"):
            if getattr(self, name) is not None:
                _require_float32(name, getattr(self, name), ", or None for none")
        for name, choices in (("embedding_scale", get_args(EmbeddingScale)), ("init", get_args(Init))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={brief(getattr(self, name))} is not one of {choices}")
        for name in ("unscaled_first_token", "complex_recurrence"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={brief(getattr(self, name))} must be true or false")
        if self.complex_recurrence and self.lru_width % (2 * self.num_gate_blocks):
            raise ValueError(
                f"lru_width={self.lru_width} is not a multiple of 2 * num_gate_blocks={2 * self.num_gate_blocks}: "
                "complex_recurrence makes complex numbers of two channels"
            )
        if (count := self.num_parameters()) > MOST_PARAMETERS:
            raise ValueError(f"these sizes make {count:.0e} parameters, more than {MOST_PARAMETERS:.0e}")

    @property
    def num_layers(self) -> int:
        return len(self.block_types)

    @property
    def head_width(self) -> int:
        """K, the width of one attention head."""
        return self.width // self.num_heads

    @property
    def rope_width(self) -> int:
        """Channels of each head that RoPE rotates."""
        return int(self.head_width * self.rope_fraction)

    def num_parameters(self) -> int:
        """Count the parameters, the tied embedding once: the sum of `p.numel()` over `Griffin(config)`."""
        D, E, R = self.width, self.mlp_width, self.lru_width
        kv_width = self.num_kv_heads * self.head_width
        r = R // 2 if self.complex_recurrence else R  # a gate of one number for each complex one
        gates = 2 * (R * r // self.num_gate_blocks + r)  # two block-diagonal matrices and their biases
        temporal = {
            "recurrent": 2 * (D * R + R) + (R * D + D) + (self.conv_width * R + R) + gates + R,
            "attention": D * D + 2 * D * kv_width + D * D + D,
        }
        mlp = 2 * (D * E + E) + E * D + D
        return self.vocab_size * D + sum(temporal[kind] + mlp + 2 * D for kind in self.block_types) + D


def _require_positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={brief(value)} must be a positive whole number")
    if value > MOST_SIZE:
        raise ValueError(f"{name}={brief(value)} is more than {MOST_SIZE}")


def _require_float32(name: str, value: object, otherwise: str = "") -> None:
    if not _is_number(value):
        raise ValueError(f"{name}={brief(value)} must be a number{otherwise}")
    if not 1e-37 < value < 1e38:  # type: ignore[operator]
        raise ValueError(f"{name}={brief(value)} must be positive and within float32{otherwise}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


FIELD_NAMES = tuple(field.name for field in fields(GriffinConfig))


_RECURRENT: tuple[BlockType, ...] = ("recurrent",)
_ATTENTION: tuple[BlockType, ...] = ("attention",)


def griffin_pattern(num_layers: int) -> tuple[BlockType, ...]:
    """Two recurrent layers, then one attention layer, repeated and cut at `num_layers` (Griffin, section 2.4)."""
    return tuple("attention" if index % 3 == 2 else "recurrent" for index in range(num_layers))


def _presets() -> dict[str, GriffinConfig]:
    presets = {}
    # Griffin, Table 2: D, R, layers; M = 3, heads 128 wide, window 1024, 16 gate blocks. The vocabulary is not given in
    # the paper; 256,000 is that of Google's own paper presets.
    sizes = {
        "100m": (768, 1024, 12),
        "200m": (1024, 1536, 12),
        "400m": (1536, 2048, 12),
        "1.3b": (2048, 2560, 24),
        "3b": (3072, 4096, 24),
        "7b": (4096, 5632, 32),
        "14b": (5120, 8192, 40),
    }
    for size, (width, lru_width, num_layers) in sizes.items():
        families: dict[str, tuple[BlockType, ...]] = {"griffin": griffin_pattern(num_layers)}
        if size != "14b":
            families |= {"hawk": num_layers * _RECURRENT, "transformer": num_layers * _ATTENTION}
        for family, block_types in families.items():
            presets[f"{family}-{size}"] = GriffinConfig(
                vocab_size=256_000,
                width=width,
                mlp_width=3 * width,
                lru_width=lru_width,
                num_heads=width // 128,
                num_gate_blocks=16,
                block_types=block_types,
                window=None if family == "transformer" else 1024,
                embedding_scale="none",
                logits_soft_cap=None,
                init="paper",
            )
    # RecurrentGemma, Table 1.
    for size, (width, num_heads, num_layers) in {"2b": (2560, 10, 26), "9b": (4096, 16, 38)}.items():
        presets[f"recurrentgemma-{size}"] = GriffinConfig(
            vocab_size=256_000,
            width=width,
            mlp_width=3 * width,
            lru_width=width,
            num_heads=num_heads,
            num_gate_blocks=num_heads,
            block_types=griffin_pattern(num_layers),
        )
    # Ours: "tiny" for tests, R different from D on purpose; "mini" is what a laptop trains in minutes.
    tiny: dict[str, tuple[BlockType, ...]] = {
        "griffin": griffin_pattern(3),
        "hawk": 2 * _RECURRENT,
        "transformer": 2 * _ATTENTION,
    }
    for family, block_types in tiny.items():
        presets[f"{family}-tiny"] = GriffinConfig(
            vocab_size=259,
            width=32,
            mlp_width=96,
            lru_width=48,
            num_heads=4,
            num_gate_blocks=4,
            block_types=block_types,
            window=None if family == "transformer" else 16,
        )
    presets["griffin-mini"] = GriffinConfig(
        vocab_size=4096,
        width=256,
        mlp_width=768,
        lru_width=256,
        num_heads=4,
        num_gate_blocks=4,
        block_types=griffin_pattern(6),
        window=256,
    )
    return presets


PRESETS: Mapping[str, GriffinConfig] = MappingProxyType(_presets())
