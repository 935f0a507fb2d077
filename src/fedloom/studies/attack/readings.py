"""What a curious server has read, as lines of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from rich import box
from rich.table import Table

from fedloom.report.numbers import human_bytes


@dataclass(frozen=True, slots=True)
class Reading:
    """One line: a variant, the rank of its adapters, how many examples an update rests on; means over sites.

    bytes: of the payload. text, chance: ROUGE-1 over tokens, from 0 to 1; labels: share of the answers' tokens that are
    named. membership: AUC of a turn as the settings have it.
    """

    variant: str
    rank: int
    optim: str
    examples: int
    bytes: float
    text: float
    chance: float
    labels: float
    membership: float


def as_json(readings: Sequence[Reading]) -> Mapping[str, object]:
    """The lines as JSON has them."""
    return {"rows": [asdict(one) for one in readings]}


def reading_tables(result: Mapping[str, object]) -> list[Table]:
    """The table on the terminal."""
    rows = result["rows"]
    assert isinstance(rows, list)
    table = Table(box=box.SIMPLE_HEAD, title="What a curious server reads", title_justify="left", title_style="bold")
    for name in ("method", "rank", "optimiser"):
        table.add_column(name)
    for name in ("examples", "payload", "text, ROUGE-1", "by chance", "labels", "membership, AUC"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["variant"],
            str(row["rank"]),
            row["optim"],
            str(row["examples"]),
            human_bytes(row["bytes"]),
            *(f"{100 * row[key]:.0f}" for key in ("text", "chance", "labels")),
            f"{row['membership']:.2f}",
        )
    return [table]
