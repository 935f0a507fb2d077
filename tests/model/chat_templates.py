"""Chat templates in the manner of five families, and a tokenizer that knows their special tokens.

With MARKED ones the assistant's part stands between {% generation %} and {% endgeneration %}, from which transformers
itself tells what the assistant said: that is what the labels are held to.
"""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerFast

from tiny_models import tokenizer

CHATML = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token }}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %}{% generation %} {{ m['content'] }} </s>{% endgeneration %}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<start_of_turn>model\n{% generation %}"
    "{{ m['content'] | trim }}<end_of_turn>{% endgeneration %}\n{% else %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>\n{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}\n{% else %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
# Only the last answer keeps its thoughts, empty ones too; earlier turns are told without them.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}"
    "{% generation %}<think>\n\n</think>\n\n{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% elif m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA, "phi": PHI, "thinking": THINKING}
MARK = re.compile(r"\{% (end)?generation %\}")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>"]


def tokenizer_of(family: str, marked: bool = False) -> PreTrainedTokenizerFast:
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = MARKED[family] if marked else MARK.sub("", MARKED[family])
    return made
