"""A run as a plan: money at a price per GB, hours on given lines, and what server and sites need."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.errors import ConfigError
from fedloom.report.facts import LINES
from fedloom.studies.estimate.case import Case
from fedloom.studies.estimate.course import RunBytes
from fedloom.studies.estimate.rounds import Prediction

GB = 10**9
"""What clouds bill by."""
_TRAINED = 16
"""Bytes of a value that is trained: itself, its gradient and AdamW's two moments, all fp32."""


@dataclass(frozen=True, slots=True)
class Line:
    """A site's line: bits a second up and down."""

    name: str
    up: float
    down: float

    def seconds(self, up: float, down: float) -> float:
        """For so many bytes each way, one way after the other."""
        return 8 * (up / self.up + down / self.down)


USUAL = tuple(Line(name, rate, rate) for name, rate in LINES.items())


@dataclass(frozen=True, slots=True)
class Terms:
    """What a plan is made for. lines: of the sites, all of which are taken to have the same one.

    price: of a GB that the server sends, price_up: of one that sites send, both None where money is not asked for.
    turn_seconds: of a client's training in a round.
    """

    lines: Sequence[Line] = USUAL
    price: float | None = None
    price_up: float | None = None
    turn_seconds: float = 0.0

    def __post_init__(self) -> None:
        for option, value in (("price", self.price), ("price-up", self.price_up), ("turn-seconds", self.turn_seconds)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"--{option} is {value}: expected a number of 0 or more")


def parse_lines(texts: Sequence[str]) -> tuple[Line, ...]:
    """The lines that "clinic=10/50" and the like describe: NAME=UP/DOWN in Mbit/s, or NAME=RATE for both ways."""
    return tuple(map(_parse_line, texts)) or USUAL


def _parse_line(text: str) -> Line:
    name, _, rates = text.rpartition("=")
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(?:/(\d+(?:\.\d+)?))?", rates.strip())
    up, down = (float(found[1]), float(found[2] or found[1])) if found else (0.0, 0.0)
    if not name.strip() or up <= 0 or down <= 0:
        raise ConfigError(f"--line {text}: expected NAME=UP/DOWN in Mbit/s, such as clinic=10/50")
    return Line(name.strip(), 1e6 * up, 1e6 * down)


def plan_run(case: Case, told: Prediction, course: RunBytes, terms: Terms) -> dict[str, Any]:
    """{"server_sends_bytes", "sites_send_bytes", "money", "lines", "server_…", "site_…"} as plain JSON values.

    money: None where no price is given. lines: of each, "turn_seconds" of the mean turn's payloads and "run_seconds" of
    the whole run: payloads, training, the server's turns. In synchronous rounds everybody waits for the slowest; where
    the server does not wait for anybody it is what the busiest site takes. site_bytes: base model, adapter in training
    and payloads, without activations. Regions' own lines are not counted.
    """
    down = course.down + course.delivered
    prices = terms.price, terms.price_up
    money = None if prices == (None, None) else (down * (terms.price or 0) + course.up * (terms.price_up or 0)) / GB
    own = max(sum(rank * sum(case.layout[m]) for m, rank in held.items()) for held in case.ranks.values())
    payload = max(max(one.up, one.first_up) + max(one.down, one.first_down) for one in told.traffic.values())
    return {
        "server_sends_bytes": round(down),
        "sites_send_bytes": round(course.up),
        "money": money,
        "lines": [_on_line(case, told, course, line, terms.turn_seconds) for line in terms.lines],
        "server_cpu_s": told.server_cpu_s * len(course.rounds),
        "server_bytes": None if told.memory is None else round(told.memory + max(told.states, default=0.0)),
        "site_cpu_s": told.client_cpu_s,
        "site_bytes": round(case.base_bytes + _TRAINED * own + 4 * case.values + payload),
        "site_has_base": bool(case.base_bytes),
    }


def _on_line(case: Case, told: Prediction, course: RunBytes, line: Line, turn_seconds: float) -> dict[str, Any]:
    turns = max(course.turns, 1)
    return {
        "name": line.name,
        "up_bits": line.up,
        "down_bits": line.down,
        "turn_seconds": line.seconds(course.up / turns, course.down / turns),
        "run_seconds": (_waiting if case.waits else _busiest)(told, course, line, turn_seconds),
    }


def _waiting(told: Prediction, course: RunBytes, line: Line, turn_seconds: float) -> float:
    """Rounds one after another, each as long as its slowest client's turn and the server's."""
    rounds = sum(
        max((line.seconds(*sizes) for sizes in clients.values()), default=0.0) + turn_seconds + told.server_cpu_s
        for clients in course.rounds
    )
    return rounds + max((line.seconds(0, size) for size in course.delivery.values()), default=0.0)


def _busiest(told: Prediction, course: RunBytes, line: Line, turn_seconds: float) -> float:
    """The site whose turns take longest together; nobody waits for it, and it waits for nobody."""
    seconds = {client: line.seconds(0, size) for client, size in course.delivery.items()}
    for clients in course.rounds:
        for client, (up, down) in clients.items():
            seconds[client] += line.seconds(up, down) + (turn_seconds if up else 0.0)
    return max(seconds.values(), default=0.0) + told.server_cpu_s * len(course.rounds)


def name_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a plan in words: "clinic (10/50 Mbit/s)"; the usual ones are named by what they are."""
    return [
        line["name"]
        if line["name"] in LINES
        else f"{line['name']} ({line['up_bits'] / 1e6:g}/{line['down_bits'] / 1e6:g} Mbit/s)"
        for line in rows
    ]
