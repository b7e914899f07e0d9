from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from griffin import PRESETS, Griffin
from griffin.train import flops
from griffin.train.flops import flops_per_token, peak_flops


def test_the_formula_counts_what_pytorch_counts() -> None:
    """Matrix products by PyTorch's own counter, on a model without kernels of ours; attention apart."""
    config = replace(PRESETS["hawk-tiny"], num_gate_blocks=4)
    model = Griffin(config, dtype=torch.float64)
    T = 32
    with FlopCounterMode(display=False) as counter:
        model.logits(model(torch.randint(0, config.vocab_size, (2, T)))).sum().backward()
    taps = 6 * config.conv_width * config.lru_width * config.num_layers  # not a matrix product
    assert counter.get_total_flops() / (2 * T) == pytest.approx(flops_per_token(config, T) - taps)


def test_attention_is_counted_by_the_keys_seen() -> None:
    config = replace(PRESETS["griffin-tiny"], window=5)
    T = 12
    keys = sum(min(t, 5) + 1 for t in range(T)) / T
    layers = config.block_types.count("attention")
    without = flops_per_token(config, 1) - 12 * config.width * layers
    assert flops_per_token(config, T) - without == pytest.approx(12 * config.width * layers * keys)
    assert flops_per_token(replace(config, window=None), T) > flops_per_token(config, T)


def test_a_known_figure() -> None:
    # 2.68 billion weights and, at 8,192 tokens a row, 8 layers that see up to 2,049 keys.
    assert flops_per_token(PRESETS["recurrentgemma-2b"], 8192) == pytest.approx(16.5e9, rel=0.01)


def test_peaks_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("Some other", None)):
        monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
