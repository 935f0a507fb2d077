"""What the modules of a model are called in a GGUF file, and how llama.cpp orders the rows of some of them.

`gguf` has the names. The order of rows is that of llama.cpp's conversion of whole models, to which an adapter must fit:
where it rotates neighbouring rows of a query or key together, transformers rotates the two halves of a head.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from fedloom.errors import ConfigError, ModelError

QUERY, KEY = "q_proj", "k_proj"


@dataclass(frozen=True, slots=True)
class Architecture:
    """name: in `gguf.MODEL_ARCH`. interleaves: whether rows of queries and keys are put in another order.

    ties: whether the output layer shares the embedding's weight, where config.json does not say.
    """

    name: str
    interleaves: bool = False
    ties: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("LLAMA", interleaves=True),
    "mistral": Architecture("LLAMA", interleaves=True),
    "granite": Architecture("GRANITE", interleaves=True),
    "smollm3": Architecture("SMOLLM3", interleaves=True, ties=True),
    "olmo": Architecture("OLMO", interleaves=True),
    "olmo2": Architecture("OLMO2"),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "gemma": Architecture("GEMMA", ties=True),
    "gemma2": Architecture("GEMMA2", ties=True),
    "gemma3_text": Architecture("GEMMA3", ties=True),
    "phi3": Architecture("PHI3"),
    "starcoder2": Architecture("STARCODER2", ties=True),
    "gpt2": Architecture("GPT2", ties=True),
}
"""model_type of config.json → what llama.cpp makes of it: those whose matrices it takes over whole."""


def architecture_of(config: Mapping[str, Any], base: str) -> Architecture:
    """Raises ModelError for an architecture that is not in the table; `base` names the model."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ModelError(
            f"{base} is of model_type {ascii(kind)}, and a GGUF adapter can be written for "
            f"{', '.join(ARCHITECTURES)}: use --to merged, and convert that model with llama.cpp"
        )
    return ARCHITECTURES[kind]


def name_modules(config: Mapping[str, Any], base: str, modules: Collection[str]) -> dict[str, str]:
    """Module → name of its weight in a GGUF file of the model.

    Raises ModelError that names a module for which there is none.
    """
    lib, chosen = load_gguf(), architecture_of(config, base)
    layers = _number(config, ("num_hidden_layers", "n_layer"), base)
    table = lib.get_tensor_name_map(lib.MODEL_ARCH[chosen.name], layers)
    found = {module: table.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
    lost = [module for module, name in found.items() if name is None]
    if lost:
        raise ModelError(
            f"module {lost[0]} has no name in a GGUF file of {config['model_type']} with {layers} layers"
            f"{f', nor have {len(lost) - 1} others' if lost[1:] else ''}: the adapter is of another model, or use "
            "--to merged"
        )
    tied = [module for module, name in found.items() if name == "output.weight"]
    if tied and config.get("tie_word_embeddings", chosen.ties):
        raise ModelError(
            f"module {tied[0]} shares its weight with the embedding of {base}, and a GGUF file of such a model has no "
            "weight of its own for it: leave it out of lora.target_modules"
        )
    return {module: str(name) for module, name in found.items()}


def order_rows(config: Mapping[str, Any], base: str, module: str, up: Tensor) -> Tensor:
    """B of a module, (m, r), with its rows in llama.cpp's order.

    In every head the rows of its first half and of its second half take turns.
    """
    kind = module.rpartition(".")[2]
    if kind not in (QUERY, KEY) or not architecture_of(config, base).interleaves:
        return up
    heads = _number(config, ("num_attention_heads",), base)
    if kind == KEY and config.get("num_key_value_heads") is not None:
        heads = _number(config, ("num_key_value_heads",), base)
    if heads < 1 or up.shape[0] % (2 * heads):
        raise ModelError(
            f"module {module} has {up.shape[0]} rows, which {heads} heads of {base} do not divide: the adapter is of "
            "another model"
        )
    halves = up.reshape(heads, 2, up.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(up.shape)


def load_gguf() -> ModuleType:
    """The package gguf. Raises ConfigError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConfigError('--to gguf needs the package gguf: pip install "fedloom[gguf]"') from None
    return gguf


def _number(config: Mapping[str, Any], keys: tuple[str, ...], base: str) -> int:
    found = next((config[key] for key in keys if config.get(key) is not None), None)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ModelError(f"config.json of {base} has {keys[0]} = {ascii(found)[:80]}: expected a whole number")
    return found
