"""What happened in a run, one JSON object a line: every payload, every client's training, every score.

Rows are only ever appended, and are on disk after each round. The one size recorded is len(payload). Seconds are
recorded beside the facts but are not part of `Totals`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError

from fedloom.errors import CheckpointError
from fedloom.records.rows import (
    ROWS,
    About,
    Aggregation,
    Choice,
    Direction,
    Evaluation,
    Layers,
    ModuleGroup,
    Note,
    Presence,
    Relay,
    Roll,
    Row,
    RunRow,
    Training,
    Transfer,
    Validation,
)
from fedloom.records.text import LONG, escape_json, file_name, to_printable

__all__ = [
    "About",
    "Aggregation",
    "Choice",
    "Direction",
    "Evaluation",
    "Layers",
    "Ledger",
    "ModuleGroup",
    "Note",
    "Presence",
    "Relay",
    "Roll",
    "Row",
    "RunRow",
    "Totals",
    "Training",
    "Transfer",
    "Validation",
    "dump_row",
    "payload_name",
    "read_rows",
    "totals",
]


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums of bytes. Keys: client, round, part of the payload.

    Equal for a resumed and an undisturbed run of the local engine. Across machines, what had left counts in any case.
    All of these are of the clients' lines. by_region: region → bytes up and down between it and the root, besides.
    """

    transfers: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    by_client: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    by_round: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    by_part: Mapping[str, int] = field(default_factory=dict)
    by_region: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Both ways."""
        return self.bytes_up + self.bytes_down

    @property
    def by_level(self) -> Mapping[str, tuple[int, int]]:
        """Bytes up and down of each level: clients to their server, and regional servers to the root."""
        up, down = (sum(sizes[way] for sizes in self.by_region.values()) for way in (0, 1))
        return {"clients": (self.bytes_up, self.bytes_down), "regions": (up, down)}


def payload_name(round: int, client: str, direction: Direction) -> str:
    """How the files of payloads begin that travelled in a round between the server and a client."""
    return f"{round:05d}-{file_name(client)}-{direction}"


def totals(rows: Iterable[Row]) -> Totals:
    """Bytes up and down in all, by client, by round, by part and by region."""
    by_client: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    by_round: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    by_part: dict[str, int] = defaultdict(int)
    by_region: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    count = 0
    for row in rows:
        if isinstance(row, Relay):
            by_region[row.region][("up", "down").index(row.direction)] += row.bytes
        if not isinstance(row, Transfer):
            continue
        count += 1
        way = ("up", "down").index(row.direction)
        by_client[row.client][way] += row.bytes
        by_round[row.round][way] += row.bytes
        for part, size in row.parts.items():
            by_part[part] += size
    return Totals(
        transfers=count,
        bytes_up=sum(up for up, _ in by_client.values()),
        bytes_down=sum(down for _, down in by_client.values()),
        by_client={client: (up, down) for client, (up, down) in sorted(by_client.items())},
        by_round={round: (up, down) for round, (up, down) in sorted(by_round.items())},
        by_part=dict(sorted(by_part.items())),
        by_region={region: (up, down) for region, (up, down) in sorted(by_region.items())},
    )


def dump_row(row: Row) -> bytes:
    """The row as it stands in a ledger: one JSON object on one line, safe to show whatever it holds.

    Raises CheckpointError for a row that could not be read back, such as one with half of a surrogate pair in a name.
    """
    try:
        line = escape_json(ROWS.dump_json(row, warnings=False).decode()).encode()
        ROWS.validate_json(line)
    except ValidationError as error:
        raise CheckpointError(f"a row of kind {row.row!r} cannot be kept: {_complaint(error)}") from None
    except PydanticSerializationError as error:
        raise CheckpointError(f"a row of kind {row.row!r} cannot be kept: {to_printable(str(error))}") from None
    return line


def _complaint(error: ValidationError) -> str:
    """The first wrong field of a row, and what was expected there."""
    first = error.errors(include_url=False, include_input=False)[0]
    return to_printable(": ".join([".".join(map(str, first["loc"][1:])), first["msg"]]).removeprefix(": "))


def read_rows(path: Path) -> list[Row]:
    """The rows of a ledger. A half-written last line is dropped; any other bad line is a CheckpointError."""
    return _scan(path)[0]


class Taker(Protocol):
    """What keeps count of a ledger's rows, so that nobody has to read them again."""

    def take(self, row: Row) -> None:
        """Take in the next row."""


Told = Callable[[Row, bytes], None]
"""(a row that is appended, its line in the ledger)."""
Kept = TypeVar("Kept", bound=Taker)


class _Nothing:
    def take(self, row: Row) -> None:
        """Nobody keeps count."""


class Ledger(Generic[Kept]):
    """The ledger of a run in progress, opened for appending. Use as a context manager or call `close`.

    told is called for every row that is appended. kept: made by `keeper`, it has taken in every row that stands in the
    ledger; it is made anew where rows are forgotten. examples: client → examples in its last training row.
    """

    kept: Kept

    def __init__(self, path: Path, told: Told | None = None, keeper: Callable[[], Kept] = _Nothing) -> None:  # type: ignore[assignment]
        self.path = path
        self._told = told
        self._keeper = keeper
        self._offsets = [0]
        rows: list[Row] = []
        if path.exists():
            rows, self._offsets = _scan(path)
        self._file = path.open("ab")
        self._file.truncate(self._offsets[-1])
        self._count_anew(rows)

    @property
    def rows(self) -> int:
        """Number of rows so far."""
        return len(self._offsets) - 1

    def append(self, row: Row) -> None:
        """Add one row; it is on disk after the next `sync`.

        Raises CheckpointError, with the file as it was, for a row that could not be read back.
        """
        try:
            line = dump_row(row) + b"\n"
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None
        self._offsets.append(self._offsets[-1] + len(line))
        self._file.write(line)
        self._file.flush()  # whoever follows the run from another process sees each row at once
        self._count(row)
        if self._told:
            self._told(row, line)

    def note(self, round: int, text: str, about: About = "") -> Note:
        """Add a row of words, which may quote others', and return it."""
        row = Note(round, to_printable(text, LONG), about)
        self.append(row)
        return row

    def sync(self) -> int:
        """Write every row to disk and return how many there are. Call it once a round."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.rows

    def truncate_to(self, rows: int, keep: Callable[[Sequence[Row]], Iterable[Row]] | None = None) -> None:
        """Forget all but the first `rows` rows: what a run recorded after the checkpoint that it resumes from.

        keep(forgotten) tells what of them stays nevertheless; the file changes as a whole.
        """
        if rows > self.rows:
            raise CheckpointError(
                f"{self.path} has {self.rows} rows, but the checkpoint was taken after {rows}: the ledger was shortened"
            )
        end = self._offsets[rows]
        with suppress(OSError):  # what a full disk has not taken is forgotten with the rest
            self._file.close()
        if self.path.stat().st_size < end:
            raise CheckpointError(f"{self.path} ends before its row {rows}: the disk did not take it")
        kept = b"".join(dump_row(row) + b"\n" for row in keep(read_rows(self.path)[rows:])) if keep else b""
        if kept:
            partial = self.path.with_name(f"{self.path.name}.partial")
            partial.write_bytes(self.path.read_bytes()[:end] + kept)
            os.replace(partial, self.path)
        else:
            os.truncate(self.path, end)
        self._file = self.path.open("ab")
        found, self._offsets = _scan(self.path)
        self._count_anew(found)
        self.sync()

    def close(self) -> None:
        """Sync and close, on a full disk too."""
        try:
            self.sync()
        finally:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _count_anew(self, rows: Iterable[Row]) -> None:
        self.bytes_up = self.bytes_down = 0
        self.examples: dict[str, int] = {}
        self.kept = self._keeper()
        for row in rows:
            self._count(row)

    def _count(self, row: Row) -> None:
        if isinstance(row, Transfer):
            self.bytes_up += row.bytes * (row.direction == "up")
            self.bytes_down += row.bytes * (row.direction == "down")
        elif isinstance(row, Training):
            self.examples[row.client] = row.examples
        self.kept.take(row)


def _scan(path: Path) -> tuple[list[Row], list[int]]:
    """(rows, offsets): where each row begins and the last one ends. A last line without its end was cut short."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    rows: list[Row] = []
    offsets = [0]
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            rows.append(ROWS.validate_json(line))
        except ValidationError as error:
            raise CheckpointError(f"{path}, line {number} is not a row of a ledger: {_complaint(error)}") from None
        offsets.append(offsets[-1] + len(line) + 1)
    return rows, offsets
