"""Several methods side by side from Python."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.face.picture import Picture
from fedloom.face.scratch import Scratch
from fedloom.face.settings import Settings, apply_changes
from fedloom.methods.method import Method
from fedloom.records.config import Config
from fedloom.records.text import to_printable
from fedloom.report.numbers import Report
from fedloom.report.tables import comparison_rows, to_markdown
from fedloom.studies import compare as studies
from fedloom.studies.preflight import check_trials


def compare(
    config: Config | str | Path,
    methods: Sequence[str | Method],
    *,
    num_rounds: int | None = None,
    seeds: int = 3,
    first_seed: int = 0,
    jobs: int = 1,
    settings: Settings | None = None,
    out: str | Path | None = None,
    finished: Callable[[str, int, float], None] | None = None,
) -> Comparison:
    """Play every method with every seed on the same data; one run a folder in `out`, a temporary one if left out.

    config: settings, or the path of a settings file; num_rounds and settings (dotted keys) change them for all runs.
    methods: names as on the command line ("fedsrd:paper", "florist:tau=0.9", "alone", "pooled",
    "package.module:builder") and `Method` values. jobs: with 1 all runs are played in this process; with more, each in
    a process of its own, where a `Method` value cannot go: name it as "package.module:builder".
    finished(label, seed, seconds) is called after each run. Complete runs in `out` are kept.
    Raises ConfigError where two methods have one name, where one cannot be played (before any is), or where a run in
    `out` has other settings or another method.
    """
    if seeds < 1 or jobs < 1:
        raise ConfigError(f"seeds is {seeds} and jobs is {jobs}: expected at least 1 of each")
    if isinstance(methods, str | Method) or not methods:
        raise ConfigError("methods is expected to be a list of one method or more, such as ['fedit', 'fedsrd']")
    values = [method for method in methods if isinstance(method, Method)]
    if jobs > 1 and values:
        raise ConfigError(
            f"the method {values[0].name!r} is a value, which cannot be handed to another process: name it as "
            '"package.module:builder", or set jobs=1'
        )
    scratch = Scratch() if out is None else None
    folder = scratch.path if scratch else Path(str(out))
    tried = range(first_seed, first_seed + seeds)
    own = {**({} if num_rounds is None else {"federation.num_rounds": num_rounds}), **(settings or {})}
    made = studies.plan_runs(apply_changes(config, own, None), methods, tried, folder)
    check_trials(made)

    def tell(run: studies.Trial, seconds: float) -> None:
        if finished is not None:
            finished(run.label, run.seed, seconds)

    if jobs > 1:
        studies.play_runs(made, jobs, tell)
    else:
        studies.play_here(made, tell)
    return Comparison(studies.read_reports(made), folder, scratch)


class Comparison:
    """Runs side by side: label → the reports of its runs, one a seed."""

    def __init__(
        self,
        reports: Mapping[str, Sequence[Report]],
        folder: Path,
        scratch: Scratch | None = None,
    ) -> None:
        self.reports = reports
        self.folder = folder
        self._scratch = scratch  # a temporary folder goes with the object that shows it

    @property
    def rows(self) -> list[dict[str, str]]:
        """One row a method: scores and differences to the first with 95 % intervals over seeds, bytes, seconds.

        The leading score is exact match, or the loss where exact match is 0 throughout.
        """
        return comparison_rows(self.reports)

    @property
    def scores(self) -> Mapping[str, Sequence[float]]:
        """Label → mean exact match after the last round, a fraction, one a seed."""
        return {label: [report.score("mean") for report in made] for label, made in self.reports.items()}

    @property
    def losses(self) -> Mapping[str, Sequence[float]]:
        """Label → mean held-out loss after the last round in nats a token, one a seed."""
        return {label: [report.value("loss") for report in made] for label, made in self.reports.items()}

    def plot(self) -> Picture:
        """Score against rounds and against bytes, with intervals over seeds."""
        from fedloom.report import figure

        image = io.BytesIO()
        figure.draw_comparison(self.reports, image)
        return Picture(image.getvalue())

    def __repr__(self) -> str:
        return to_markdown(self.rows)

    def _repr_html_(self) -> str:
        rows = self.rows
        head = _row("th", rows[0] if rows else ())
        return f"<table>{head}{''.join(_row('td', row.values()) for row in rows)}</table>"


def _row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(to_printable(cell))}</{tag}>" for cell in cells) + "</tr>"
