"""Random causal LMs of four architectures, small enough to train in a test, and a tokenizer to go with them."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedloom.model.peft_bridge import linear_modules
from fedloom.model.placement import Adapter, place_adapter
from fedloom.records.config import LoraSettings

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;+-*/=?!#'\"<>|()_"
CHAT = (
    "{{ bos_token }}{% for message in messages %}<{{ message['role'] }}>\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """One token a character."""
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = CHAT if chat else None
    return made


def _sizes() -> dict[str, int]:
    return {
        "vocab_size": len(SPECIAL) + len(CHARACTERS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def llama(seed: int = 0) -> PreTrainedModel:
    """Input and output embeddings tied, k_proj and v_proj not square."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_sizes(), tie_word_embeddings=True)).eval()


def qwen2(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**_sizes())).eval()


def mistral(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**_sizes(), sliding_window=None)).eval()


def gpt2(seed: int = 0) -> PreTrainedModel:
    """Weights stored transposed (Conv1D), embeddings tied."""
    torch.manual_seed(seed)
    sizes = _sizes()
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=sizes["vocab_size"],
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=256,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
        )
    ).eval()


MODELS = {"llama": llama, "qwen2": qwen2, "mistral": mistral, "gpt2": gpt2}


def placed(base: PreTrainedModel, **lora: object) -> Adapter:
    """The adapter that these settings put on a model."""
    return place_adapter(linear_modules(base), LoraSettings(**lora))
