"""A tiny configuration of every architecture that transformers loads as a causal language model.

Sizes are set by the names that configurations give them; what an architecture needs besides stands in `TWEAKS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 96
ALWAYS = ("pad_token_id", "head_dim", "num_key_value_heads")
"""Keys that are set where a configuration leaves them open, too."""
SIZES: Mapping[str, int] = {
    r"vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"hidden_size|d_model|n_embd|embedding_size|embed_dim|emb_dim|dim|model_dim|dim_model": 32,
    r"intermediate_size|d_ff|d_inner|n_inner|inner_dim|ffn_dim|ffn_hidden_size|ffn_hidden_dim|filter_size|dim_ff"
    r"|decoder_ffn_dim|encoder_ffn_dim|intermediate_size_mlp|dense_intermediate_size|feed_forward_size": 48,
    r"moe_intermediate_size|expert_ffn_hidden_size|shared_intermediate_size|shared_expert_intermediate_size"
    r"|moe_ffn_hidden_size|mlp_intermediate_size|moe_shared_expert_intermediate_size": 24,
    r"num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_decoder_layers|depth"
    r"|num_encoder_layers|num_blocks": 2,
    r"num_attention_heads|n_heads?|num_heads|decoder_attention_heads|encoder_attention_heads"
    r"|num_decoder_attention_heads|num_encoder_attention_heads|swa_num_attention_heads|linear_num_attention_heads": 4,
    r"num_key_value_heads|n_head_kv|num_kv_heads|kv_n_heads|swa_num_key_value_heads": 2,
    r"head_dim|global_head_dim|swa_head_dim|v_head_dim|qk_nope_head_dim|qk_rope_head_dim|swa_v_head_dim|attention_head_dim"
    r"|kv_channels|rotary_dim|index_head_dim|dim_head": 8,
    r"kv_lora_rank|q_lora_rank|o_lora_rank|dt_rank|time_step_rank|low_rank": 16,
    r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|n_experts|num_routed_experts": 4,
    r"num_experts_per_tok|experts_per_token|moe_k|moe_topk|top_k_experts|num_experts_per_token|moe_top_k": 2,
    r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts|first_k_dense_replace"
    r"|num_dense_layers|n_groups|mamba_n_groups|ngroups": 1,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length": 256,
    r"sliding_window|attention_window_size|window_size": 64,
    r"state_size|mamba_d_state|ssm_state_size|d_state": 8,
    r"mamba_n_heads|mamba_num_heads|n_mamba_heads": 4,
    r"mamba_d_head|mamba_head_dim|mamba_headdim": 16,
    r"linear_key_head_dim|linear_value_head_dim": 8,
    r"linear_num_key_heads": 2,
    r"linear_num_value_heads": 4,
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r"eos_token_id": 2,
    r"image_size": 16,
    r"patch_size": 8,
}
"""Pattern for the whole name of a key → its value. Lists are left out, since configurations derive them."""
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
TWEAKS: Mapping[str, Mapping[str, object]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glm_ocr", "glmga"), {"text_config": _SECTIONS}),
    "paddleocr_vl": {"text_config": _SECTIONS},
    "glm4v_moe": {"text_config": {"rope_parameters": {**_SECTIONS["rope_parameters"], "mrope_section": [1, 0, 1]}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "mpt": {"attn_config": {}},
    "deepseek_v4": {"head_dim": 16, "qk_rope_head_dim": 8},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "roc_bert": {"is_decoder": False},
    "xmod": {"is_decoder": False},
    "zaya": {"num_experts_per_tok": 1},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "mamba", "hybrid"]},
}
"""Type → what it needs besides."""


def families() -> list[str]:
    """The types of all architectures with a text of their own, sorted."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})


def tiny_config(family: str) -> PretrainedConfig:
    """The smallest sensible configuration of a family; whatever transformers raises is passed on."""
    return _shrink(CONFIG_MAPPING[family], dict(TWEAKS.get(family, {})))


def _shrink(kind: type[PretrainedConfig], tweaks: dict[str, object]) -> PretrainedConfig:
    known = kind().to_dict()
    chosen: dict[str, Any] = {}
    for key, value in known.items():
        sub = kind.sub_configs.get(key)
        if sub is not None and isinstance(value, dict):
            own = tweaks.pop(key, {})
            real = CONFIG_MAPPING[value["model_type"]] if sub is AutoConfig else sub
            chosen[key] = _shrink(real, dict(own)).to_dict()  # type: ignore[call-overload]
        elif key in ALWAYS or value is not None:
            chosen |= _sized(key, value)
    if "qk_rope_head_dim" in known:
        chosen.pop("head_dim", None)  # derived from the parts of a key, of which every head has its own
        chosen |= {"num_key_value_heads": 4} if "num_key_value_heads" in chosen else {}
    return kind(**{**chosen, **tweaks})


def _sized(key: str, value: object) -> dict[str, Any]:
    if re.search(r"dropout|pdrop|layerdrop|drop_rate|jitter", key) and isinstance(value, float):
        return {key: 0.0}  # so that two trainings can be compared
    pattern = next((pattern for pattern in SIZES if re.fullmatch(pattern, key)), None)
    size = SIZES[pattern] if pattern else None
    return {} if size is None or not isinstance(value, int | None) else {key: size}
