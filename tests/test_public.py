"""The public names of `griffin`: what they are, and that naming the package loads no PyTorch."""

import subprocess
import sys

import griffin

NAMES = [
    "PRESETS",
    "Conversation",
    "Engine",
    "Griffin",
    "GriffinConfig",
    "GriffinError",
    "Request",
    "Sampling",
    "State",
    "Tokenizer",
    "generate",
    "load",
    "load_tokenizer",
    "save",
]


def test_the_public_names_are_these_and_each_imports():
    assert sorted(griffin.__all__) == sorted(NAMES)
    for name in NAMES:
        assert getattr(griffin, name) is not None


def test_importing_griffin_imports_no_torch():
    code = "import sys, griffin; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
