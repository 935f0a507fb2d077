"""All examples of a run as the model sees them: clients' for training, held-out ones for scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from fedloom.model.examples import Example
from fedloom.model.limits import ModelLimits, check_readable
from fedloom.model.packing import pack_lengths
from fedloom.model.tokens import TokenizedExamples, tokenize
from fedloom.records.config import DataSettings

Texts = Mapping[str, Sequence[Example]]


def tokenize_clients(
    texts: Texts, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, limits: ModelLimits
) -> dict[str, TokenizedExamples]:
    """Client → its training examples, none where it has none here."""
    learnt, made = which_learnt(settings), {}
    for client, held in texts.items():
        name = f"client {client!r}"
        if not held:
            made[client] = TokenizedExamples((), 0)
            continue
        tokens = tokenize(held, tokenizer, settings.template, settings.max_length, name, learnt)
        fitting = check_readable(tokens, limits, name)
        made[client] = pack_examples(fitting, settings.max_length) if settings.packing else fitting
    return made


def tokenize_scored(
    split: str, texts: Texts, settings: DataSettings, tokenizer: PreTrainedTokenizerBase, limits: ModelLimits
) -> dict[str, TokenizedExamples]:
    """Domain → its examples of a split that scores are taken on. They are of the last answer, whatever is learnt."""
    made = {}
    for domain, held in texts.items():
        name = f"{split} set {domain!r}"
        tokens = tokenize(held, tokenizer, settings.template, settings.max_length, name)
        made[domain] = check_readable(tokens, limits, name)
    return made


def which_learnt(settings: DataSettings) -> str:
    """A key of `tokens.LEARNT`. As in TRL, assistant_only_loss has the last word."""
    if settings.assistant_only_loss:
        return "answers"
    return "answer" if settings.completion_only_loss else "everything"


def pack_examples(data: TokenizedExamples, max_length: int) -> TokenizedExamples:
    """The examples with the rows that training draws them in."""
    return replace(data, rows=pack_lengths([len(tokens.ids) for tokens in data.examples], max_length))


def rendering_notes(held: Mapping[str, TokenizedExamples], max_length: int) -> list[str]:
    """What the user should know of how examples were rendered and what of them was left out, each thing once.

    held: whose they are, in words → the examples.
    """
    left_out = [
        f"{name}: {data.cut} examples cut and {data.dropped} dropped at data.max_length = {max_length}"
        for name, data in held.items()
        if data.cut or data.dropped
    ]
    return [*dict.fromkeys(note for data in held.values() for note in data.notes), *left_out]
