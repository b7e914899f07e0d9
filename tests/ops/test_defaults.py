"""PyTorch's default dtype, default device and tracer are the caller's: none decides what a kernel writes, or where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import griffin
from griffin.config import PRESETS
from griffin.model import Griffin
from griffin.ops import causal_conv1d, geglu, linear, linear_scan, rg_lru, rms_norm, rope_table

SCRIPT = """
import torch, griffin
from griffin.config import PRESETS
from griffin.infer.step import DecodeStep
from griffin.model import Griffin
from griffin.quantize import quantize

make = lambda: Griffin(PRESETS["griffin-tiny"], generator=torch.Generator().manual_seed(0)).eval()
ids = torch.arange(3, 400)[None] % 259
def run():
    trained = make()
    trained(ids).float().square().sum().backward()
    results = [parameter.grad for parameter in trained.parameters()]
    for form in (None, "int8", "int4"):
        model = make() if form is None else quantize(make(), form)
        with torch.no_grad():
            state = model.new_state(1)
            results.append(model.logits(model(ids, state)[:, -1]))
            step = DecodeStep(model, state)
            results += [step(torch.tensor([5], device="cpu")).clone() for _ in range(3)]
    (completion,) = griffin.generate(make(), griffin.Tokenizer.bytes(), [[5, 6, 7]], max_tokens=4, temperature=0)
    return results, completion.tokens

wanted = run()
AROUND
    found = run()
assert found[1] == wanted[1]
assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found[0], wanted[0], strict=True))
"""
AROUND = {
    "bfloat16": "torch.set_default_dtype(torch.bfloat16)\nif True:",
    "float16": "torch.set_default_dtype(torch.float16)\nif True:",
    "float64": "torch.set_default_dtype(torch.float64)\nif True:",
    "device": "ids = ids.clone()\nwith torch.device('meta'):",
    "default device": "torch.set_default_device('meta')\nif True:",
}


@pytest.mark.parametrize("what", list(AROUND))
def test_no_default_changes_a_result(what: str) -> None:
    """In a process of its own, which ends where memory is overrun."""
    script = SCRIPT.replace("AROUND", AROUND[what])
    if "device" in what:  # models are made on the default device, as PyTorch does
        script = script.replace("manual_seed(0))", 'manual_seed(0), device="cpu")')
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_is_made_on_the_default_device() -> None:
    with torch.device("meta"):
        assert Griffin(PRESETS["griffin-tiny"]).embedding.is_meta
        assert not Griffin(PRESETS["griffin-tiny"], device="cpu").embedding.is_meta


def test_a_table_is_in_fp32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad():
            cos, sin = rope_table(torch.arange(4)[None], 8)
    finally:
        torch.set_default_dtype(before)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0].tolist() == [1, 1, 1, 1]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_takes_the_definition() -> None:
    x, weight = torch.randn(3, 8), torch.zeros(8)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: rms_norm(x, weight, 1e-6), (x,), check_trace=False)
        other = torch.randn(5, 8)
        torch.testing.assert_close(traced(other), rms_norm(other, weight, 1e-6))


@pytest.mark.parametrize("records", [True, False])
def test_make_fx_takes_the_definition(records: bool) -> None:
    x, weight = torch.randn(3, 8), torch.zeros(8)
    with torch.set_grad_enabled(records):
        traced = make_fx(lambda x: rms_norm(geglu(x, x), weight, 1e-6))(x)
        other = torch.randn(3, 8)
        torch.testing.assert_close(traced(other), rms_norm(geglu(other, other), weight, 1e-6))


OPAQUE = {
    "rg_lru": lambda x: rg_lru(x, x, x, torch.zeros(8))[0],
    "causal_conv1d": lambda x: causal_conv1d(x, torch.ones(8, 4), torch.zeros(8))[0],
    "linear_scan": lambda x: linear_scan(x, x)[0],
    "linear": lambda x: linear(x, torch.ones(3, 8).bfloat16()),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("records", [True, False])
@pytest.mark.parametrize("name", list(OPAQUE))
def test_no_tangent_is_lost(name: str, records: bool) -> None:
    """PyTorch drops it at an operation with a gradient of its own: jvp then gives zeros."""
    x, run = torch.randn(1, 3, 8), OPAQUE[name]
    with torch.set_grad_enabled(records), forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=name):
            run(forward_ad.make_dual(x, x))
        assert torch.equal(run(x), run(x.clone()))  # nothing to lose
    with torch.set_grad_enabled(records), pytest.raises(NotImplementedError, match=name):
        torch.func.jvp(run, (x,), (x,))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # what PyTorch does for it
def test_vmap_and_forward_derivatives_take_the_definition() -> None:
    x, tangent = torch.randn(4, 3, 8), torch.randn(4, 3, 8)
    run = lambda x: rms_norm(x, torch.ones(8), 1e-6)  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(run)(x), run(x))
        _, found = torch.func.jvp(run, (x,), (tangent,))
        _, wanted = torch.func.jvp(run, (x.double(),), (tangent.double(),))
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


# What allocates without a tensor to follow.
FACTORIES = {"empty", "zeros", "ones", "full", "arange", "tensor", "rand", "randn", "randint", "linspace", "eye"}


def test_whatever_is_made_says_its_dtype_and_device() -> None:
    """In the source: `torch.empty(n)` is of PyTorch's default dtype, on its default device, whoever set them."""
    found = []
    for path in Path(griffin.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if path.name == "model.py" and node.func.attr == "empty":  # parameters: Griffin says it for all of them
                continue
            owner = node.func.value
            if not isinstance(owner, ast.Name) or owner.id != "torch" or node.func.attr not in FACTORIES:
                continue
            said = {keyword.arg for keyword in node.keywords}
            if not {"dtype", "device"} <= said and None not in said:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)[:70]}")
    assert not found, "\n".join(found)
