"""One run from Python: play it, or open the folder of one that was played."""

from __future__ import annotations

import io
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Self, overload

from fedloom.errors import ConfigError
from fedloom.face.picture import Picture
from fedloom.face.settings import Settings, changed
from fedloom.methods.method import Method
from fedloom.records.config import Config
from fedloom.records.events import Silent
from fedloom.records.ledger import read_rows
from fedloom.report.numbers import Report, human_bytes, summarise

if TYPE_CHECKING:
    from fedloom.lora.pair import LoraState
    from fedloom.rounds.turns import Train


def run(
    config: Config | str | Path,
    *,
    method: str | Method | None = None,
    num_rounds: int | None = None,
    seed: int | None = None,
    settings: Settings | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
    trainers: Mapping[str, Train] | None = None,
) -> Run:
    """Simulate a federation on this machine and return what came of it.

    config: settings, or the path of a settings file. method: a name ("fedsrd", "florist:paper",
    "package.module:builder") or a `Method` value; num_rounds, seed and settings (dotted keys) change single settings.
    out: the run's folder; if left out, a temporary one that lives as long as the result. progress: show the live view.
    trainers: client → a training step of its own, such as `fedloom.patch(trainer)`; the others train as `config` says.
    Raises ConfigError, DataError or ModelError for what the user can mend.
    """
    from rich.console import Console

    from fedloom.report.live import watch
    from fedloom.server import local

    chosen = {"federation.num_rounds": num_rounds, "federation.seed": seed, "output.keep_payloads": True}
    own = {**{key: value for key, value in chosen.items() if value is not None}, **(settings or {})}
    scratch = tempfile.TemporaryDirectory(prefix="fedloom-") if out is None else None
    folder = Path(scratch.name) / "run" if scratch else Path(str(out))
    value = method if isinstance(method, Method) else None
    shown = watch(Console()) if progress else nullcontext(Silent())
    with shown as observer:
        local.run_local(
            changed(config, own, method), folder, resume=resume, observer=observer, method=value, trainers=trainers
        )
    return Run(folder, scratch)


class Run:
    """A finished run, read from its folder."""

    def __init__(self, folder: str | Path, scratch: tempfile.TemporaryDirectory[str] | None = None) -> None:
        self.folder = Path(folder)
        if scratch is not None:
            weakref.finalize(self, scratch.cleanup)  # a temporary folder goes with the object that shows it

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
        return Payloads(sorted((self.folder / "payloads").glob("*"), key=_travelled))

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
        mean = f", mean score {self.scores['mean']:.3f}" if self.scores else ""
        return f"Run({facts.method}, {facts.num_rounds} rounds{mean}, {human_bytes(self.bytes)}, {self.folder})"

    def _repr_html_(self) -> str:
        before = self.report.points[0].scores if self.report.points else {}
        rows = "".join(
            f"<tr><td>{escape(domain)}</td><td>{100 * before[domain]:.1f}</td><td>{100 * after:.1f}</td></tr>"
            for domain, after in self.scores.items()
        )
        facts = self.report.run
        head = f"{facts.method}, {facts.num_rounds} rounds, {len(facts.clients)} clients: {human_bytes(self.bytes)}"
        return (
            f"<table><caption>{escape(head)}</caption><tr><th>domain</th><th>before (%)</th><th>after (%)</th></tr>"
            f"{rows}</table>"
        )


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


def _travelled(path: Path) -> tuple[int, str]:
    return path.stat().st_mtime_ns, path.name
