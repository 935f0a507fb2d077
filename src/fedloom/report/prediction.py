"""What a run was expected to send, as its folder has it, beside what its ledger says that it sent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError
from rich import box
from rich.table import Table

from fedloom.errors import CheckpointError
from fedloom.records.ledger import Aggregation, Relay, Row, RunRow, Transfer, read_rows
from fedloom.records.session import FORBID
from fedloom.records.text import cell
from fedloom.report.baseline import is_delivery
from fedloom.report.facts import human_seconds
from fedloom.report.numbers import human_bytes

FILE = "prediction.json"
"""In a run's folder. It is written before the first round, or by `fedloom estimate RUN`."""
FIRM = 0.1
"""A spread up to it is how values are coded; beyond it another number of them is sent."""
Unit = Literal["bytes", "seconds"]
Size = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, slots=True)
class RunPrediction:
    """Bytes of a run, as its settings and its model's shapes foretell them.

    up, down: of each round's turns, from round 1 on, over all clients, with what they missed. delivery: of the result
    to everybody. relayed: between regional servers and the root, in all. server_cpu_s: seconds of processor time of the
    server's turn in a round; None where they were not taken. spread: by which share two kinds of made-up updates differ
    in the run's bytes: near 0 where these are known ahead, more where training decides what is sent.
    """

    __pydantic_config__ = FORBID
    method: str
    up: Annotated[tuple[Size, ...], Field(strict=False)]
    down: Annotated[tuple[Size, ...], Field(strict=False)]
    delivery: Size
    relayed: Size = 0
    server_cpu_s: float | None = None
    spread: float = 0.0

    @property
    def bytes(self) -> int:
        """Of the whole run, on the clients' lines."""
        return sum(self.up) + sum(self.down) + self.delivery

    @property
    def is_firm(self) -> bool:
        """Whether the bytes are known ahead, whatever is trained."""
        return self.spread <= FIRM

    @property
    def remark(self) -> str:
        """What to know of the prediction, in words; empty where the bytes are known ahead."""
        if self.is_firm:
            return ""
        return (
            f"what {self.method} sends follows from the training: two kinds of made-up updates differ by "
            f"{100 * self.spread:.0f} % in bytes, so that this is a guide and no more"
        )


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """One quantity: what was predicted and what was measured, up to the last round that was played."""

    what: str
    predicted: float
    measured: float
    unit: Unit = "bytes"

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where nothing was predicted."""
        return self.measured / self.predicted if self.predicted else None


_READER = TypeAdapter(RunPrediction)


def write_prediction(folder: Path, told: RunPrediction) -> None:
    """Keep it in a run's folder."""
    (folder / FILE).write_text(json.dumps(asdict(told), indent=1) + "\n", encoding="utf-8")


def read_prediction(folder: Path) -> RunPrediction | None:
    """What a run's folder keeps; None where it keeps none. Raises CheckpointError for another kind of file."""
    path = folder / FILE
    try:
        return _READER.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise CheckpointError(
            f"{path} is not what fedloom wrote: {where}: {first['msg']}; `fedloom estimate {folder}` writes it anew"
        ) from None


def compare_prediction(folder: Path, rows: Sequence[Row] | None = None) -> list[ComparedRow]:
    """Predicted and measured, of the rounds that were played; none where the folder keeps no prediction.

    rows: of the run's ledger, which is read if left out.
    """
    told = read_prediction(folder)
    if told is None:
        return []
    return compare_rows(told, read_rows(folder / "ledger.jsonl") if rows is None else rows)


def compare_rows(told: RunPrediction, rows: Sequence[Row]) -> list[ComparedRow]:
    """The same from a prediction and a ledger's rows."""
    run = next((row for row in reversed(rows) if isinstance(row, RunRow)), None)
    turns = [row for row in rows if isinstance(row, Aggregation)]
    over = max((row.round for row in turns), default=0)
    if run is None or not over:
        return []
    up = down = delivery = 0
    for row in rows:
        if not isinstance(row, Transfer) or row.undone:
            continue
        if row.direction == "up":
            up += row.bytes if row.round <= over else 0
        elif is_delivery(row, run.num_rounds, over):
            delivery += row.bytes
        elif row.round <= over:
            down += row.bytes
    foretold = sum(told.up[:over]), sum(told.down[:over])
    found = [
        ComparedRow("up, from clients", foretold[0], up),
        ComparedRow("down, in turns", foretold[1], down),
    ]
    if delivery:
        found.append(ComparedRow("down, the result", told.delivery, delivery))
        found.append(ComparedRow("the run", sum(foretold) + told.delivery, up + down + delivery))
    if told.relayed and delivery:
        relayed = sum(row.bytes for row in rows if isinstance(row, Relay))
        found.append(ComparedRow("between regions and root", told.relayed, relayed))
    if told.server_cpu_s is not None:
        measured = sum(row.seconds for row in turns) / len(turns)
        found.append(ComparedRow("the server's turn, CPU and clock", told.server_cpu_s, measured, "seconds"))
    return found


def prediction_table(told: RunPrediction, rows: Iterable[ComparedRow]) -> Table:
    """The comparison for a terminal."""
    show = {"bytes": human_bytes, "seconds": human_seconds}
    table = Table(
        box=box.SIMPLE_HEAD,
        title="Predicted and measured",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
    )
    table.caption = cell(told.remark) if told.remark else None
    table.add_column("")
    for name in ("predicted", "measured", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.what, show[row.unit](row.predicted), show[row.unit](row.measured), ratio)
    return table
