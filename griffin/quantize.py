"""int8 and int4 weights: the linears and the tied embedding; everything else keeps its precision.

`griffin.ops.quantized` says what the numbers mean. In a folder or a state_dict a quantised `X.weight` is `X.weight_q`
and `X.weight_scale`, and config.json has "griffin_quantization": {"bits": 8} or {"bits": 4, "group": 128}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from griffin.errors import GriffinError
from griffin.model import Embedding, Griffin, Linear
from griffin.ops import dequantize, quantize_int4, quantize_int8, quantized_embed, quantized_linear
from griffin.ops.quantized import GROUPS, padded_width
from griffin.replace import replace, replaceable

KEY = "griffin_quantization"  # in config.json
FORMATS = ("int8", "int4")
_ROWS_BYTES = 4 * 2**20  # of fp32 quantised at a time: its temporaries are ten times that


@dataclass(frozen=True)
class Quantization:
    bits: int  # 8 or 4
    group: int | None = None  # inputs to a scale; None for 8 bits: one scale per output

    def __post_init__(self) -> None:
        if (self.bits, self.group) != (8, None) and (self.bits != 4 or self.group not in GROUPS):
            raise GriffinError(
                f"bits={self.bits} with group={self.group} is not read; "
                f"bits are 8 (no group) or 4 (group {', '.join(map(str, GROUPS))})"
            )

    @staticmethod
    def named(name: str, group: int | None = None) -> Quantization:
        """Give the format of "int8" or "int4"; group defaults to 128 for int4.

        Raises:
            GriffinError: another name, or a group that does not go with it.
        """
        if name not in FORMATS:
            raise GriffinError(f"quantize={name!r} is not one of {', '.join(FORMATS)}")
        return Quantization(8, group) if name == "int8" else Quantization(4, group or 128)

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def to_json(self) -> dict[str, int]:
        return {"bits": self.bits} | ({} if self.group is None else {"group": self.group})

    @staticmethod
    def from_json(data: Any, where: str) -> Quantization:
        known = isinstance(data, dict) and data.keys() <= {"bits", "group"} and "bits" in data
        if not known or not all(type(value) is int for value in data.values()):
            raise GriffinError(f'{where}: {KEY}={data!r} must be like {{"bits": 4, "group": 128}} or {{"bits": 8}}')
        try:
            return Quantization(**data)
        except GriffinError as error:
            raise GriffinError(f"{where}: {KEY}: {error}") from error

    def empty(self, shape: torch.Size, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Make room for the weight_q and weight_scale of an (O, K) weight."""
        out_width, in_width = shape
        if self.group is None:
            q = torch.empty(out_width, in_width, dtype=torch.int8, device=device)
            return q, torch.empty(out_width, dtype=torch.float32, device=device)
        width = padded_width(in_width, self.group)
        q = torch.empty(out_width, width // 2, dtype=torch.uint8, device=device)
        return q, torch.empty(out_width, width // self.group, dtype=torch.bfloat16, device=device)

    def fill(self, q: Tensor, scale: Tensor, weight: Tensor, first: int = 0) -> None:
        """Quantise some rows of a weight into rows first, first + 1 ... of q and scale."""
        step = max(1, _ROWS_BYTES // (4 * weight.shape[1]))
        for part in weight.split(step):
            rows = slice(first, first + part.shape[0])
            q[rows], scale[rows] = quantize_int8(part) if self.group is None else quantize_int4(part, self.group)
            first = rows.stop


class _Quantized(nn.Module):
    """What both modules share: the stored numbers, and that they are not trained."""

    def __init__(self, weight: Tensor, form: Quantization, dtype: torch.dtype) -> None:
        super().__init__()
        q, scale = form.empty(weight.shape, weight.device)
        if weight.device.type != "meta":
            form.fill(q, scale, weight.detach())
        self.weight_q = nn.Parameter(q, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.in_width, self.form, self.dtype = weight.shape[1], form, dtype

    @property
    def weight(self) -> Tensor:
        """The (O, K) weight, widened: a copy."""
        return self._rows(self.weight_q, self.weight_scale)

    def _rows(self, q: Tensor, scale: Tensor) -> Tensor:
        return dequantize(q, scale, self.in_width, self.form.group)

    def _product(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        return quantized_linear(x, self.weight_q, self.weight_scale, bias, self.form.group, dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move with the model, but keep the scales' dtype: it belongs to the format, not to the activations."""
        before = self.weight_scale.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight_scale.dtype != before.dtype:
            self.weight_scale.data = before.to(self.weight_scale.device)
        return self


class QuantizedLinear(_Quantized):
    """y = x W^T + b with W in 8 or 4 bits."""

    def __init__(self, linear: Linear, form: Quantization) -> None:
        super().__init__(linear.weight, form, linear.weight.dtype)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x, self.bias, x.dtype)


class QuantizedEmbedding(_Quantized):
    """The table E, (V, D), in 8 or 4 bits."""

    def __init__(self, embedding: Embedding, form: Quantization) -> None:
        super().__init__(embedding.weight, form, embedding.weight.dtype)

    def forward(self, tokens: Tensor, dtype: torch.dtype, scale: float | None) -> Tensor:
        return quantized_embed(tokens, self.weight_q, self.weight_scale, self.in_width, self.form.group, dtype, scale)

    def output(self, hidden: Tensor) -> Tensor:
        return self._product(hidden, None, torch.promote_types(hidden.dtype, torch.float32))


_KINDS: dict[type[nn.Module], Callable[[Any, Quantization], nn.Module]] = {
    Linear: QuantizedLinear,
    Embedding: QuantizedEmbedding,
}


def quantize(model: Griffin, to: str | Quantization, *, group: int | None = None) -> Griffin:
    """Replace the linears and the embedding of a model by int8 or int4 ones, in place, and free the originals.

    Args:
        model: any model; also one on the meta device, which then has room for quantised weights.
        to: "int8" (one scale per output) or "int4" (one per output and group).
        group: for int4, inputs to a scale: 32, 64 or 128 (the default).

    Returns:
        The same model, in eval mode: its numbers cannot be trained, adapters over them can (griffin.lora).

    Raises:
        GriffinError: an unknown format, the model is quantised already, or a weight is not finite: it is named, and the
            model is left as it was.
    """
    form = to if isinstance(to, Quantization) else Quantization.named(to, group)
    if (now := quantization(model)) is not None:
        raise GriffinError(f"the model is {now.name} already; quantise the original")
    for name, module in replaceable(model).items():
        if not all_finite(module.weight):
            raise GriffinError(
                f"{name}.weight holds NaN or infinity and cannot be quantised; use another copy of the model"
            )
    replace(model, lambda module: _KINDS[type(module)](module, form))
    return model.requires_grad_(False).eval()


def quantization(model: Griffin) -> Quantization | None:
    """Say what a model's linears are quantised to; None for floating point."""
    for module in model.modules():
        if isinstance(module, _Quantized):
            return module.form
    return None


def quantized_names(model: Griffin) -> dict[str, torch.Size]:
    """Name the weights that `quantize` replaces, with their shapes."""
    return {f"{name}.weight": module.weight.shape for name, module in replaceable(model).items()}


def all_finite(tensor: Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite; one pass and no copy. On the meta device there are none."""
    if tensor.device.type == "meta" or not tensor.numel():
        return True
    return bool(torch.stack(torch.aminmax(tensor.detach())).isfinite().all())  # both are NaN where any number is


def read_quantization(data: Mapping[str, Any], where: str) -> Quantization | None:
    """Read the key of a config.json; None where it has none."""
    return Quantization.from_json(data[KEY], where) if KEY in data else None
