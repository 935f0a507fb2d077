"""[data]: where the examples are, how they are read, who holds which."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from fedloom.records.quantities import MOST_CLIENTS, Name, Text
from fedloom.records.sections.section import Section

READ_COLUMNS: tuple[tuple[str, ...], ...] = (
    ("instruction", "output", "input"),
    ("prompt", "completion", "label"),
    ("messages",),
    ("instruction", "response", "context", "input"),
    ("question", "answer", "context", "input"),
    ("conversations",),
    ("chosen", "prompt", "rejected"),
    ("text",),
)
"""The columns that are read of a row, form by form (`model.examples.FORMS`)."""


def _checked_columns(columns: dict[str, str]) -> dict[str, str]:
    """Raises ValueError for names that no form reads, or no single one."""
    known = list(dict.fromkeys(name for form in READ_COLUMNS for name in form))
    for name in columns:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"expected names that fedloom reads, each with yours; {name!r} is none of them; {hint}")
    if columns and not any(columns.keys() <= set(form) for form in READ_COLUMNS):
        raise ValueError(
            f"expected the columns of one form of example; no form has {' and '.join(columns)} (docs/data.md has all)"
        )
    return columns


Columns: TypeAlias = Annotated[dict[Name, Text], Field(max_length=16), AfterValidator(_checked_columns)]
"""Name that fedloom reads → name of the column in the data."""


MOST_SOURCES = 64
"""Sources of one client: each is opened before anything else can be asked about it."""


class Source(Section):
    """One of a client's sources, with what `[data]` says otherwise for all of them."""

    source: Text
    subset: Text | None = None
    columns: Columns | None = None


def _listed(found: object) -> object:
    """A client's sources as a list of tables, whether they are a name, a table or a list of these."""
    several = found if isinstance(found, list | tuple) else [found]
    made = [{"source": one} if isinstance(one, str) else one for one in several]
    for one in made:
        if not isinstance(one, Source) and not (isinstance(one, Mapping) and isinstance(one.get("source"), str)):
            raise ValueError("expected a client's source, a table with source, subset and columns, or a list of these")
        unknown = sorted(one.keys() - Source.model_fields.keys()) if isinstance(one, Mapping) else []
        if unknown:
            raise ValueError(f"expected source, subset and columns alone, and not {unknown[0]!r}")
    return made


ClientSources: TypeAlias = Annotated[
    tuple[Source, ...],
    BeforeValidator(_listed),
    Field(strict=False, min_length=1, max_length=MOST_SOURCES),
]


def _checked_heldout(split: str | None) -> str | None:
    if split == "train":
        raise ValueError("expected a split that is not trained on: a score on train says nothing about new examples")
    return split


Unseen: TypeAlias = Annotated[Text | None, AfterValidator(_checked_heldout)]


class DataSettings(Section):
    """Where the examples are and who holds which."""

    source: Text = Field(
        "./data/{client}",
        description="Folder, file (JSONL, JSON, CSV, Parquet …) or Hub name; docs/data.md lists what is read. {client} "
        "stands for each client's name. A path that begins with ./ or ../ counts from the folder of this file.",
    )
    sources: Annotated[dict[Name, ClientSources], Field(min_length=1, max_length=MOST_CLIENTS)] | None = Field(
        None,
        description="In place of source: client → its own source, or several, where data lie in many places. One is a "
        "text as for source, or a table with source and its own subset and columns.",
        examples=[{"code": "owner/name"}],
    )
    subset: Text | None = Field(None, description="Configuration of a Hub data set that has several.", examples=["en"])
    columns: Columns = Field(
        {},
        description='Your names for the columns that are read, such as { instruction = "Frage", output = "Antwort" }; '
        "without them the usual names are recognised (docs/data.md).",
    )
    skip_bad_rows: bool = Field(
        False, description="Leave out rows that cannot be read, and say how many, where and why, in place of an error."
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
    heldout: Unseen = Field(
        None,
        description="Split that scores are taken on, such as heldout for heldout.jsonl in each client's folder.",
        examples=["heldout"],
    )
    validation: Unseen = Field(
        None, description="Split for choosing settings, never for scores.", examples=["validation"]
    )

    @model_validator(mode="before")
    @classmethod
    def _sources_instead(cls, found: object) -> object:
        """The default of source holds only where sources is not given."""
        if isinstance(found, dict) and found.get("sources") is not None:
            return {"source": "", **found}
        return found
