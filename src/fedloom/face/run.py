"""One run from Python: play it, or open the folder of one that was played."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Self, overload

from fedloom.errors import ConfigError
from fedloom.face.picture import Picture
from fedloom.face.scratch import Scratch
from fedloom.face.settings import Settings, apply_changes
from fedloom.methods.method import Method
from fedloom.records.config import Config
from fedloom.records.events import Silent
from fedloom.records.ledger import Transfer, payload_name, read_rows
from fedloom.records.text import to_printable
from fedloom.report.measures import list_measures
from fedloom.report.numbers import MEAN, Report, human_bytes, summarise
from fedloom.report.scores import score_cells, score_head

if TYPE_CHECKING:
    from fedloom.lora.pair import LoraState
    from fedloom.rounds.step import Train


def run(
    config: Config | str | Path,
    *,
    method: str | Method | None = None,
    num_rounds: int | None = None,
    seed: int | None = None,
    settings: Settings | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    trainers: Mapping[str, Train] | None = None,
) -> Run:
    """Simulate a federation on this machine and return what came of it.

    config: settings, or the path of a settings file. method: a name ("fedsrd", "florist:paper", "florist:tau=0.9",
    "package.module:builder") or a `Method` value; num_rounds, seed and settings (dotted keys) change single settings.
    out: the run's folder; if left out, a temporary one that lives as long as the result. resume: go on with the run
    that was interrupted in `out`, or give a finished one more rounds. force: replace the run in `out`, which is moved
    aside. progress: show the live view.
    trainers: client → a training step of its own, such as `fedloom.patch(trainer)`; the others train as `config` says.
    Raises ConfigError, DataError or ModelError for what the user can mend, CheckpointError where `out` holds other
    files or, with `resume`, a run of other settings or of another method; RoundError where the run came to nothing,
    as when every training diverges.
    """
    from rich.console import Console

    from fedloom.report.live import watch
    from fedloom.server import local
    from fedloom.studies.estimate.foretell import Foretelling

    if (resume or force) and out is None:
        raise ConfigError(f"{'resume' if resume else 'force'} needs out=, the folder of the run that is there")
    chosen = {"federation.num_rounds": num_rounds, "federation.seed": seed, "output.keep_payloads": True}
    own = {**{key: value for key, value in chosen.items() if value is not None}, **(settings or {})}
    scratch = Scratch() if out is None else None
    folder = scratch.path / "run" if scratch else Path(str(out))
    value = method if isinstance(method, Method) else None
    shown = watch(Console()) if progress else nullcontext(Silent())
    with shown as view:
        # A folder that goes with the result needs no prediction, and a method of one's own has no name to play it by.
        observer = view if scratch or value else Foretelling(view)
        summary = local.run_local(
            apply_changes(config, own, method),
            folder,
            resume=resume,
            force=force,
            observer=observer,
            method=value,
            trainers=trainers,
        )
    summary.check()
    return Run(folder, scratch)


class Run:
    """A finished run, read from its folder."""

    def __init__(self, folder: str | Path, scratch: Scratch | None = None) -> None:
        self.folder = Path(folder)
        self._scratch = scratch  # a temporary folder goes with the object that shows it

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The run that was played in `folder`. Raises ConfigError where there is none."""
        if not (Path(folder) / "ledger.jsonl").is_file():
            raise ConfigError(f"{folder} holds no run: expected a folder with a ledger.jsonl")
        return cls(folder)

    @cached_property
    def report(self) -> Report:
        """All figures of the run, from its ledger."""
        return summarise(read_rows(self.folder / "ledger.jsonl"), str(self.folder))

    @property
    def scores(self) -> Mapping[str, float]:
        """Held-out exact match after the last round by domain, and their "mean"; fractions from 0 to 1."""
        return dict(self.report.points[-1].scores) if self.report.points else {}

    @property
    def scores_by_round(self) -> Mapping[int, Mapping[str, float]]:
        """The same after every round that was evaluated; 0 is the model before the first."""
        return {point.round: dict(point.scores) for point in self.report.points}

    @property
    def losses(self) -> Mapping[str, Sequence[float]]:
        """Each client's mean training loss, turn by turn."""
        return self.report.losses

    @property
    def heldout_losses(self) -> Mapping[str, float]:
        """Held-out loss after the last round by domain, and their "mean"."""
        return dict(self.report.points[-1].losses) if self.report.points else {}

    @property
    def heldout_losses_by_round(self) -> Mapping[int, Mapping[str, float]]:
        """The same after every round that was evaluated; 0 is the model before the first."""
        return {point.round: dict(point.losses) for point in self.report.points}

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """Every measure after the last round: name → domain (and their "mean") → value.

        The names are "exact_match", "loss", "bits_per_byte" and those of evaluation.metrics.
        """
        return (
            {name: dict(found) for name, found in self.report.points[-1].values.items()} if self.report.points else {}
        )

    @property
    def bytes(self) -> int:
        """Bytes of all payloads, both ways."""
        return self.report.totals.bytes

    @property
    def bytes_up(self) -> int:
        """Bytes of all payloads that clients sent."""
        return self.report.totals.bytes_up

    @property
    def bytes_down(self) -> int:
        """Bytes of all payloads that clients received."""
        return self.report.totals.bytes_down

    @property
    def payloads(self) -> Payloads:
        """Every payload, in the order in which they travelled; kept where output.keep_payloads is set."""
        return Payloads(list(_in_order(self.folder)))

    @property
    def adapter_folder(self) -> Path:
        """The result, a PEFT adapter."""
        return self.folder / "adapter"

    @property
    def adapter(self) -> LoraState:
        """The result's factors by module."""
        from fedloom.adapters.folder import load_adapter

        return load_adapter(self.adapter_folder)[0]

    def plot(self) -> Picture:
        """Score against rounds and against bytes."""
        from fedloom.report.figure import draw_curve

        image = io.BytesIO()
        draw_curve(self.report, image)
        return Picture(image.getvalue())

    def __repr__(self) -> str:
        facts = self.report.run
        lead = next(iter(list_measures([self.report])), None)
        mean = f", {lead.name} {lead.phrase(self.report.value(lead.key))}" if lead else ""
        method = to_printable(facts.method)
        return f"Run({method}, {facts.num_rounds} rounds{mean}, {human_bytes(self.bytes)}, {self.folder})"

    def _repr_html_(self) -> str:
        measures = list_measures([self.report])
        names = [*self.report.domains, MEAN] if measures else []
        rows = "".join(_row("td", [name, *score_cells(self.report, measures, name)]) for name in names)
        facts = self.report.run
        head = f"{to_printable(facts.method)}, {facts.num_rounds} rounds, {len(facts.clients)} clients"
        sent = f"{human_bytes(self.bytes_up)} up, {human_bytes(self.bytes_down)} down"
        table = f"<table>{_row('th', ['domain', *score_head(measures)])}{rows}</table>" if rows else ""
        return f"<p>{escape(head)}: {sent}</p>{table}"


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(to_printable(cell))}</{tag}>" for cell in cells) + "</tr>"


class Payloads(Sequence[bytes]):
    """Payloads that are read from disk when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(index, slice):
            return Payloads(self.paths[index])
        return self.paths[index].read_bytes()

    def __iter__(self) -> Iterator[bytes]:
        return (path.read_bytes() for path in self.paths)


def _in_order(folder: Path) -> Iterator[Path]:
    """The payload files in the order of the ledger's rows: times of files do not survive a copy of the folder."""
    waiting: dict[str, list[Path]] = {}
    for path in sorted((folder / "payloads").glob("*-v*.fedloom"), key=_version):
        waiting.setdefault(path.name.rpartition("-v")[0], []).append(path)
    for row in read_rows(folder / "ledger.jsonl"):
        # What a client missed is sent to it in one round, the oldest version first.
        if isinstance(row, Transfer) and (left := waiting.get(payload_name(row.round, row.client, row.direction))):
            yield left.pop(0)


def _version(path: Path) -> int:
    digits = path.stem.rpartition("-v")[2]
    return int(digits) if digits.isdecimal() else 0
