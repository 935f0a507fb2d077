"""`python -m benchmarks line`: a round of a real site over a line that is slow, loses packets and breaks.

SuperLink, worker and node are real processes; between node and SuperLink lies `benchmarks.link`. The model is
the demo's, with an adapter of so many values that its payloads are as large as those of the model that is meant. One
round is played, and the result delivered, so that a payload of that size crosses each way.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.flower import settings, shapes
from benchmarks.link import Lane, Link
from benchmarks.loopback import Loopback
from fedloom.errors import RoundError
from fedloom.flower import launch
from fedloom.flower.nodes import register_node
from fedloom.flower.payload import piece_size
from fedloom.records.config import Config
from fedloom.records.ledger import Transfer, read_rows

SITE = "bank"
AT_ONCE = 2
"""Pieces that Flower has under way at the same time."""


@dataclass(frozen=True, slots=True)
class Bad:
    """A line: kbit/s each way, milliseconds there and back, share of packets that are lost.

    cuts: of each payload. outage: seconds for which nobody connects after one.
    """

    kbit: float = 256.0
    rtt: float = 200.0
    loss: float = 0.02
    cuts: int = 1
    outage: float = 5.0

    def lane(self, payload: int, seed: int) -> Lane:
        """One direction, cut at even distances while a payload of so many bytes crosses."""
        places = [payload * (number + 1) // (self.cuts + 1) for number in range(self.cuts)]
        return Lane(self.kbit * 125, self.rtt / 2000, self.loss, places, seed)


def run(line: Bad | None = None, *, mebibytes: float = 6.5, seed: int = 0) -> dict[str, Any]:
    """Bytes and seconds of a round; of both directions: payload, what passed, what it may be at most.

    mebibytes: of the adapter's fp32 values; a payload is about two thirds of that. Raises RoundError where the round
    did not end with an update.
    """
    line = line or Bad()
    with resources.as_file(resources.files("fedloom") / "testbeds") as testbed, tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with Loopback(place, [SITE], testbed / "model", str(testbed / "data" / "{site}")) as loopback:
            config = _settings(testbed, loopback, mebibytes)
            length = round(mebibytes * 2**20)
            up, down = line.lane(length * 2 // 3, seed), line.lane(length * 2 // 3, seed + 1)
            with Link(loopback.port, up, down, line.outage) as link:
                _start(loopback, config, link.port)
                began = time.monotonic()
                launch.run_on_superlink(config, place / "run")
                seconds = time.monotonic() - began
            rows = [row for row in read_rows(place / "run" / "ledger.jsonl") if isinstance(row, Transfer)]
    sizes = {way: sum(row.bytes for row in rows if row.direction == way) for way in ("up", "down")}
    if not all(sizes.values()):
        raise RoundError("no update came over the line")
    return {
        "line": asdict(line),
        "piece": piece_size(max(sizes.values())),
        "cuts": link.cuts,
        "seconds": seconds,
        "floor_s": sum(sizes.values()) / (line.kbit * 125),
        "up": _way(sizes["up"], up),
        "down": _way(sizes["down"], down),
    }


def _settings(testbed: Path, loopback: Loopback, mebibytes: float) -> Config:
    values = sum(m + n for m, n in shapes(testbed).values())
    own = [
        f"federation.participants={[SITE]}",
        "federation.num_rounds=1",
        "training.max_steps=1",
        "training.per_device_train_batch_size=2",
        "method.name=fedit",
        "wire.values=fp32",
        f"lora.r={max(1, round(mebibytes * 2**20 / 4 / values))}",
        "flower.min_replies=1",
        "flower.deadline=3600",
        "flower.grace=3600",
    ]
    return settings(testbed, *own, *loopback.overrides())


def _start(loopback: Loopback, config: Config, port: int) -> None:
    """All processes, the node at the other end of the line."""
    loopback.worker(SITE)
    loopback.superlink()
    with launch.open_control(config) as client:
        register_node(client, SITE, (loopback.folder / f"fed/server/nodes/{SITE}.pub").read_bytes())
    file = loopback.folder / "fed/sites" / SITE / "SITE.toml"
    file.write_text(file.read_text().replace(f'"{loopback.address}"', f'"127.0.0.1:{port}"'))
    loopback.node(SITE)


def _way(payload: int, lane: Lane) -> dict[str, int]:
    return {"payload": payload, "passed": lane.passed, "beside": lane.passed - payload}


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The result for a terminal."""
    line = result["line"]
    title = (
        f"{line['kbit']:g} kbit/s, {line['rtt']:g} ms there and back, {100 * line['loss']:g} % lost, {result['cuts']} "
        f"cuts of {line['outage']:g} s; pieces of {result['piece'] / 1024:,.0f} KiB, {AT_ONCE} at once"
    )
    caption = f"{result['seconds']:,.0f} s from start to end; {result['floor_s']:,.0f} s of them for the bytes alone"
    table = Table(
        "way", "payload, bytes", "over the line, bytes", "beside the payload, bytes", title=title, caption=caption
    )
    for way in ("up", "down"):
        table.add_row(way, *(f"{result[way][key]:,}" for key in ("payload", "passed", "beside")))
    yield table
