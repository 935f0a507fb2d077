"""Answers in text: those that a model generates to held-out prompts, and those that were wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fedloom.errors import ModelError
from fedloom.model.foreign import raise_in_one_line
from fedloom.model.tokens import TokenizedExamples, Tokens


def reference_texts(tokenizer: PreTrainedTokenizerBase, data: TokenizedExamples) -> tuple[str, ...]:
    """The wanted answers as they are scored: what the tokens say, special ones left out."""
    return tuple(to_text(tokenizer, tokens.ids[tokens.prompt :]) for tokens in data.examples)


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: TokenizedExamples,
    max_new_tokens: int,
    batch_size: int = 64,
) -> list[str]:
    """The likeliest token at every place, until the model ends its answer or has given so many tokens.

    Shorter prompts are padded on the left. An answer never runs over the model's last position. Raises ModelError where
    the model cannot generate.
    """
    wrapped = getattr(model, "get_base_model", None)
    # PEFT's wrapper would hand its own copy of the settings of generation down.
    causal = cast(PreTrainedModel, wrapped() if wrapped else model)
    training = causal.training
    causal.eval()  # type: ignore[no-untyped-call]
    order = sorted(range(len(data)), key=lambda index: data[index].prompt)
    answers = [""] * len(data)
    failed = "the model cannot generate answers, which evaluation.metrics asks for"
    try:
        with raise_in_one_line(ModelError, failed), _plain_generation(causal):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                given = _continue(causal, tokenizer, [data[index] for index in chosen], data.pad, max_new_tokens)
                for index, ids in zip(chosen, given, strict=True):
                    answers[index] = to_text(tokenizer, ids)
    finally:
        causal.train(training)
    return answers


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: list[Tokens], pad: int, most: int
) -> Tensor:
    """The ids that follow each prompt, (examples, new tokens)."""
    longest = max(tokens.prompt for tokens in examples)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = min(most, positions - longest) if isinstance(positions, int) else most
    if room < 1:
        return torch.zeros(len(examples), 0, dtype=torch.int64)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(examples):
        ids[row, longest - tokens.prompt :] = tokens.ids[: tokens.prompt]
        mask[row, longest - tokens.prompt :] = 1
    end = cast(int, tokenizer.eos_token_id)
    settings = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, num_beams=1, max_new_tokens=room, pad_token_id=pad, eos_token_id=end
    )
    device = next(model.parameters()).device
    made = model.generate(  # type: ignore[operator]
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
    )
    after = cast(Tensor, made)[:, longest:].cpu()
    # Where the pad token is another than the end, everything behind the end is padding; where it is the same, too.
    behind = (after == end).int().cumsum(dim=1) > 0
    return after.masked_fill(behind, end)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """A model may bring habits of generation, such as a penalty on repetitions; the score is of the model itself."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


def to_text(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> str:
    """What tokens say, special ones left out."""
    # Cleaning up would take spaces out before punctuation, which the text may really have.
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
