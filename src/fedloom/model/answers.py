"""What a model answers to a few held-out examples, for people to read; scores are taken elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice, zip_longest

from torch import nn
from transformers import PreTrainedTokenizerBase

from fedloom.errors import ModelError
from fedloom.model.base import quiet_transformers
from fedloom.model.generation import generate_answers, to_text
from fedloom.model.tokens import TokenizedExamples, Tokens

LONGEST = 64
"""Tokens of an answer, at most: enough to see what changed, and soon made on a CPU."""
SHOWN = 300
"""Characters of a prompt's end, and of an answer, that are kept."""


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out example: the end of its prompt, the answer that was expected and the one that was given."""

    domain: str
    prompt: str
    expected: str
    text: str


def answer_examples(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, heldout: Mapping[str, TokenizedExamples], number: int
) -> list[Answered]:
    """Greedy answers to the first examples of the domains in turn, `number` in all.

    An answer ends with the length of the one that is expected, which scoring has shown to fit the model. A model that
    cannot generate gives none: what is only shown must not end a run.
    """
    turns = zip_longest(*([(domain, tokens) for tokens in data.examples] for domain, data in heldout.items()))
    chosen = islice((one for turn in turns for one in turn if one is not None), number)
    try:
        with quiet_transformers():
            return [_answer(model, tokenizer, domain, heldout[domain], tokens) for domain, tokens in chosen]
    except ModelError:
        return []


def _answer(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, domain: str, data: TokenizedExamples, tokens: Tokens
) -> Answered:
    expected = tokens.ids[tokens.prompt :][:LONGEST]
    alone = replace(data, examples=(tokens,), rows=())
    given = generate_answers(model, tokenizer, alone, max_new_tokens=len(expected))[0]
    prompt = to_text(tokenizer, tokens.ids[: tokens.prompt])
    return Answered(domain, prompt[-SHOWN:], to_text(tokenizer, expected)[:SHOWN], given[:SHOWN])
