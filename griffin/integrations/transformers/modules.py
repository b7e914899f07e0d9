"""Our network made of modules that transformers and PEFT know: nn.Linear, nn.Embedding and a tied lm_head."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from griffin.config import GriffinConfig
from griffin.model import Embedding, Griffin, Layers
from griffin.model import Linear as OwnLinear
from griffin.ops import embed, linear, output_linear
from griffin.quantize import Quantization, QuantizedEmbedding, quantize
from griffin.replace import Replaceable, replace


class Linear(nn.Linear):
    """y = x W^T + b by `griffin.ops.linear`: what PEFT takes for an nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class OutputLinear(nn.Linear):
    """Logits before their cap, in fp32 whatever the weights are in."""

    def forward(self, hidden: Tensor) -> Tensor:
        return output_linear(hidden, self.weight)


class _Ends(nn.Module):
    """An embedding and an output matrix as the one table that `Griffin` asks: whatever modules they have become."""

    def __init__(self, table: nn.Module, head: nn.Module | None) -> None:
        super().__init__()
        self.table, self.head = table, head

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, (self.table if self.head is None else self.head).weight)

    def forward(self, tokens: Tensor, dtype: torch.dtype, scale: float | None) -> Tensor:
        """Give x for (B, T) tokens, or for their (B, T, D) rows of the table."""
        if type(self.table) is nn.Embedding and _is_bare(self.table) and not tokens.is_floating_point():
            return embed(tokens, self.table.weight, dtype, scale)
        rows = tokens if tokens.is_floating_point() else self.table(tokens)
        rows = rows.to(dtype)
        return rows if scale is None else rows * scale

    def output(self, hidden: Tensor) -> Tensor:
        logits = output_linear(hidden, self.weight) if self.head is None else cast(Tensor, self.head(hidden))
        return logits.to(torch.promote_types(hidden.dtype, torch.float32))


def layers(config: GriffinConfig, form: Quantization | None, dtype: torch.dtype, device: torch.device) -> Layers:
    """Make the network without values, under the names of released weights."""
    griffin = Griffin(config, device="meta", dtype=dtype)
    if form is not None:
        quantize(griffin, form)
    else:
        replace(griffin, _known)
    return griffin.model if device.type == "meta" else griffin.model.to_empty(device=device)


def network(griffin: Griffin, model: Any, head: nn.Module | None, dtype: torch.dtype) -> Griffin:
    """Give the Griffin that runs the modules of `model` as they are now; `griffin` itself, where it does.

    Args:
        griffin: made of the same config; its own modules do not matter.
        model: embed_tokens, layers and final_norm, any of them replaced or wrapped.
        head: the output matrix; None: the embedding's.
        dtype: of the activations.
    """
    parts = (model.embed_tokens, head, model.layers, model.final_norm, dtype)
    if griffin.__dict__.get("_parts") == parts:
        return griffin
    twin = Griffin.__new__(Griffin)
    twin.__dict__.update(griffin.__dict__)
    body = nn.Module()
    table = model.embed_tokens
    body.embed_tokens = table if isinstance(table, QuantizedEmbedding) else _Ends(table, head)
    body.layers, body.final_norm = model.layers, model.final_norm
    twin._modules = {"model": body}
    twin.__dict__["_activation_dtype"], twin.__dict__["_parts"] = dtype, parts
    return twin


def is_plain(griffin: Griffin) -> bool:
    """Whether every module of a network is one of ours with no hook: its one-token step may be recorded."""
    own = {nn.Module, nn.ModuleList, nn.Embedding, Linear, OutputLinear, _Ends}
    return all(
        (type(module) in own or type(module).__module__ in ("griffin.model", "griffin.quantize")) and _is_bare(module)
        for module in griffin.modules()
    )


def _is_bare(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _known(module: Replaceable) -> nn.Module:
    options: dict[str, Any] = {"device": "meta", "dtype": module.weight.dtype}
    rows, columns = module.weight.shape
    if isinstance(module, Embedding):
        return nn.Embedding(rows, columns, **options)
    assert isinstance(module, OwnLinear)
    return Linear(columns, rows, bias=module.bias is not None, **options)
