"""Several short examples in one row of a batch, so that little of it is padding: TRL's `packing`.

Every example keeps its own positions, from 0, and sees itself alone: transformers makes masks of blocks from
`position_ids` where it is given no attention mask. Losses and gradients are those of the examples one a row. Not every
model does so, and a recurrent one cannot; `check_packs` tries it on the model itself.

Without it, too, examples of one batch share rows where that spares padding (`share_rows`): the batch is the same one,
and takes less work.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fedloom.errors import ConfigError
from fedloom.model.tokens import IGNORED, TokenizedExamples, Tokens

if TYPE_CHECKING:
    import peft
    from transformers import PreTrainedModel

Row: TypeAlias = tuple[Tokens, ...]

PROBE_TOKENS = 24
"""In each of the two examples that try out a model."""
MOST_SEEN = {True: 1e-4, False: 1e-2}
"""Float32? → change of an example's logits by what stands before it in its row, over their spread, that is rounding.

Both rows have the same shape, so that most models change no bit. Those with experts group their tokens otherwise. The
recurrent ones that were tried change by 5e-3 to 4, even with random weights.
"""
MOST_MOVED = {True: 1e-4, False: 5e-2}
"""The same by being in a row at all: kernels round otherwise for another shape."""
SPARED = 1 / 8
"""Share of a batch's rows that has to be spared by sharing: masks of blocks take time, too."""
_KNOWN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Base model → whether examples may share its rows, once it was tried."""
REFUSED = (
    "data.packing = true does not work with this model, in which an example would see those before it in its row; "
    "set it to false"
)


@dataclass(frozen=True, eq=False, slots=True)
class PackedRows(Dataset[Row]):
    """The rows that training draws from. Each holds whole examples."""

    rows: tuple[Row, ...]
    pad: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def collate(self, batch: Sequence[Row]) -> dict[str, Tensor]:
        """`collate_packed` with the padding of these rows."""
        return collate_packed(batch, self.pad)


def collate_packed(batch: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels and position_ids, int64, (rows, longest), padded on the right.

    attention_mask tells padding from tokens. A model is to be given `position_ids` in its place: see `without_mask`.
    Positions start anew with every example, and at every token of padding.
    """
    longest = max(sum(len(tokens.ids) for tokens in row) for row in batch)
    shape = (len(batch), longest)
    input_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORED)
    mask, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    for place, row in enumerate(batch):
        start = 0
        for tokens in row:
            end = start + len(tokens.ids)
            input_ids[place, start:end] = tokens.ids
            labels[place, start:end] = tokens.labels()
            positions[place, start:end] = torch.arange(end - start)
            start = end
        mask[place, :start] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


def share_rows(data: TokenizedExamples, batch: Sequence[Tokens]) -> dict[str, Tensor]:
    """The batch of these examples in as few rows of the longest one's length as serve, where that spares enough rows.

    Elsewhere it is `data.collate(batch)`.
    """
    lengths = [len(tokens.ids) for tokens in batch]
    rows = pack_lengths(lengths, max(lengths))
    if len(rows) > (1 - SPARED) * len(batch):
        return data.collate(batch)
    return collate_packed([tuple(batch[place] for place in row) for row in rows], data.pad)


def collator(
    model: peft.PeftModel, rows: TokenizedExamples | PackedRows
) -> Callable[[Sequence[Any]], dict[str, Tensor]]:
    """What makes a batch of some of these `training_rows`, for this model."""
    if isinstance(rows, PackedRows):
        return rows.collate
    return partial(share_rows, rows) if may_share(cast("PreTrainedModel", model.get_base_model())) else rows.collate


def may_share(base: PreTrainedModel) -> bool:
    """Whether examples may share the rows of a batch: whether the model keeps them apart.

    It is tried once. Ask before an adapter changes the model, so that the answer is the same whenever a run begins.
    """
    if base not in _KNOWN:
        try:
            check_packs(base, int(base.config.get_text_config().vocab_size))
            _KNOWN[base] = True
        except Exception:  # a model stumbles over what it does not know in its own way: it has the examples one a row
            _KNOWN[base] = False
    return _KNOWN[base]


def without_mask(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch as a model takes it: of packed rows without the attention mask, which would stand for one text a row."""
    return {name: value for name, value in inputs.items() if name != "attention_mask" or "position_ids" not in inputs}


def training_rows(data: TokenizedExamples) -> TokenizedExamples | PackedRows:
    """What training draws its batches from: the examples, or the rows that they were packed into."""
    if not data.rows:
        return data
    return PackedRows(tuple(tuple(data[index] for index in row) for row in data.rows), data.pad)


def pack_lengths(lengths: Sequence[int], limit: int) -> tuple[tuple[int, ...], ...]:
    """Which examples share a row of at most `limit` tokens, as indices.

    Best fit decreasing (TRL's "bfd"): the longest first, each into the fullest row that has room. The same lengths give
    the same rows; none is longer than `limit`, unless an example is.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens that fit in, row), in order
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        place = bisect_left(room, (lengths[index], -1))
        if place == len(room):
            free, row = limit, len(rows)
            rows.append([])
        else:
            free, row = room.pop(place)
        rows[row].append(index)
        insort(room, (free - lengths[index], row))
    return tuple(map(tuple, rows))


@torch.no_grad()
def check_packs(model: nn.Module, vocabulary: int) -> None:
    """Raise ConfigError for a model in which an example in a packed row sees the one before it.

    A made-up example goes through the model behind two others, one a row, and alone: its logits have to be the same.
    """
    device, training = next(model.parameters()).device, model.training
    ids = torch.randint(vocabulary, (2, 2 * PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(device)
    ids[:, PROBE_TOKENS:] = ids[0, PROBE_TOKENS:]
    places = torch.arange(PROBE_TOKENS, device=device)[None]
    twice = torch.cat([places, places], dim=1).expand(2, -1)
    model.eval()
    try:
        packed = model(input_ids=ids, position_ids=twice, use_cache=False).logits[:, PROBE_TOKENS:].float()
        alone = model(input_ids=ids[:1, PROBE_TOKENS:], position_ids=places, use_cache=False).logits[0]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{REFUSED} (it takes no position_ids: {str(error).splitlines()[0]})") from None
    finally:
        model.train(training)
    spread, exact = alone.float().std(), alone.dtype in (torch.float32, torch.float64)
    behind = (packed[0] - packed[1]).abs().max() / spread
    moved = (packed[0] - alone.float()).abs().max() / spread
    if not (behind <= MOST_SEEN[exact] and moved <= MOST_MOVED[exact]):
        change = float(torch.maximum(behind, moved))
        raise ConfigError(f"{REFUSED} (the answers' logits change by {change:.1g} of their spread)")
