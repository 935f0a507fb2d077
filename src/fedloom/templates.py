"""How an example becomes the two texts that a model sees: a prompt, and the completion that it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedloom.data import Example
from fedloom.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Template:
    """text(example, tokenizer) → prompt and completion, without the end-of-sequence token.

    adds_special says whether the tokenizer puts its own start token before the prompt.
    """

    text: Callable[[Example, PreTrainedTokenizerBase], tuple[str, str]]
    adds_special: bool = True


ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)


def _alpaca(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    paired = ", paired with an input that provides further context" if example.input else ""
    given = f"### Input:\n{example.input}\n\n" if example.input else ""
    return ALPACA.format(paired=paired, instruction=_alone(example), input=given), example.output


def _plain(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    return f"{_question(example)}\n", example.output


def _raw(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    return _question(example), example.output


def _chat(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise DataError('the tokenizer has no chat template: set data.template to "alpaca" or "plain"')
    turns = [*example.history, ("user", _question(example, alone=False))]
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    messages.append({"role": "assistant", "content": example.output})
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
    completion = whole.removeprefix(prompt) if whole.startswith(prompt) else example.output
    end = completion.rstrip()
    return prompt, end.removesuffix(tokenizer.eos_token) if end.endswith(tokenizer.eos_token) else completion


def _alone(example: Example) -> str:
    if example.history:
        raise DataError(
            'the messages have a system prompt or earlier turns: only data.template = "chat" has a place for them'
        )
    return example.instruction


def _question(example: Example, alone: bool = True) -> str:
    instruction = _alone(example) if alone else example.instruction
    return f"{instruction}\n{example.input}" if example.input else instruction


TEMPLATES: Mapping[str, Template] = {
    "alpaca": Template(_alpaca),
    "chat": Template(_chat, adds_special=False),
    "plain": Template(_plain),
    "raw": Template(_raw),
}
"""alpaca: Stanford Alpaca's text; chat: the tokenizer's; plain: instruction, line break, output; raw: nothing added."""
