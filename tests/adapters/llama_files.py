"""Base models as GGUF files, and what llama.cpp makes of them: the reader that knows nothing of our own code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
from transformers import PreTrainedModel


def write_base(model: PreTrainedModel, kind: str, out: Path) -> None:
    """A tiny model as llama.cpp's own conversion would write it, with a vocabulary that only has numbers."""
    config = model.config
    llama_like = kind != "gpt2"
    writer = gguf.GGUFWriter(out, {"mistral": "llama"}.get(kind, kind))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size if llama_like else 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if llama_like:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[{"mistral": "LLAMA"}.get(kind, kind.upper())], 2)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if kind in ("llama", "mistral") and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleave(values, heads)
        if kind == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            values = values.T
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half goes to 2 i, row i of its second half to 2 i + 1."""
    size = len(rows) // heads
    order = [head * size + place for head in range(heads) for i in range(size // 2) for place in (i, i + size // 2)]
    return rows[order]


def next_log_probs(base: Path, lora: Path | None, ids: Sequence[int], vocabulary: int) -> list[float]:
    """Log-probability of every token after these, as llama.cpp computes it."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 64, 1, 0
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    with _silence():
        server = xllamacpp.Server(params)
        asked = {"prompt": list(ids), "max_tokens": 1, "logprobs": vocabulary, "cache_prompt": False, "samplers": []}
        told = server.handle_completions(asked)
        del server
    (first,) = told["choices"][0]["logprobs"]["content"]
    found = {one["id"]: one["logprob"] for one in first["top_logprobs"]}
    return [found[token] for token in range(vocabulary)]


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(size - 3))])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([2, 3, 3, *[6] * (size - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


@contextmanager
def _silence():
    """llama.cpp writes its log to the process's stderr."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
