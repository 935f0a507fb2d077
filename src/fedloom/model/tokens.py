"""A client's examples as tokens, made once and used in every round, for training and scoring alike.

Prompt and completion are tokenised apart and joined, so that the boundary lies where it lies when the model
answers a prompt; what the tokenizer would append to a prompt is left off there. Every completion ends with the
end-of-sequence token. Which tokens are learnt, each example says; scores are taken on the last answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fedloom.errors import DataError
from fedloom.model.chat import Spans
from fedloom.model.examples import Example
from fedloom.model.foreign import raise_in_one_line
from fedloom.model.templates import TEMPLATES, choose_template, note_on_template

IGNORED = -100
"""The label of a token that does not count."""
PROBES = ("a", "A", "0", ".")
"""Texts that show what a tokenizer adds to a text; the first that it knows is taken."""


@dataclass(frozen=True, eq=False, slots=True)
class Tokens:
    """One example: int32 token ids, of which the first `prompt` stand before the last answer.

    whole: whether nothing was cut off. learnt: (start, end) of what is learnt; all after the prompt, unless given.
    template: the name of the template that it was rendered with.
    """

    ids: Tensor
    prompt: int
    whole: bool
    learnt: Spans | None = None
    template: str = ""

    @property
    def spans(self) -> Spans:
        """(start, end) of the tokens that are learnt, in order; never the first, which nothing predicts."""
        return ((self.prompt, len(self.ids)),) if self.learnt is None else self.learnt

    def labels(self) -> Tensor:
        """int64, (tokens,): the token where it is learnt, else IGNORED."""
        made = torch.full((len(self.ids),), IGNORED)
        for start, end in self.spans:
            made[start:end] = self.ids[start:end]
        return made


@dataclass(frozen=True, eq=False, slots=True)
class TokenizedExamples(Dataset[Tokens]):
    """A client's examples in tokens.

    cut: how many had the end of their completion cut off; dropped: how many had no room for any of it. Both were
    longer than max_length. rows: the indices of the examples that share a row in training, if they are packed
    (`packing`). notes: what the user should know of how they were rendered.
    """

    examples: tuple[Tokens, ...]
    pad: int
    cut: int = 0
    dropped: int = 0
    rows: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Tokens:
        return self.examples[index]

    @property
    def num_rows(self) -> int:
        """What training draws batches from: packed rows, or the examples themselves."""
        return len(self.rows) or len(self.examples)

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
            labels[row, :length] = tokens.labels()
        return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True, slots=True)
class _Row:
    """An example as token ids before it is cut: `answers` are the tokens of earlier answers in the prompt."""

    prompt: list[int]
    answer: list[int]
    answers: Spans
    template: str


def _last_answer(row: _Row) -> Spans:
    return ((len(row.prompt), len(row.prompt) + len(row.answer)),)


def _every_answer(row: _Row) -> Spans:
    return (*row.answers, *_last_answer(row))


def _everything(row: _Row) -> Spans:
    return ((0, len(row.prompt) + len(row.answer)),)


LEARNT: Mapping[str, Callable[[_Row], Spans]] = {
    "answer": _last_answer,
    "answers": _every_answer,
    "everything": _everything,
}
"""What is learnt of an example: its last answer, every answer in it, or the prompt too."""


def tokenize(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    name: str = "data",
    learnt: str = "answer",
) -> TokenizedExamples:
    """Tokenise the examples of `name` (a client, say), which errors mention. learnt: a key of LEARNT.

    Raises ConfigError for an unknown template, DataError if there is no example, or none with room for its completion.
    """
    choose_template(template, "", tokenizer)
    if not examples:
        raise DataError(f"{name} has no examples")
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if not isinstance(end, int):
        raise DataError(f"{name}: the tokenizer has no end-of-sequence token, so that an answer could not end")
    try:
        rows = _rows(examples, tokenizer, template, learnt == "answers")
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    cropped = [_crop(row, LEARNT[learnt](row), max_length) for row in rows]
    made = tuple(tokens for tokens in cropped if tokens is not None)
    if not made:
        shortest = min(len(row.prompt) for row in rows)
        raise DataError(
            f"{name}: no example has room for its completion, the shortest prompt is {shortest} tokens long; "
            f"raise data.max_length (now {max_length})"
        )
    note = note_on_template(template, {example.form for example in examples}, tokenizer)
    return TokenizedExamples(
        made,
        pad if isinstance(pad, int) else end,
        cut=sum(not tokens.whole for tokens in made),
        dropped=len(rows) - len(made),
        notes=(note,) if note else (),
    )


def _rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, setting: str, earlier: bool) -> list[_Row]:
    """The examples as token ids; `earlier`: with the places of earlier answers."""
    names = [choose_template(setting, example.form, tokenizer) for example in examples]
    pairs = list(zip(names, examples, strict=True))
    texts = [TEMPLATES[name].text(example, tokenizer) for name, example in pairs]
    places = [TEMPLATES[name].answers(example, tokenizer) if earlier else () for name, example in pairs]
    with raise_in_one_line(DataError, "the tokenizer fails"):
        before = _put_before(tokenizer)
        prompts = _ids(tokenizer, [prompt for prompt, _ in texts])
        answers = _ids(tokenizer, [answer for _, answer in texts])
        rows = []
        for name, (text, _), spans, prompt, answer in zip(names, texts, places, prompts, answers, strict=True):
            start = [*before, *prompt] if TEMPLATES[name].adds_special else prompt
            shift = len(start) - len(prompt)
            found = tuple((first + shift, last + shift) for first, last in _spans_of(tokenizer, text, prompt, spans))
            rows.append(_Row(start or _start_of_nothing(tokenizer), [*answer, _end(tokenizer)], found, name))
    return rows


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = False) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    return ids


def _put_before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts before a text, its start token usually.

    Those that it puts behind one are left off: an end token (add_eos_token, or a post-processor that adds it) between
    prompt and answer would be seen in training and at no other time.
    """
    bare = _ids(tokenizer, list(PROBES))
    whole = _ids(tokenizer, list(PROBES), special=True)
    for alone, added in zip(bare, whole, strict=True):
        for start in range(len(added) - len(alone) + 1) if alone else ():
            if added[start : start + len(alone)] == alone:
                return added[:start]
    return []


def _spans_of(tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], spans: Spans) -> Spans:
    """Spans of characters as spans of tokens. A token that lies across a border belongs to the later part."""
    places = sorted({place for span in spans for place in span})
    heads = _ids(tokenizer, [text[:place] for place in places]) if places else []
    token = {place: _common(head, ids) for place, head in zip(places, heads, strict=True)}
    return tuple((token[start], token[end]) for start, end in spans)


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens they begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _crop(row: _Row, learnt: Spans, max_length: int) -> Tokens | None:
    """The first `max_length` tokens; None where nothing that is learnt is among them."""
    ids = [*row.prompt, *row.answer]
    spans = tuple((max(start, 1), min(end, max_length)) for start, end in learnt)
    kept = tuple((start, end) for start, end in spans if start < end)
    if not kept:
        return None
    whole, prompt = len(ids) <= max_length, min(len(row.prompt), max_length)
    return Tokens(torch.tensor(ids[:max_length], dtype=torch.int32), prompt, whole, kept, row.template)


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the end-of-sequence token, which `tokenize` has looked for."""
    return int(tokenizer.eos_token_id)


def _start_of_nothing(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What an empty prompt begins with, since a model needs a token to start from."""
    start = tokenizer.bos_token_id
    return [start if isinstance(start, int) else _end(tokenizer)]
