"""A base model whose weights rest in 8 or 4 bits, by bitsandbytes: on a GPU, and on the CPU as well."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from fedloom.errors import ConfigError

QUANTIZATIONS: Mapping[str, Mapping[str, object]] = {
    "none": {},
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
"""model.quantization → arguments of transformers.BitsAndBytesConfig."""


def quantization_options(quantization: str, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What from_pretrained is told, so that the weights are in this form and computed with in `dtype`.

    Raises ConfigError where bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization = {quantization!r} needs the package bitsandbytes: pip install 'fedloom[quantized]'"
        )
    # It says at every product of a matrix in 8 bits that the inputs are rounded, which is how the method works.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    settings = dict(QUANTIZATIONS[quantization])
    if quantization == "4bit":
        settings["bnb_4bit_compute_dtype"] = dtype
    return {
        "quantization_config": BitsAndBytesConfig(**settings),  # type: ignore[no-untyped-call]
        "device_map": {"": 0 if device.type == "cuda" else "cpu"},
    }


def keep_differentiable(model: nn.Module) -> None:
    """Have gradients reach the adapters of a model in 4 bits, on every kind of CPU.

    On a CPU that computes in bfloat16 (AVX512), bitsandbytes packs the weights at the first evaluation into a form
    whose product has no gradient, so that all training after it would change nothing, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def packed_weights(model: nn.Module) -> Iterator[object]:
    """What bitsandbytes' modules hold of their weights beside the parameters: what a copy of the modules shares, too.

    A module in 8 bits moves its codes and scales out of the parameter at its first evaluation; it does so here, since
    a second module around the same parameter would find none there.
    """
    for module in model.modules():
        if hasattr(module, "init_8bit_state"):
            if getattr(module.weight, "CB", None) is not None:
                module.init_8bit_state()  # type: ignore[operator]
            state: Any = module.state
            yield from (held for held in (state.CB, state.SCB) if held is not None)
        elif getattr(module, "quant_state", None) is not None:
            yield module.quant_state
