"""[data]: where the examples are, how they are read, who holds which."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedloom.records.quantities import Name, Text
from fedloom.records.sections.section import Section


class DataSettings(Section):
    """Where the examples are and who holds which."""

    source: Text = Field(
        "./data/{client}",
        description="Folder, JSONL or Parquet file, or Hub name. {client} stands for each client's name. A path that "
        "begins with ./ or ../ counts from the folder of this file.",
    )
    template: Name = Field(
        "auto",
        description="How an example becomes a prompt and a completion: alpaca, chat (the tokenizer's own), turns, "
        "plain or raw; auto takes chat for messages (turns, where the tokenizer has no chat template), raw for text, "
        "else alpaca (docs/rendering.md).",
    )
    max_length: int = Field(512, ge=8, le=2**20, description="Tokens of an example, at most; longer ones are cut.")
    completion_only_loss: bool = Field(
        True, description="Learn the completion alone; with false the prompt is learnt too."
    )
    assistant_only_loss: bool = Field(
        False, description="Learn every turn of the assistant in a conversation, and no other; else its last one."
    )
    packing: bool = Field(
        False,
        description="Put several short examples into one row of a batch, max_length tokens at most; they do not see "
        "each other.",
    )
    partitioner: Literal["files", "iid", "dirichlet", "shards", "natural"] = Field(
        "files",
        description="Who holds which examples: one file or folder a client, or one source that is shuffled and split: "
        "evenly (iid), skewed by label (dirichlet), few labels each (shards), or by id (natural).",
    )
    dirichlet_alpha: float = Field(0.5, gt=0, description="Skew of the dirichlet partitioner; smaller is more skewed.")
    label_column: Text | None = Field(
        None, description="Column that dirichlet and shards split by.", examples=["topic"]
    )
    id_column: Text | None = Field(None, description="Column whose values are the natural clients.", examples=["site"])
    heldout: Text | None = Field(
        None,
        description="Split that scores are taken on, such as heldout for heldout.jsonl in each client's folder.",
        examples=["heldout"],
    )
    validation: Text | None = Field(
        None, description="Split for choosing settings, never for scores.", examples=["validation"]
    )
