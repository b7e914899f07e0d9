"""Errors of every op and of a model against fp64, per dtype: the numbers of docs/numerics.md.

python -m benchmarks.numerics
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import timing
from griffin import PRESETS, Griffin
from griffin.ops import causal_conv1d, linear_scan, local_attention, rg_lru, rope, rope_table

B, T, R = 2, 1024, 256
Op = Callable[..., Tensor]


def inputs() -> dict[str, tuple[Op, list[Tensor]]]:
    """Each op as a function of its tensors, which are drawn in fp64."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[:, 0] = reset[0, 500] = True
    positions = torch.arange(T).repeat(B, 1)
    cos, sin = rope_table(positions, 64)
    state = draw(B, R)

    def scan(x: Tensor, a: Tensor) -> Tensor:
        return linear_scan(x, a)[0]

    def recurrence(x: Tensor, i: Tensor, r: Tensor, p: Tensor) -> Tensor:
        h0 = state.to(torch.promote_types(x.dtype, torch.float32))
        return rg_lru(x, i, r, p, h0, reset)[0]

    def convolution(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return causal_conv1d(x, w, b, None, reset)[0]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return local_attention(q, k, v, positions, 200)

    return {
        "linear_scan": (scan, [draw(B, T, R), torch.rand(B, T, R, dtype=torch.float64)]),
        "rg_lru": (recurrence, [draw(B, T, R), draw(B, T, R), draw(B, T, R), draw(R) - 4]),
        "causal_conv1d": (convolution, [draw(B, T, R), draw(R, 4), draw(R)]),
        "local_attention": (attention, [draw(B, T, 4, 128), draw(B, T, 1, 128), draw(B, T, 1, 128)]),
        "rope": (lambda x: rope(x, cos, sin), [draw(B, T, 4, 128)]),
    }


def relative(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact value."""
    return ((found.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()).item()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.manual_seed(0)
    errors: dict[str, dict[str, float]] = {}
    for name, (op, tensors) in inputs().items():
        for dtype in (torch.float32, torch.bfloat16):
            # The exact result is that of the rounded inputs: what is measured is the arithmetic, not the rounding.
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
            found, exact = op(*leaves), op(*exact_leaves)
            cotangent = torch.randn_like(exact).to(dtype)
            grads = torch.autograd.grad((found * cotangent).sum(), leaves)
            exact_grads = torch.autograd.grad((exact * cotangent.double()).sum(), exact_leaves)
            worst = max(relative(a, b) for a, b in zip(grads, exact_grads, strict=True))
            errors[f"{name} {str(dtype).removeprefix('torch.')}"] = {"value": relative(found, exact), "gradient": worst}
    config = replace(PRESETS["griffin-mini"], window=128)
    weights = Griffin(config, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0)).state_dict()
    tokens = torch.randint(0, config.vocab_size, (2, 512))
    models = {dtype: Griffin(config, dtype=dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16)}
    logits = {}
    with torch.no_grad():
        for dtype, model in models.items():
            model.load_state_dict(weights)
            logits[dtype] = model.logits(model(tokens))
    for dtype in (torch.float32, torch.bfloat16):
        error = {"value": relative(logits[dtype], logits[torch.float64])}
        errors[f"logits, six layers {str(dtype).removeprefix('torch.')}"] = error
    rows = [
        [name, f"{e['value']:.1e}", f"{e['gradient']:.1e}" if "gradient" in e else ""] for name, e in errors.items()
    ]
    print(timing.table(["what", "relative rms error of the value", "of the worst gradient"], rows))
    print(timing.save("numerics", {"shape": {"B": B, "T": T, "R": R}, "relative_rms_error": errors}))


if __name__ == "__main__":
    main()
