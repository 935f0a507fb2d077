"""Which of transformers' classes loads a model, and whether it predicts the next token and sees none after it."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from fedloom.errors import ModelError

ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"}
"""Types that transformers loads as causal models too, and that are so where is_decoder says it alone."""
TWO_WAY = {
    "xlm": ("causal", True),
    "xlnet": ("attn_type", "uni"),
    "cpmant": ("", None),
}
"""Other types that see later tokens, and the key and value of config.json under which they do not; "" where none is."""
UNSHIFTED = (
    *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    *("prophetnet", "trocr", "whisper"),
)
"""Types whose decoder half transformers loads alone. Its loss holds every label to the place before it: whoever trains
it with labels as causal models have them, teaches it to repeat the last token."""
SEEING = (
    "blip",
    "blip-2",
    "git",
    "idefics",
    "instructblip",
    "instructblipvideo",
    "kosmos-2",
    "pix2struct",
    "udop",
    "pi0",
)
"""Types that compute nothing from a text alone."""
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice")
"""What a checkpoint's architecture ends with that was trained to give labels. With tied embeddings it has all the
weights of a language model, and would load as one."""
AutoClass: TypeAlias = type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]


def choose_class(path: str | Path, config: PretrainedConfig) -> AutoClass:
    """The class that loads this model: of a model that sees images too, its language model is trained.

    Raises ModelError, in one line, for a model that is no causal language model.
    """
    kind = type(config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        named = ", ".join(config.architectures or ()) or "no architecture named"
        raise ModelError(
            f"{path} cannot be loaded as a causal language model: its config.json is of type {config.model_type} "
            f"({named}); take a model that predicts the next token, such as Llama, Qwen or GPT-2"
        )
    reason = refusal(config)
    if reason:
        raise ModelError(f"{path} cannot be trained as a causal language model: {reason}")
    return AutoModelForCausalLM if kind in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def refusal(config: PretrainedConfig) -> str | None:
    """Why a model is not trained as a causal one although transformers loads it; None where it is."""
    kind = str(config.model_type)
    labels = next((name for name in config.architectures or () if name.endswith(HEADS)), None)
    if labels:
        return f"its weights are a {labels}'s, which gives labels and no text; take the language model it was made of"
    if kind in UNSHIFTED:
        return f"a {kind} model answers with its decoder half what its encoder has read, and has another loss"
    if kind in SEEING:
        return f"a {kind} model needs an image (or more) beside a text"
    if kind == "reformer":
        return "a reformer model's reversible layers lead no gradient to an adapter over frozen weights"
    if config.is_encoder_decoder:
        return f"a {kind} model has an encoder, which reads the prompt, beside its decoder"
    seen = f"{kind} is an encoder, in which every token sees those after it"
    if kind in TWO_WAY:
        key, value = TWO_WAY[kind]
        if not key:
            return f"a {kind} model's tokens see those after them"
        return None if getattr(config, key, None) == value else f"{seen}; one trained otherwise says {key} = {value!r}"
    if kind in ENCODERS and getattr(config, "is_decoder", True) is False:
        return f'{seen}; one trained as a decoder says "is_decoder": true in config.json'
    return None
