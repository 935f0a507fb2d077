"""The points as tables: for a page, for programs (front.csv), and back."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from experiments.gain import Losses
from experiments.points import LINKS, SHARE_OF_GAIN, TARGET, Point, best_at_each_budget
from experiments.work import Work
from fedloom.errors import DataError
from fedloom.report.tables import to_csv, to_markdown

SHARE = "of dense fp32"
"""How the column of shares begins."""
GAIN, LOSS, BITS, AGAINST = "of dense FedIT's gain %", "nats a token", "bits a byte", "nats a token against dense FedIT"
_SECONDS = [f"s at {up:g}/{down:g} Mbit/s" for up, down in LINKS]
_WORK = ("forward_passes", "backward_passes", "client_seconds")
_WALLS = [f"run_seconds_{up:g}_{down:g}" for up, down in LINKS]
_ROUNDS = f"rounds to {100 * TARGET:.0f} %"


def rows(points: Sequence[Point]) -> list[dict[str, str]]:
    """The points as a table of words; those of free text have columns of their own."""
    return [_row(point) for point in points]


def pages(points: Sequence[Point]) -> list[list[dict[str, str]]]:
    """The same as one table for each kind of score."""
    return [rows(some) for metric in dict.fromkeys(p.metric for p in points) if (some := _of(points, metric))]


def write_markdown(points: Sequence[Point]) -> str:
    """The tables of `pages`, one below the other."""
    return "\n".join(to_markdown(page) for page in pages(points))


def grid(points: Sequence[Point]) -> list[dict[str, str]]:
    """Methods down, budgets across: the best score of a method under a budget, and its share of dense FedIT's bytes.

    For the points of one testbed. Methods stand by their best score; an empty cell is what was not played.
    """
    budgets = list(dict.fromkeys(point.budget for point in points))
    best = {(point.method, point.budget): point for point in best_at_each_budget(points)}
    tops: dict[str, float] = {}
    for (method, _), point in best.items():
        tops[method] = max(tops.get(method, -math.inf), point.score)
    return [
        {"method": method} | {budget: _cell(best.get((method, budget))) for budget in budgets}
        for method in sorted(tops, key=lambda method: -tops[method])
    ]


def write_grids(points: Sequence[Point]) -> str:
    """`grid` of every testbed under its name, in Markdown."""
    names = dict.fromkeys(point.testbed for point in points)
    return "\n".join(f"**{name}**\n\n{to_markdown(grid([p for p in points if p.testbed == name]))}" for name in names)


def figures(points: Sequence[Point]) -> list[dict[str, str]]:
    """The same with columns of plain numbers behind it, for programs: bytes of a client over a run, both ways and with
    the delivery; share of dense FedIT's bytes; score and the ends of its 95 % interval in per cent.

    Every row has all columns; those of another kind of score are empty.
    """
    found = [_row(point) | _numbers(point) for point in points]
    heads = list(dict.fromkeys(head for row in found for head in row))
    return [{head: row.get(head, "") for head in heads} for row in found]


def write_csv(points: Sequence[Point]) -> str:
    """`figures` as the text of a front.csv."""
    return to_csv(figures(points))


def read_csv(path: Path) -> list[Point]:
    """The points of a front.csv, to the digits that stand there; shares and clients' bytes NaN in an older one.

    Raises DataError for another file.
    """
    with path.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    try:
        return [_point({head: (text or "").removeprefix("'") for head, text in row.items()}) for row in found]
    except (KeyError, ValueError) as error:
        raise DataError(f"{path} is no table of `python -m experiments front` ({error})") from None


def merge(kept: Iterable[Point], new: Sequence[Point], listed: Collection[tuple[str, str, str]]) -> list[Point]:
    """New points, and of the kept ones those that are not made anew, testbeds in the order in which they were.

    listed: (testbed, budget, variant) of all entries of the new testbeds; a kept point that is none of them is dropped.
    """
    beds = {testbed for testbed, _, _ in listed}
    fresh = {_key(point): point for point in new}
    old = {_key(p): p for p in kept if p.testbed not in beds or _key(p) in listed}
    both = {**old, **fresh}
    order = {name: number for number, name in enumerate(dict.fromkeys(p.testbed for p in both.values()))}
    places = {key: number for number, key in enumerate(listed)}
    return sorted(both.values(), key=lambda p: (order[p.testbed], places.get(_key(p), 0)))


def _key(point: Point) -> tuple[str, str, str]:
    return point.testbed, point.budget, point.variant


def _of(points: Sequence[Point], metric: str) -> list[Point]:
    return [point for point in points if point.metric == metric]


def _numbers(point: Point) -> dict[str, str]:
    score, half = round(point.score, 1), round(point.half, 1)  # as shown, so that what is read back is the same
    low, high = score - half, score + half
    if not point.losses:  # exact match cannot leave 0 to 100; a share of a gain can
        low, high = max(low, 0), min(high, 100)
    return {
        "method": point.method,
        "bytes_client": f"{point.client:.0f}",
        "share_of_dense": f"{point.share:.5f}",
        "score": f"{point.score:.1f}",
        "low": f"{low:.1f}",
        "high": f"{high:.1f}",
        "metric": point.metric,
        **_work(point.work),
    }


def _work(work: Work) -> dict[str, str]:
    """What a client's part takes; empty what is not known."""
    numbers = dict(zip(_WORK, (work.forward, work.backward, work.seconds), strict=True))
    numbers |= zip(_WALLS, work.walls or (math.nan,) * len(LINKS), strict=True)
    return {name: "" if math.isnan(v) else f"{v:.1f}".removesuffix(".0") for name, v in numbers.items()}


def write_work(points: Sequence[Point]) -> str:
    """Score, bytes and what a client's part in a run takes, as a table in Markdown; what is not known is a dash."""
    lines = []
    for point in points:
        row = {"testbed": point.testbed, "budget": point.budget, "run": point.variant}
        row |= {"score %": _spread(point.score, point.half, point.seeds), "B a client": f"{point.client:.0f}"}
        told = _work(point.work)
        row |= {"forward passes": told[_WORK[0]], "backward passes": told[_WORK[1]], "client s": told[_WORK[2]]}
        row |= {f"run, {name}": told[wall] for name, wall in zip(_SECONDS, _WALLS, strict=True)}
        lines.append({head: text or "–" for head, text in row.items()})
    return to_markdown(lines)


def _row(point: Point) -> dict[str, str]:
    row = {
        "testbed": point.testbed,
        "budget": point.budget,
        "run": point.variant,
        "seeds": str(point.seeds),
        f"{SHARE}, {point.rank}": f"{_percent(point.share)}{'' if point.within else ' (over)'}",
        "up B / turn": f"{point.up:.0f}",
        "down B / turn": f"{point.down:.0f}",
    }
    if point.losses is None:
        row |= {
            "halfway %": f"{point.halfway:.1f}",
            "end %": _spread(point.score, point.half, point.seeds),
            _ROUNDS: _text(point.rounds),
        }
        return row | {name: _text(seconds) for name, seconds in zip(_SECONDS, point.seconds, strict=True)}
    told = point.losses
    return row | {
        GAIN: _spread(point.score, point.half, point.seeds),
        LOSS: _spread(told.loss, told.half, point.seeds, ".4f"),
        BITS: "–" if math.isnan(told.bits) else f"{told.bits:.4f}",
        AGAINST: _spread(told.against, told.against_half, point.seeds, "+.4f"),
    }


def _spread(mean: float, half: float, seeds: int, form: str = ".1f") -> str:
    """A mean with half of its interval, where there are several seeds."""
    if not math.isfinite(mean):
        return "–"
    return f"{mean:{form}} ± {half:{form.removeprefix('+')}}" if seeds > 1 else f"{mean:{form}}"


def _cell(point: Point | None) -> str:
    """A score, and what it took."""
    return "" if point is None else f"{_spread(point.score, point.half, point.seeds)} ({_percent(point.share)})"


def _percent(share: float) -> str:
    return f"{100 * round(share, 5):.2f} %"


def _text(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"


def _number(text: str) -> float:
    return math.nan if text in ("–", "") else float(text)


def _both(text: str) -> tuple[float, float]:
    """A mean and half of its interval; 0 for a single seed."""
    mean, _, half = text.partition(" ± ")
    return _number(mean), float(half or 0)


def _point(row: Mapping[str, str]) -> Point:
    free = row.get("metric") == SHARE_OF_GAIN
    shares = [head for head, text in row.items() if head.startswith(f"{SHARE}, ") and text]  # a column a rank
    if not shares:
        raise KeyError(SHARE)
    score, half = _both(row[GAIN if free else "end %"])
    return Point(
        testbed=row["testbed"],
        budget=row["budget"],
        variant=row["run"],
        seeds=int(row["seeds"]),
        share=_number(row.get("share_of_dense", "")),
        up=float(row["up B / turn"]),
        down=float(row["down B / turn"]),
        halfway=math.nan if free else float(row["halfway %"]),
        score=score,
        half=half,
        rounds=math.nan if free else _number(row[_ROUNDS]),
        seconds=(math.nan,) * len(LINKS) if free else tuple(_number(row[name]) for name in _SECONDS),
        client=_number(row.get("bytes_client", "")),
        rank=shares[0].partition(", ")[2],
        work=_read_work(row),
        losses=Losses(*_both(row[LOSS]), _number(row[BITS]), *_both(row[AGAINST])) if free else None,
    )


def _read_work(row: Mapping[str, str]) -> Work:
    """What a client's part takes, as far as the row says it."""
    forward, backward, seconds = (_number(row.get(name, "")) for name in _WORK)
    walls = tuple(_number(row.get(name, "")) for name in _WALLS)
    return Work(forward, backward, seconds, () if any(map(math.isnan, walls)) else walls)
