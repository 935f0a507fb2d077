"""Models of well-known shapes with random weights: what a client's turn costs does not follow from what it learns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from fedloom.errors import ConfigError
from fedloom.model.base import DTYPES, load_tokenizer
from fedloom.model.shared_base import LoadBase

SHAPES: Mapping[str, Mapping[str, int]] = {
    "smollm-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 2048,
    },
}
"""A name → sizes by the names of a LlamaConfig; embeddings are tied."""


def made_up_base(name: str) -> LoadBase:
    """How to load a model of these shapes, beside the tokenizer of the settings' own. Raises ConfigError."""
    if name not in SHAPES:
        raise ConfigError(f"no made-up model {name!r}: expected {', '.join(SHAPES)}")

    def load(path: str, dtype: str, quantization: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        with torch.random.fork_rng(()):
            torch.manual_seed(0)
            config = LlamaConfig.from_dict({**SHAPES[name], "tie_word_embeddings": True})
            model = LlamaForCausalLM(config).to(dtype=DTYPES[dtype])  # type: ignore[call-arg]
        return model.eval().requires_grad_(False), load_tokenizer(path)

    return load
