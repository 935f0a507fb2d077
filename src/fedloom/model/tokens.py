"""A client's examples as tokens, made once and used in every round, for training and scoring alike.

Prompt and completion are tokenised apart and joined, so that the boundary lies where it lies when the model
answers a prompt. Every completion ends with the end-of-sequence token. Only completion tokens are learnt and scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fedloom.errors import ConfigError, DataError
from fedloom.model.examples import Example
from fedloom.model.foreign import raise_in_one_line
from fedloom.model.templates import TEMPLATES

IGNORED = -100
"""The label of a token that does not count."""


@dataclass(frozen=True, eq=False, slots=True)
class Tokens:
    """One example: int32 token ids, of which the first `prompt` are the prompt's; `whole` if nothing was cut off."""

    ids: Tensor
    prompt: int
    whole: bool


@dataclass(frozen=True, eq=False, slots=True)
class TokenizedExamples(Dataset[Tokens]):
    """A client's examples in tokens.

    cut: how many had the end of their completion cut off; dropped: how many had no room for any of it. Both were
    longer than max_length.
    """

    examples: tuple[Tokens, ...]
    pad: int
    cut: int = 0
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Tokens:
        return self.examples[index]

    def collate(self, batch: Sequence[Tokens]) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels, int64, (examples, longest), padded on the right."""
        longest = max(len(tokens.ids) for tokens in batch)
        input_ids = torch.full((len(batch), longest), self.pad)
        mask = torch.zeros(len(batch), longest, dtype=torch.int64)
        labels = torch.full((len(batch), longest), IGNORED)
        for row, tokens in enumerate(batch):
            length = len(tokens.ids)
            input_ids[row, :length] = tokens.ids
            mask[row, :length] = 1
            labels[row, tokens.prompt : length] = tokens.ids[tokens.prompt :]
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def tokenize(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, template: str, max_length: int, name: str = "data"
) -> TokenizedExamples:
    """Tokenise the examples of `name` (a client, say), which errors mention.

    Raises ConfigError for an unknown template, DataError if there is no example, or none with room for its completion.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"data.template {template!r} is unknown: expected {', '.join(TEMPLATES)}")
    if not examples:
        raise DataError(f"{name} has no examples")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not isinstance(end, int):
        raise DataError(f"{name}: the tokenizer has no end-of-sequence token, so that an answer could not end")
    try:
        texts = [TEMPLATES[template].text(example, tokenizer) for example in examples]
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    special = TEMPLATES[template].adds_special
    with raise_in_one_line(DataError, f"{name}: the tokenizer fails"):
        prompts = tokenizer([prompt for prompt, _ in texts], add_special_tokens=special, verbose=False)["input_ids"]
        answers = tokenizer([answer for _, answer in texts], add_special_tokens=False, verbose=False)["input_ids"]
    made = []
    for prompt, answer in zip(prompts, answers, strict=True):
        start = prompt or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end]
        ids = [*start, *answer, end]
        if len(start) < max_length:
            made.append(Tokens(torch.tensor(ids[:max_length], dtype=torch.int32), len(start), len(ids) <= max_length))
    if not made:
        shortest = min(len(prompt) for prompt in prompts)
        raise DataError(
            f"{name}: no example has room for its completion, the shortest prompt is {shortest} tokens long; "
            f"raise data.max_length (now {max_length})"
        )
    cut = sum(not tokens.whole for tokens in made)
    return TokenizedExamples(tuple(made), pad if isinstance(pad, int) else end, cut, len(texts) - len(made))
