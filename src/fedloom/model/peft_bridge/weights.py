"""The base weights of a model, for methods that take something from them."""

from __future__ import annotations

from typing import cast

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedloom.errors import ConfigError


def read_weight(model: nn.Module, module: str) -> Tensor:
    """W0 (m × n) of a linear module, wrapped by PEFT or not; y = W0 x.

    Raises ConfigError for a matrix of a larger parameter, as experts have, and for one that rests in 8 or 4 bits.
    """
    found: nn.Module | None = dict(model.named_modules()).get(module)
    if isinstance(found, LoraLayer):
        found = cast(nn.Module, found.get_base_layer())
    if not isinstance(found, nn.Linear | Conv1D):
        raise ConfigError(_cannot(module, "is one matrix of a larger parameter"))
    weight: Tensor = found.weight
    packed = any(hasattr(weight, key) for key in ("quant_state", "CB"))  # what bitsandbytes adds
    if packed or not weight.is_floating_point():
        raise ConfigError(_cannot(module, "rests in 8 or 4 bits, which sites may round differently"))
    return weight.detach().T if isinstance(found, Conv1D) else weight.detach()


def _cannot(module: str, why: str) -> str:
    return (
        f"method.factors = 'svd' decomposes the base weights, but {module} {why}: take method.factors = 'random', or "
        "lora.target_modules without it"
    )
