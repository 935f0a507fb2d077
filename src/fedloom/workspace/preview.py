"""What a run would train on: every client's examples in tokens, with no weights loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from fedloom.model.base import empty_base, load_tokenizer
from fedloom.model.limits import model_limits
from fedloom.model.tokens import TokenizedExamples, Tokens
from fedloom.records.config import Config
from fedloom.workspace.data import describe_examples
from fedloom.workspace.tokenized import Texts, rendering_notes, tokenize_clients


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an example's text, as its tokens decode: learnt, or given."""

    text: str
    learnt: bool


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One example as the model sees it. tokens: the text of each id; labels: the id where it is learnt, else -100."""

    template: str
    text: tuple[Piece, ...]
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    labels: tuple[int, ...]
    cut: bool


@dataclass(frozen=True, slots=True)
class ClientPreview:
    """A client's examples in numbers, and the first of them.

    examples: all that are trained on, the cut ones included; dropped: those that have no room. mean_tokens, max_tokens,
    mean_learnt: of an example. rows: what batches are drawn from, fewer than the examples where those are packed.
    templates: name → examples that were rendered with it.
    """

    examples: int
    dropped: int
    cut: int
    mean_tokens: float
    max_tokens: int
    mean_learnt: float
    rows: int
    templates: Mapping[str, int]
    shown: tuple[ShownExample, ...]


@dataclass(frozen=True, slots=True)
class Preview:
    """Of a whole federation; `notes` are those that a run prints before its first round."""

    model: str
    max_length: int
    packing: bool
    clients: Mapping[str, ClientPreview]
    notes: tuple[str, ...]


def preview_examples(config: Config, texts: Texts, count: int, notes: Sequence[str] = ()) -> Preview:
    """`count` examples of every client in `texts`, in the order of the data. Raises what a run would raise.

    notes: what was said while they were read.
    """
    tokenizer = load_tokenizer(config.model.path)
    limits = model_limits(empty_base(config.model.path))
    made = tokenize_clients(texts, config.data, tokenizer, limits)
    shown = {name: _preview_client(data, tokenizer, count) for name, data in made.items()}
    held = {f"client {name}": data for name, data in made.items()}
    said = (*notes, *describe_examples(texts, {}), *rendering_notes(held, config.data.max_length))
    return Preview(config.model.path, config.data.max_length, config.data.packing, shown, said)


def _preview_client(data: TokenizedExamples, tokenizer: PreTrainedTokenizerBase, count: int) -> ClientPreview:
    lengths = [len(tokens.ids) for tokens in data.examples]
    learnt = sum(end - start for tokens in data.examples for start, end in tokens.spans)
    count_of_mean = max(len(data), 1)  # a partitioner may leave a client without examples
    return ClientPreview(
        examples=len(data),
        dropped=data.dropped,
        cut=data.cut,
        mean_tokens=sum(lengths) / count_of_mean,
        max_tokens=max(lengths, default=0),
        mean_learnt=learnt / count_of_mean,
        rows=data.num_rows,
        templates=dict(Counter(tokens.template for tokens in data.examples)),
        shown=tuple(_show(tokens, tokenizer) for tokens in data.examples[:count]),
    )


def _show(tokens: Tokens, tokenizer: PreTrainedTokenizerBase) -> ShownExample:
    ids = tuple(tokens.ids.tolist())
    borders = [0, *(place for span in tokens.spans for place in span), len(ids)]
    parts = [(ids[start:end], place % 2 == 1) for place, (start, end) in enumerate(pairwise(borders))]
    return ShownExample(
        template=tokens.template,
        text=tuple(Piece(_decode(tokenizer, part), learnt) for part, learnt in parts if part),
        ids=ids,
        tokens=tuple(_text_of(tokenizer, token) for token in ids),
        labels=tuple(tokens.labels().tolist()),
        cut=not tokens.whole,
    )


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """The text of one token. Part of a character has none; it is told as the vocabulary has it."""
    text, entry = _decode(tokenizer, [token]), str(tokenizer.convert_ids_to_tokens(token))
    if "\N{REPLACEMENT CHARACTER}" in text:
        return entry
    # SentencePiece writes a space as U+2581, and its decoder leaves out the first one of a text.
    return f" {text}" if entry.startswith("\u2581") and not text.startswith(" ") else text
