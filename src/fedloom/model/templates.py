"""How an example becomes the two texts that a model sees: a prompt, and the completion that it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from fedloom.errors import DataError, NumericError
from fedloom.model.examples import Example
from fedloom.model.foreign import limit_steps, raise_in_one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JINJA_FILE = "<template>"
"""What Jinja calls the code that it makes of a template."""
LONGEST_TEMPLATE = 2**18
"""Characters; the longest chat templates in use have about 30,000."""
LARGEST_NUMBER = 1_000_000
"""In a chat template, where numbers count turns and levels of indentation."""


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
    prompt = _rendered(tokenizer, messages, answering=True)
    messages.append({"role": "assistant", "content": example.output})
    whole = _rendered(tokenizer, messages, answering=False)
    completion = whole.removeprefix(prompt) if whole.startswith(prompt) else example.output
    end = completion.rstrip()
    return prompt, end.removesuffix(tokenizer.eos_token) if end.endswith(tokenizer.eos_token) else completion


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, answering: bool) -> str:
    """The conversation in the tokenizer's template, which comes with the model, from a stranger perhaps.

    transformers renders it in Jinja's sandbox; here its work is limited too. Raises DataError.
    """
    check_template(str(tokenizer.chat_template))
    given = sum(len(message["content"]) for message in messages)
    failed = "the tokenizer's chat template cannot be used"
    try:
        with raise_in_one_line(DataError, failed), limit_steps(JINJA_FILE, given):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
    except NumericError as error:
        raise DataError(f'{failed}: {error}; set data.template to "alpaca" or "plain"') from None
    return str(text)


@lru_cache(maxsize=16)
def check_template(source: str) -> None:
    """Raise DataError for a chat template with operations of which a single one may run for hours.

    Those are powers, and repetitions by large numbers. Jinja computes constants while it compiles a template, before
    its steps can be counted.
    """
    failed = "the tokenizer's chat template cannot be used"
    if len(source) > LONGEST_TEMPLATE:
        raise DataError(f"{failed}: it has {len(source):,} characters, expected at most {LONGEST_TEMPLATE:,}")
    with raise_in_one_line(DataError, failed):
        from jinja2 import Environment

        tokens = [(kind, value) for _, kind, value in Environment().lex(source)]
    for kind, value in tokens:
        if kind == "operator" and value == "**":
            raise DataError(f"{failed}: it computes powers")
        # Over twenty digits are over the limit, whatever they are: their value need not be computed.
        if kind in ("integer", "float") and (len(value) > 20 or _number(value) > LARGEST_NUMBER):
            raise DataError(f"{failed}: it holds the number {value[:20]}, expected at most {LARGEST_NUMBER:,}")


def _number(text: str) -> float:
    """The value of a number in Jinja."""
    return float(text.replace("_", "")) if text[:2].lower() not in ("0x", "0o", "0b") else float(int(text, 0))


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
