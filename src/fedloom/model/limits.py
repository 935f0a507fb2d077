"""Whether a model can read the tokens that a tokenizer made: as many rows in its embedding, as many positions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from fedloom.errors import ConfigError, ModelError
from fedloom.model.tokens import TokenizedExamples

POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
"""Keys of config.json that say for how many positions a model was made."""
SPARE_ROWS = 2
"""Rows that a table of positions may have besides; OPT keeps two, BERT's kin as many for padding."""


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """rows: of the input embedding, one a token. positions: for which the model was made; None where it does not say.

    fixed: whether it has a table of that many positions, so that it cannot read more.
    """

    rows: int
    positions: int | None
    fixed: bool


def model_limits(model: PreTrainedModel) -> ModelLimits:
    """What a model can read; weights are not looked at."""
    config = model.config.get_text_config()
    found = (getattr(config, key, None) for key in POSITION_KEYS)
    positions = next((value for value in found if isinstance(value, int) and value > 0), None)
    embedding = model.get_input_embeddings()
    tables = positions is not None and any(
        positions <= rows <= positions + SPARE_ROWS for rows in _table_rows(model, embedding)
    )
    # MPT's slopes are laid out for max_seq_len positions at once.
    return ModelLimits(_rows(embedding), positions, tables or config.model_type == "mpt")


def _rows(embedding: nn.Module) -> int:
    count, weight = getattr(embedding, "num_embeddings", None), embedding.weight
    assert isinstance(weight, Tensor)
    return count if isinstance(count, int) else int(weight.shape[0])


def _table_rows(model: nn.Module, embedding: nn.Module) -> Iterator[int]:
    """Rows of every table of positions: embeddings beside that of tokens, and fixed sinusoids (GPT-J, CodeGen)."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not embedding:
            yield module.num_embeddings
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] == "embed_positions":
            yield buffer.shape[0]


def check_readable(data: TokenizedExamples, limits: ModelLimits, name: str) -> TokenizedExamples:
    """The examples of `name`, padded with a token that the model has, and with a note where they are very long.

    Raises ModelError where the tokenizer is larger than the model, ConfigError where an example has more tokens than
    the model has positions.
    """
    if not data.examples:
        return data
    largest = max(int(tokens.ids.max()) for tokens in data.examples)
    if largest >= limits.rows:
        raise ModelError(
            f"{name}: the tokenizer gives token {largest}, but the model's embedding has {limits.rows} rows, for "
            f"tokens 0 to {limits.rows - 1}: take the tokenizer that belongs to the model, or resize the model's "
            "embedding and train it before (fedloom does neither)"
        )
    # Padding is seen by nobody and learnt by nobody, so any token will do; many tokenizers have a pad token added.
    fitting = data if data.pad < limits.rows else replace(data, pad=0)
    longest = max(len(tokens.ids) for tokens in data.examples)
    if limits.positions is None or longest <= limits.positions:
        return fitting
    if limits.fixed:
        raise ConfigError(
            f"{name} has an example of {longest} tokens, but the model has {limits.positions} positions: set "
            f"data.max_length to {limits.positions} or less"
        )
    note = (
        f"some examples are longer than the {limits.positions} positions that the model was made for; "
        f"data.max_length = {limits.positions} would keep within them"
    )
    return replace(fitting, notes=(*fitting.notes, note))
