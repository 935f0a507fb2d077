"""Conversations in the tokenizer's own chat template, which comes with the model, from a stranger perhaps.

transformers renders it in Jinja's sandbox; here its work is limited too, and what it raises becomes one line.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

from fedloom.errors import DataError, NumericError
from fedloom.model.foreign import limit_steps, raise_in_one_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

Turns: TypeAlias = "Sequence[tuple[str, str]]"
"""(role, content) of every message."""
Spans: TypeAlias = tuple[tuple[int, int], ...]
"""(start, end) of parts of a text in characters, or of a row in tokens."""

JINJA_FILE = "<template>"
"""What Jinja calls the code that it makes of a template."""
LONGEST_TEMPLATE = 2**18
"""Characters; the longest chat templates in use have about 30,000."""
LARGEST_NUMBER = 1_000_000
"""In a chat template, where numbers count turns and levels of indentation."""
FAILED = "the tokenizer's chat template cannot be used"


def split_last_answer(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> tuple[str, str]:
    """(what generation would start from, the last answer with what ends it but for the end-of-sequence token).

    Raises DataError where the template fails, or takes no such conversation.
    """
    prompt = render_turns(tokenizer, turns[:-1], answering=True)
    whole = render_turns(tokenizer, turns, answering=False)
    completion = whole.removeprefix(prompt) if whole.startswith(prompt) else turns[-1][1]
    end, token = completion.rstrip(), str(tokenizer.eos_token)
    return prompt, end.removesuffix(token) if end.endswith(token) else completion


def find_earlier_answers(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> Spans:
    """Where the assistant's earlier answers stand in the prompt of the last, each with the token that ends it.

    An answer begins where generation would begin: behind the template's own prompt for it. Raises DataError where the
    template tells earlier turns otherwise than it told them at their time, so that nobody knows where they are.
    """
    prompt, last = split_last_answer(tokenizer, turns)
    mark = _end_mark(tokenizer, last, turns[-1][1])
    spans = []
    for place, (role, content) in enumerate(turns[:-1]):
        if role == "assistant":
            start = _find_start(tokenizer, turns[:place], content.strip(), prompt)
            spans.append((start, _find_end(prompt, start, content.strip(), turns[place + 1][1].strip(), mark)))
    return tuple(spans)


def _find_start(tokenizer: PreTrainedTokenizerBase, before: Turns, content: str, prompt: str) -> int:
    """Where the answer to `before` begins in `prompt`."""
    if not before:  # an assistant that speaks first; few templates render no messages at all
        start = prompt.find(content)
    else:
        told = render_turns(tokenizer, before, answering=False)
        asked = render_turns(tokenizer, before, answering=True)
        if prompt.startswith(asked):
            return len(asked)
        start = prompt.find(content, len(told)) if prompt.startswith(told) else -1
    if start < 0:
        raise DataError(
            "the tokenizer's chat template changes earlier turns, so that their answers cannot be found: set "
            "data.assistant_only_loss = false"
        )
    return start


def _find_end(prompt: str, start: int, content: str, following: str, mark: str) -> int:
    """Where an earlier answer ends: behind its end mark, or behind its content where the template has no mark."""
    found = prompt.find(content, start)
    behind = found + len(content) if found >= 0 else start
    # The mark is looked for before the next message alone: it may be missing here, as where only the last turn ends.
    limit = prompt.find(following, behind) if following else len(prompt)
    end = prompt.find(mark, behind, limit if limit >= 0 else len(prompt)) if mark else -1
    return end + len(mark) if end >= 0 else behind


def _end_mark(tokenizer: PreTrainedTokenizerBase, last: str, content: str) -> str:
    """What follows an answer up to its first special token: that is what a model learns to stop with."""
    if content.strip() not in last:
        return str(tokenizer.eos_token)
    behind = last.partition(content.strip())[2] + str(tokenizer.eos_token)
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    ends = [behind.find(token) + len(token) for token in known if token and token in behind]
    return behind[: min(ends)] if ends else ""


def render_turns(tokenizer: PreTrainedTokenizerBase, turns: Turns, *, answering: bool) -> str:
    """The conversation as text; `answering`: up to where the assistant would begin to answer. Raises DataError."""
    check_template(str(tokenizer.chat_template))
    messages = [{"role": role, "content": content} for role, content in turns]
    given = sum(len(content) for _, content in turns)
    try:
        with raise_in_one_line(DataError, FAILED), limit_steps(JINJA_FILE, given):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
    except (NumericError, DataError) as error:
        reason = str(error).removeprefix(f"{FAILED}: ")
        raise DataError(
            f'{FAILED}: {reason}; change the messages, or set data.template = "turns", a plain rendering of any roles'
        ) from None
    return str(text)


@lru_cache(maxsize=16)
def check_template(source: str) -> None:
    """Raise DataError for a chat template with operations of which a single one may run for hours.

    Those are powers, and repetitions by large numbers. Jinja computes constants while it compiles a template, before
    its steps can be counted.
    """
    if len(source) > LONGEST_TEMPLATE:
        raise DataError(f"{FAILED}: it has {len(source):,} characters, expected at most {LONGEST_TEMPLATE:,}")
    with raise_in_one_line(DataError, FAILED):
        from jinja2 import Environment

        tokens = [(kind, value) for _, kind, value in Environment().lex(source)]
    for kind, value in tokens:
        if kind == "operator" and value == "**":
            raise DataError(f"{FAILED}: it computes powers")
        # Over twenty digits are over the limit, whatever they are: their value need not be computed.
        if kind in ("integer", "float") and (len(value) > 20 or _number(value) > LARGEST_NUMBER):
            raise DataError(f"{FAILED}: it holds the number {value[:20]}, expected at most {LARGEST_NUMBER:,}")


def _number(text: str) -> float:
    """The value of a number in Jinja."""
    return float(text.replace("_", "")) if text[:2].lower() not in ("0x", "0o", "0b") else float(int(text, 0))
