"""How an example becomes the two texts that a model sees: a prompt, and the completion that it learns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError, DataError
from fedloom.model.chat import Spans, Turns, find_earlier_answers, split_last_answer
from fedloom.model.examples import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"
"""The value of data.template that takes a template for every form of example."""


def _no_answers(example: Example, tokenizer: PreTrainedTokenizerBase) -> Spans:
    return ()


@dataclass(frozen=True, slots=True)
class Template:
    """text(example, tokenizer) → prompt and completion, without the end-of-sequence token.

    answers(example, tokenizer) → where earlier answers stand in the prompt, in characters, with what ends them.
    adds_special says whether the tokenizer puts its own start token before the prompt.
    """

    text: Callable[[Example, PreTrainedTokenizerBase], tuple[str, str]]
    answers: Callable[[Example, PreTrainedTokenizerBase], Spans] = _no_answers
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
        raise DataError('the tokenizer has no chat template: set data.template to "turns", "alpaca" or "plain"')
    return split_last_answer(tokenizer, _turns_of(example))


def _chat_answers(example: Example, tokenizer: PreTrainedTokenizerBase) -> Spans:
    return find_earlier_answers(tokenizer, _turns_of(example))


def _heading(role: str) -> str:
    return f"### {role.capitalize()}:\n"


def _turns(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    text = "".join(part for part, _ in _turn_parts(example, tokenizer))
    return text + _heading("assistant"), example.output


def _turns_answers(example: Example, tokenizer: PreTrainedTokenizerBase) -> Spans:
    spans, place = [], 0
    for part, learnt in _turn_parts(example, tokenizer):
        if learnt:
            spans.append((place, place + len(part)))
        place += len(part)
    return tuple(spans)


def _turn_parts(example: Example, tokenizer: PreTrainedTokenizerBase) -> Iterable[tuple[str, bool]]:
    """All before the last answer, in parts; True for an earlier answer with the token that ends it."""
    for role, content in _turns_of(example)[:-1]:
        yield _heading(role), False
        yield (f"{content}{tokenizer.eos_token}", True) if role == "assistant" else (content, False)
        yield "\n\n", False


def _turns_of(example: Example) -> Turns:
    return [*example.history, ("user", _question(example, alone=False)), ("assistant", example.output)]


def _alone(example: Example) -> str:
    if example.history:
        raise DataError(
            "the messages have a system prompt or earlier turns: only data.template = "
            '"chat" or "turns" has a place for them'
        )
    return example.instruction


def _question(example: Example, alone: bool = True) -> str:
    instruction = _alone(example) if alone else example.instruction
    return f"{instruction}\n{example.input}" if example.input else instruction


TEMPLATES: Mapping[str, Template] = {
    "alpaca": Template(_alpaca),
    "chat": Template(_chat, _chat_answers, adds_special=False),
    "turns": Template(_turns, _turns_answers),
    "plain": Template(_plain),
    "raw": Template(_raw),
}
"""alpaca: Stanford Alpaca's text; chat: the tokenizer's own; turns: a conversation in plain text, for tokenizers that
have no chat template; plain: instruction, line break, output; raw: nothing added."""

_BY_FORM = {"messages": "turns", "text": "raw"}
"""What "auto" takes for a form of example, where the tokenizer has no say; "alpaca" for all others."""


def choose_template(setting: str, form: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the template for an example of this form. Raises ConfigError for a setting that names none."""
    if setting in TEMPLATES:
        return setting
    if setting != AUTO:
        raise ConfigError(f"data.template {setting!r} is unknown: expected {AUTO}, {', '.join(TEMPLATES)}")
    return "chat" if form == "messages" and tokenizer.chat_template else _BY_FORM.get(form, "alpaca")


def note_on_template(setting: str, forms: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What to know about how conversations are rendered; None where there are none, or nothing to say."""
    if "messages" not in forms:
        return None
    if setting == AUTO and tokenizer.chat_template:
        return 'data.template = "auto": conversations are rendered by the tokenizer\'s own chat template ("chat")'
    if setting == AUTO:
        return (
            'data.template = "auto": conversations are rendered as plain text with headings ("turns"), since the '
            "tokenizer has no chat template"
        )
    if setting != "chat" and tokenizer.chat_template:
        return (
            f'data.template = "{setting}" does not use the chat template that the tokenizer has: set it to "chat", or '
            'leave it at "auto", if the model is to be used in chats'
        )
    return None
