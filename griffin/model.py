"""Griffin, top to bottom: norms, gates, recurrence, local attention, MLP, block, model, initialisation.

Module and parameter names are those of Hugging Face's RecurrentGemmaForCausalLM, so released weights load as they are.
There is one way through: prefill, a chunk of a prompt, one decoded token and a training row differ in T and in whether
a State is passed, nothing else.
"""

from __future__ import annotations

import math
import uuid
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from griffin.config import GriffinConfig
from griffin.ops import (
    block_diagonal_linear,
    causal_conv1d,
    cg_lru,
    embed,
    geglu,
    linear,
    local_attention,
    output_linear,
    recurrent_step_,
    rg_lru,
    ring_attention,
    rms_norm,
    rope,
    soft_cap,
)
from griffin.ops.device import own_dtypes
from griffin.ops.rg_lru import C
from griffin.span import Span, advance_, span_of
from griffin.state import AttentionState, RecurrentState, State


class Linear(nn.Module):
    """y = x W^T + b, in x.dtype: activations set the precision, fp32 weights stay the masters."""

    def __init__(self, in_width: int, out_width: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_width, in_width))
        self.bias = nn.Parameter(torch.empty(out_width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """The table E, (V, D): row E[token] going in, and the output matrix."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor, dtype: torch.dtype, scale: float | None) -> Tensor:
        return embed(tokens, self.weight, dtype, scale)

    def output(self, hidden: Tensor) -> Tensor:
        return output_linear(hidden, self.weight)


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (1 + weight), in fp32, rounded once."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Conv1d(nn.Module):
    """The parameters of the causal depthwise convolution; `ops.causal_conv1d` computes it."""

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, taps))  # weight[:, 0, -1] multiplies the current token
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, state: Tensor | None, span: Span) -> tuple[Tensor, Tensor]:
        offsets = None if span.packing is None else span.packing.offsets
        return causal_conv1d(x, self.weight[:, 0], self.bias, state, span.reset, offsets=offsets)


class RGLRU(nn.Module):
    """h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t), with gates i_t and r_t (inside a_t) computed from x_t."""

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        R, blocks = config.lru_width, config.num_gate_blocks
        self.recurrent_param = nn.Parameter(torch.empty(R))  # -Lambda of the paper
        self.input_gate_weight = nn.Parameter(torch.empty(blocks, R // blocks, R // blocks))
        self.input_gate_bias = nn.Parameter(torch.empty(blocks, R // blocks))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(blocks, R // blocks, R // blocks))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(blocks, R // blocks))
        self.max_sqrt_gradient = config.max_sqrt_gradient
        self.unscaled_first_token = config.unscaled_first_token

    def forward(self, x: Tensor, h0: Tensor | None, span: Span) -> tuple[Tensor, Tensor]:
        return rg_lru(
            x,
            *_gates(self, x, span),
            self.recurrent_param,
            h0,
            span.reset,
            offsets=None if span.packing is None else span.packing.offsets,
            max_sqrt_gradient=self.max_sqrt_gradient,
            unscaled_first_token=self.unscaled_first_token,
        )


class CGLRU(nn.Module):
    """The same of complex numbers, x[:R/2] + i x[R/2:] and so h, with real gates: the paper's appendix B."""

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        R, blocks = config.lru_width, config.num_gate_blocks
        self.recurrent_param = nn.Parameter(torch.empty(R // 2))  # -Lambda
        self.recurrent_angle = nn.Parameter(torch.empty(R // 2))  # c theta
        self.input_gate_weight = nn.Parameter(torch.empty(blocks, R // blocks, R // 2 // blocks))
        self.input_gate_bias = nn.Parameter(torch.empty(blocks, R // 2 // blocks))
        self.recurrent_gate_weight = nn.Parameter(torch.empty(blocks, R // blocks, R // 2 // blocks))
        self.recurrent_gate_bias = nn.Parameter(torch.empty(blocks, R // 2 // blocks))
        self.max_sqrt_gradient = config.max_sqrt_gradient
        self.unscaled_first_token = config.unscaled_first_token

    def forward(self, x: Tensor, h0: Tensor | None, span: Span) -> tuple[Tensor, Tensor]:
        return cg_lru(
            x,
            *_gates(self, x, span),
            self.recurrent_param,
            self.recurrent_angle,
            h0,
            span.reset,
            max_sqrt_gradient=self.max_sqrt_gradient,
            unscaled_first_token=self.unscaled_first_token,
        )


def _gates(lru: RGLRU | CGLRU, x: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """Input gate and recurrent gate before their sigmoids."""
    input_gate = block_diagonal_linear(x, lru.input_gate_weight, lru.input_gate_bias)
    recurrent_gate = block_diagonal_linear(x, lru.recurrent_gate_weight, lru.recurrent_gate_bias)
    if span.padding is not None:
        # r = 0, so a = 1 and no input: h passes padding unchanged.
        recurrent_gate = recurrent_gate.masked_fill(span.padding[..., None], -torch.inf)
    return input_gate, recurrent_gate


class RecurrentBlock(nn.Module):
    """out = linear_out(gelu(linear_y(x)) * rg_lru(conv_1d(linear_x(x))))"""

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        D, R = config.width, config.lru_width
        self.linear_x = Linear(D, R, bias=True)
        self.linear_y = Linear(D, R, bias=True)
        self.linear_out = Linear(R, D, bias=True)
        self.conv_1d = Conv1d(R, config.conv_width)
        self.rg_lru = CGLRU(config) if config.complex_recurrence else RGLRU(config)

    def forward(self, x: Tensor, state: RecurrentState | None, span: Span) -> Tensor:
        y = self.linear_y(x)  # (B, T, R)
        inputs = self.linear_x(x)  # (B, T, R)
        own = isinstance(self.rg_lru, RGLRU)  # not wrapped: an adapter of its gates has a forward of its own
        if own and state is not None and x.shape[1] == 1 and span.lengths is None and span.packing is None:
            out = self._one_token(inputs[:, 0], y[:, 0], state, span.reset[:, 0])
            if out is not None:
                return self.linear_out(out[:, None])
        conv, h0 = (None, None) if state is None else (state.conv, state.h)
        if conv is not None and torch.is_grad_enabled():
            conv = conv.clone()  # kept for the backward pass, while update_ below writes the original
        x, last_conv = self.conv_1d(inputs, conv, span)
        h, last_h = self.rg_lru(x, h0, span)
        if state is not None:
            if span.lengths is not None:
                last_conv = _last_inputs(inputs, state.conv, span)
            state.update_(last_h, last_conv)
        return self.linear_out(geglu(y, h))

    def _one_token(self, inputs: Tensor, y: Tensor, state: RecurrentState, reset: Tensor) -> Tensor | None:
        """What lies between the linears, where one kernel does it all and writes the state in place."""
        conv, gates = self.conv_1d, self.rg_lru
        if isinstance(gates, CGLRU):
            return None
        return recurrent_step_(
            *(inputs, y, conv.weight[:, 0], conv.bias),
            *(gates.input_gate_weight, gates.input_gate_bias, gates.recurrent_gate_weight, gates.recurrent_gate_bias),
            *(gates.recurrent_param, state.conv, state.h, reset),
            unscaled_first_token=gates.unscaled_first_token,
        )


class LocalAttention(nn.Module):
    """Multi-query attention to the W earlier tokens and the token itself, with RoPE on part of each head."""

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        D, kv_width = config.width, config.num_kv_heads * config.head_width
        self.q_proj = Linear(D, D, bias=False)
        self.k_proj = Linear(D, kv_width, bias=False)
        self.v_proj = Linear(D, kv_width, bias=False)
        self.o_proj = Linear(D, D, bias=True)
        self.head_width, self.window = config.head_width, config.window

    def forward(self, x: Tensor, state: AttentionState | None, span: Span) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_width))  # (B, T, H, K), (B, T, G, K), (B, T, G, K)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rope(q, span.cos, span.sin), rope(k, span.cos, span.sin)
        if state is None:
            out = local_attention(q, k, v, span.positions, self.window, span.documents)
        elif span.packing is not None:
            keys, values = state.packed(k, v, span.packing.earlier, span.packing.sizes)
            out = local_attention(q, keys, values, span.positions, self.window, rows=span.packing.rows)
            state.write_(k, v, span.packing.kept, span.packing.last)
        elif x.shape[1] == 1 and not torch.is_grad_enabled():  # a gradient would need the slots as they are now
            state.update_(k, v, span.positions, span.lengths)
            out = ring_attention(q, state.keys, state.values, span.positions)
        else:
            earlier_keys, earlier_values = state.earlier(span.start, span.earlier)
            keys, values = torch.cat([earlier_keys, k], dim=1), torch.cat([earlier_values, v], dim=1)
            out = local_attention(q, keys, values, span.positions, self.window, span.documents)
            state.update_(k, v, span.positions, span.lengths)
        return self.o_proj(out.flatten(2))


class GatedMLP(nn.Module):
    """out = down_proj(gelu(gate_proj(x)) * up_proj(x))"""

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        D, E = config.width, config.mlp_width
        self.gate_proj = Linear(D, E, bias=True)
        self.up_proj = Linear(D, E, bias=True)
        self.down_proj = Linear(E, D, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """x = x + temporal_block(norm(x));  x = x + mlp_block(norm(x))"""

    def __init__(self, config: GriffinConfig, kind: str) -> None:
        super().__init__()
        self.temporal_pre_norm = RMSNorm(config.width, config.rms_norm_eps)
        self.temporal_block = RecurrentBlock(config) if kind == "recurrent" else LocalAttention(config)
        self.channel_pre_norm = RMSNorm(config.width, config.rms_norm_eps)
        self.mlp_block = GatedMLP(config)

    def forward(self, x: Tensor, state: RecurrentState | AttentionState | None, span: Span) -> Tensor:
        x = x + self.temporal_block(self.temporal_pre_norm(x), state, span)
        return x + self.mlp_block(self.channel_pre_norm(x))


class Layers(nn.Module):
    """The parameters from token to last hidden state, under the names of released weights."""

    def __init__(self, config: GriffinConfig) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.block_types)
        self.final_norm = RMSNorm(config.width, config.rms_norm_eps)


class Griffin(nn.Module):
    """embedding * sqrt(D), the blocks, a final norm; logits = soft_cap(norm(x) embedding^T).

    Args:
        config: the architecture.
        device: where the parameters live; None is PyTorch's default. "meta" makes a model without storage.
        dtype: of the parameters.
        activation_dtype: of the activations; None means as the embedding, whatever `double()`, `bfloat16()` or `to()`
            make of it later (as the final norm, once the embedding is quantised). fp32 parameters with bf16
            activations is mixed-precision training; torch.autocast changes nothing in here.
        generator: the source of the initial weights; None is PyTorch's default generator.

    Attributes:
        model_id: of this model and its copies; its states bear it.
    """

    def __init__(
        self,
        config: GriffinConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        activation_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.config, self.activation_dtype, self.model_id = config, activation_dtype, uuid.uuid4().hex
        self.embedding_scale = _embedding_scale(config)
        with torch.device("meta"):
            self.model = Layers(config).to(dtype)  # "model." is the prefix that released weights carry
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.model.to_empty(device=device)
            init_weights(self, generator)

    @property
    def embedding(self) -> Tensor:
        """(V, D), the input embedding and the output matrix; of a quantised model, a widened copy."""
        return self.model.embed_tokens.weight

    @property
    def activation_dtype(self) -> torch.dtype:
        """What activations and states are in; setting it to None lets it follow the parameters again."""
        if self._activation_dtype is not None:
            return self._activation_dtype
        embedding = self.model.embed_tokens  # a quantised one's numbers are in no dtype of activations
        followed = embedding if isinstance(embedding, Embedding) else self.model.final_norm
        return cast(Tensor, followed.weight).dtype

    @activation_dtype.setter
    def activation_dtype(self, dtype: torch.dtype | None) -> None:
        self._activation_dtype = dtype

    @property
    def device(self) -> torch.device:
        return self.model.final_norm.weight.device

    @property
    def blocks(self) -> list[Block]:
        """The layers in order, each a temporal block and an MLP."""
        return list(self.model.layers)  # type: ignore[arg-type]

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        positions: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """Run every layer over T tokens of B rows.

        Args:
            tokens: (B, T) whole numbers in [0, V), T >= 1.
            state: what came before, advanced in place by these tokens; any split of a text into calls gives the same
                result. None: the rows start here, and nothing is kept (training).
            positions: (B, T) offset of each token in its document; a 0 starts a document, and nothing from before it
                is seen. None: each row goes on where the state stands, or starts at 0.
            lengths: (B,) how many tokens of each row count, from the left, 0 .. T. The rest is padding of any value:
                it changes neither the state nor any result before it, and its own results mean nothing. None: all.
            offsets: (B + 1,) on the CPU, rising from 0 to T, of packed rows: tokens is (1, T), and row b of the state
                goes on with tokens offsets[b] .. offsets[b + 1], which may be none. Rows of any lengths are read in one
                pass without padding. Without positions and lengths. None: a row of tokens for each row of the state.

        Returns:
            (B, T, D) in the activation dtype: the input of `logits`.

        Raises:
            ValueError: shapes, dtypes or values do not fit the model or the state (values are checked on a CPU only;
                on a GPU that would wait for the device).
        """
        span = span_of(self.config, tokens, state, positions, lengths, offsets, self.activation_dtype)
        if span.padding is not None:
            tokens = tokens.masked_fill(span.padding, 0)
        hidden = self.run(tokens, state, span)
        if state is not None:
            advance_(state, span)
        return hidden

    def run(self, tokens: Tensor, state: State | None, span: Span) -> Tensor:
        """`forward` between its checks and the state's new position: every layer over (B, T) tokens of `span`."""
        with own_dtypes(tokens.device):
            x = self.model.embed_tokens(tokens, self.activation_dtype, self.embedding_scale)  # (B, T, D)
            for index, block in enumerate(self.blocks):
                x = block(x, None if state is None else state.layers[index], span)
            return self.model.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute cap * tanh(hidden embedding^T / cap), or without the cap where the config has none.

        Args:
            hidden: (..., D) from `forward`.

        Returns:
            (..., V) fp32.
        """
        with own_dtypes(hidden.device):
            return soft_cap(self.model.embed_tokens.output(hidden), self.config.logits_soft_cap)

    def new_state(self, batch_size: int) -> State:
        """Make the state of `batch_size` rows that have read nothing, on the model's device.

        Raises:
            ValueError: batch_size < 0.
        """
        return State.new(self.config, batch_size, self.activation_dtype, self.device, self.model_id)


def _embedding_scale(config: GriffinConfig) -> float | None:
    if config.embedding_scale == "none":
        return None
    scale = math.sqrt(config.width)
    if config.embedding_scale == "bf16":
        scale = torch.tensor(scale, dtype=torch.float32, device="cpu").bfloat16().item()
    return scale


def _last_inputs(inputs: Tensor, earlier: Tensor, span: Span) -> Tensor:
    """The convolution's state after `lengths` tokens: the last inputs that count, zero before the last reset."""
    lengths, count, R = cast(Tensor, span.lengths), earlier.shape[1], inputs.shape[2]
    everything = torch.cat([earlier, inputs], dim=1)
    # Inputs lengths - count ...
    index = lengths[:, None] + torch.arange(count, dtype=torch.int64, device=lengths.device)
    last = everything.gather(1, index[..., None].expand(-1, -1, R))
    resets = F.pad(span.reset, (count, 0))
    # An input is of an earlier document if a reset among the tokens that count comes after it.
    later = resets.long().flip(1).cumsum(1).flip(1) - resets.long()
    return last.masked_fill((later.gather(1, index) > 0)[..., None], 0)


@torch.no_grad()
def init_weights(model: Griffin, generator: torch.Generator | None = None) -> None:
    """Fill every parameter: normal weights with the standard deviations below, zero biases and norms.

    | parameter | standard deviation |
    |---|---|
    | embedding; q, k, v; linear_x, linear_y | sqrt(1 / D) |
    | what each block adds to the residual: linear_out, o_proj, down_proj | sqrt(2 / (L * fan_in)) |
    | gate_proj, up_proj | sqrt(1 / (2 D)), Google JAX's: it counts both branches as fan-in |
    | conv_1d | sqrt(0.01 / conv_width) |
    | gates | recurrentgemma: sqrt(1 / R), Google JAX's; paper: sqrt(num_gate_blocks / R), LeCun within a block |

    recurrent_param p, with softplus(p) = -log a: recurrentgemma, a^2 uniform on [0.9^2, 0.999^2]; paper, a^8 uniform on
    [0.9, 0.999]. Drawn and inverted in fp64: in bf16 it would take 14 different values. recurrent_angle: uniform on
    [0, pi / 10], Google JAX's.
    """
    config = model.config
    D, R, L = config.width, config.lru_width, config.num_layers
    gate_fan_in = R if config.init == "recurrentgemma" else R // config.num_gate_blocks
    deviations = {
        "embed_tokens": D**-0.5,
        "q_proj": D**-0.5,
        "k_proj": D**-0.5,
        "v_proj": D**-0.5,
        "o_proj": (2 / (L * D)) ** 0.5,
        "linear_x": D**-0.5,
        "linear_y": D**-0.5,
        "linear_out": (2 / (L * R)) ** 0.5,
        "gate_proj": (2 * D) ** -0.5,
        "up_proj": (2 * D) ** -0.5,
        "down_proj": (2 / (L * config.mlp_width)) ** 0.5,
        "conv_1d": (0.01 / config.conv_width) ** 0.5,
        "input_gate_weight": gate_fan_in**-0.5,
        "recurrent_gate_weight": gate_fan_in**-0.5,
    }
    for name, parameter in model.named_parameters():
        *_, owner, leaf = name.split(".")
        if leaf == "recurrent_param":
            parameter.copy_(_initial_recurrent_param(config, len(parameter), generator, parameter.device))
        elif leaf == "recurrent_angle":
            parameter.uniform_(0.0, 0.1 * math.pi, generator=generator)
        elif leaf in deviations or (leaf == "weight" and owner in deviations):
            parameter.normal_(0.0, deviations[leaf if leaf in deviations else owner], generator=generator)
        else:
            parameter.zero_()  # biases, norms


def _initial_recurrent_param(
    config: GriffinConfig, count: int, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    u = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    if config.init == "recurrentgemma":
        log_a = (0.9**2 + u * (0.999**2 - 0.9**2)).log() / 2
    else:
        log_a = (0.9 + u * (0.999 - 0.9)).log() / C
    return torch.expm1(-log_a).log()  # the inverse of softplus
