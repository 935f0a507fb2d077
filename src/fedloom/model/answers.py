"""What a model answers to a few held-out examples, for people to read; scores are taken elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from fedloom.model.base import quiet_transformers
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


@torch.no_grad()
def answer_examples(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, heldout: Mapping[str, TokenizedExamples], number: int
) -> list[Answered]:
    """Greedy answers to the first examples of the domains in turn, `number` in all.

    An answer ends with the length of the one that is expected, which scoring has shown to fit the model. A model that
    cannot generate gives none: what is only shown must not end a run.
    """
    turns = zip_longest(*([(domain, tokens) for tokens in data.examples] for domain, data in heldout.items()))
    chosen = list(islice((one for turn in turns for one in turn if one is not None), number))
    training = model.training
    model.eval()
    try:
        with quiet_transformers():
            return [_answer(model, tokenizer, domain, tokens) for domain, tokens in chosen]
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return []
    finally:
        model.train(training)


def _answer(model: nn.Module, tokenizer: PreTrainedTokenizerBase, domain: str, tokens: Tokens) -> Answered:
    ids = tokens.ids.long()
    prompt, expected = ids[: tokens.prompt], ids[tokens.prompt :][:LONGEST]
    given = prompt[None].to(next(model.parameters()).device)
    made: Tensor = cast(Any, model).generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=len(expected),
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    texts = [
        str(tokenizer.decode(part, skip_special_tokens=True)) for part in (prompt, expected, made[0, len(prompt) :])
    ]
    return Answered(domain, texts[0][-SHOWN:], texts[1][:SHOWN], texts[2][:SHOWN])
