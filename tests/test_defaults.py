"""PyTorch's defaults, process-wide dtype and device, decide nothing here: another library may have set them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What makes a tensor from no other: these take the defaults where dtype and device are not said.
FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "normal",
}
FACTORIES |= {"ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices"}
FACTORIES |= {"zeros"}

# Everything is computed before the default is set and after it; a kernel that writes beside its memory ends the process.
CODE = """
import sys
from contextlib import nullcontext
from dataclasses import replace

import torch

import griffin
from griffin import PRESETS, Griffin, Tokenizer
from griffin.infer.step import DecodeStep
from griffin.quantize import quantize

torch.set_num_threads(1)
tokens, ids = torch.randint(0, 250, (2, 70), generator=torch.Generator().manual_seed(1)), torch.tensor([[3], [4]])
lengths, tokenizer = torch.tensor([70, 50]), Tokenizer.bytes()

def make(**changes):
    config = replace(PRESETS["griffin-tiny"], vocab_size=tokenizer.vocab_size, **changes)
    return Griffin(config, device="cpu", generator=torch.Generator().manual_seed(0))

def run():
    for form in (None, "int8", "int4"):
        model = make()
        if form is None:
            model.logits(model(tokens, lengths=lengths)[:, :50]).logsumexp(-1).sum().backward()
            yield from (parameter.grad for parameter in model.parameters())
        else:
            quantize(model, form)
        with torch.no_grad():
            state = model.new_state(2)
            yield model.logits(model(tokens, state, lengths=lengths)[:, -1])
            yield model.logits(model(ids, state))
            step = DecodeStep(model, state)
            yield from (step(ids[:, 0]).clone() for _ in range(3))
            yield from state.rows([1, 0]).tensors().values()
        texts = griffin.generate(model, tokenizer, ["to be", "or not"], max_tokens=5, temperature=0.7, seed=1)
        yield torch.frombuffer(bytearray(repr(texts).encode()), dtype=torch.uint8)
    model = make(embedding_scale="bf16")
    yield from model.parameters()

wanted = [tensor.detach().clone() for tensor in run()]
kind, name = sys.argv[1:]
around = nullcontext()
if kind == "dtype":
    torch.set_default_dtype(getattr(torch, name))
elif kind == "device":
    torch.set_default_device(name)
else:
    around = torch.device(name)
with around:
    found = [tensor.detach() for tensor in run()]
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), (a, b)
    if kind != "dtype":
        assert {parameter.device.type for parameter in Griffin(PRESETS["griffin-tiny"]).parameters()} == {name}
print("equal", len(found))
"""


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dtype", "float64"),
        ("dtype", "bfloat16"),
        ("dtype", "float16"),
        ("device", "meta"),
        ("with", "meta"),
    ],
)
def test_a_default_changes_no_bit(kind: str, name: str) -> None:
    command = [sys.executable, "-W", "error", "-c", CODE, kind, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("equal")


def test_dtype_and_device_are_said_wherever_a_tensor_is_made() -> None:
    """But for a module's parameters: Griffin makes them on meta and then gives them both."""
    left_open = []
    for path in sorted((ROOT / "griffin").rglob("*.py")):
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        parameters = {id(a) for call in calls if ast.unparse(call.func).endswith("nn.Parameter") for a in call.args}
        for call in calls:
            module, _, name = ast.unparse(call.func).rpartition(".")
            said = {keyword.arg for keyword in call.keywords}
            if (
                module == "torch"
                and name in FACTORIES
                and not {"dtype", "device"} <= said
                and id(call) not in parameters
            ):
                left_open.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert not left_open, "\n".join(left_open)
