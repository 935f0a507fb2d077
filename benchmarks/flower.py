"""What Flower's engine costs beside training, and whether the ledger counts what Flower moves.

`overhead`: rounds between the ServerApp's code and warm workers, over the workers' sockets but without Flower's
transport and its polling, less the training itself; beside it a worker that is started cold for its turn, as a
ClientApp that loaded the model itself would be, and the bare start of a ClientApp.
`traffic`: a federation of real processes over TLS, with payloads of 64 MiB; the ledger against the SuperLink's own
count of the run's bytes.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.loopback import Loopback
from fedloom.flower import launch
from fedloom.flower.relay import Ask
from fedloom.flower.simulated.direct import DirectGrid
from fedloom.flower.sites import run_federation
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.records.ledger import Roll, Training, Transfer, read_rows, totals
from fedloom.site.calling import call_worker
from fedloom.site.protocol import Parcel

SITES = ("bank", "depot")


def run(*, rounds: int = 6, mebibytes: float = 88.0, traffic: bool = True) -> dict[str, Any]:
    """Both measurements; seconds and bytes. `traffic` false leaves the second out.

    mebibytes: of the adapter's values in fp32; FedIT's payload of them is about three quarters of that.
    """
    with resources.as_file(resources.files("fedloom") / "testbeds") as testbed, tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"overhead": overhead(testbed, Path(folder) / "a", rounds)}
        if traffic:
            result["traffic"] = traffic_of(testbed, Path(folder) / "b", mebibytes)
    return result


def settings(testbed: Path, *overrides: str) -> Config:
    """The demo's settings for two sites, without evaluation."""
    own = ["federation.eval_every=0", "data.heldout=null", f"federation.participants={list(SITES)}"]
    return load_config(testbed / "demo.toml", [*own, *overrides])


class Watch(Silent):
    """Notes when each round ended; from one end to the next lie a checkpoint and a whole round."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}

    def round_finished(
        self, round: int, num_rounds: int, scores: object, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """Take the time."""
        self.ends[round] = time.perf_counter()


def overhead(testbed: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a round outside training, warm; of a turn of a cold worker; of a ClientApp's start."""
    folder.mkdir()
    config = settings(testbed, f"federation.num_rounds={rounds}", "flower.min_replies=1")
    with Loopback(folder, SITES, testbed / "model", str(testbed / "data" / "{site}")) as loopback:
        for site in SITES:
            loopback.worker(site)
        places = {site: loopback.folder / "fed/sites" / site for site in SITES}
        asks: dict[str, Ask] = {site: partial(_ask, place) for site, place in places.items()}
        watch = Watch()
        run_federation(DirectGrid(config, asks), config, folder / "run", observer=watch)
        rows = read_rows(folder / "run" / "ledger.jsonl")
    trained = {(row.round, row.client): row.seconds for row in rows if isinstance(row, Training)}
    spans = [
        watch.ends[round] - watch.ends[round - 1] - sum(trained[round, site] for site in SITES)
        for round in range(2, rounds + 1)
    ]
    return {
        "sites": len(SITES),
        "rounds": rounds,
        "overhead_s": statistics.median(spans),
        "training_s": statistics.median(trained.values()),
        "clientapp_start_s": seconds_of("import fedloom.flower.relay"),
        "cold_s": seconds_of(COLD.format(testbed=str(testbed))),
    }


def _ask(place: Path, parcel: Parcel, context: object) -> Parcel:
    return call_worker(parcel, place / "worker.sock", place / "worker.token")


COLD = """
from pathlib import Path
from benchmarks.flower import settings
from fedloom.model.sources import load_examples
from fedloom.workspace.assemble import build_setup
import fedloom.flower.relay
testbed = Path({testbed!r})
mine = load_examples(testbed / "data" / "bank")
build_setup(settings(testbed), {{"bank": mine, "depot": []}}, {{}})
"""
"""What a ClientApp without a worker would do before it could train: libraries, base model, examples in tokens."""


def seconds_of(code: str, repeats: int = 3) -> float:
    """The median wall time of a fresh interpreter that runs `code`."""
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def traffic_of(testbed: Path, folder: Path, mebibytes: float) -> dict[str, Any]:
    """Bytes of a run of two rounds by our ledger and by the SuperLink, and the wall time of a payload's way."""
    folder.mkdir()
    values = sum(m + n for m, n in shapes(testbed).values())
    rank = max(1, round(mebibytes * 2**20 / 4 / values))
    own = [
        "federation.num_rounds=2",
        "training.max_steps=1",
        "training.per_device_train_batch_size=2",
        "method.name=fedit",
        "wire.values=fp32",
        f"lora.r={rank}",
    ]
    with Loopback(folder, SITES, testbed / "model", str(testbed / "data" / "{site}")) as loopback:
        config = settings(testbed, *own, *loopback.overrides())
        loopback.everything(config, SITES)
        state = launch.run_on_superlink(config, folder / "run")
        rows = read_rows(folder / "run" / "ledger.jsonl")
    sums = totals(rows)
    transfers = [row for row in rows if isinstance(row, Transfer)]
    # Every site is greeted, trains twice and receives the result; each time a request and a reply.
    messages = 2 * len(SITES) * (1 + 2 + 1)
    flower = state.bytes_sent + state.bytes_received
    return {
        "rank": rank,
        "largest_payload": max(row.bytes for row in transfers),
        "messages": messages,
        "ledger_up": sums.bytes_up,
        "ledger_down": sums.bytes_down,
        "flower_up": state.bytes_received,
        "flower_down": state.bytes_sent,
        "difference": flower - sums.bytes,
        "allowed": sums.bytes // 100 + 2000 * messages,
        "round_s": [row.seconds for row in rows if isinstance(row, Roll)],
    }


def shapes(testbed: Path) -> Mapping[str, tuple[int, int]]:
    """(m, n) of every module that the demo adapts."""
    from fedloom.workspace.assemble import build_setup

    return {
        name: pair.shape for name, pair in build_setup(settings(testbed), dict.fromkeys(SITES, []), {}).initial.items()
    }


def tables(result: Mapping[str, Any]) -> Iterable[Table]:
    """The measurements for a terminal."""
    yield _pairs("a round beside its training", OVERHEAD, result["overhead"])
    if "traffic" in result:
        yield _pairs("bytes of a run over TLS", TRAFFIC, result["traffic"])


OVERHEAD = (
    ("sites", "sites, warm workers"),
    ("training_s", "training of one site, s"),
    ("overhead_s", "a round outside training and Flower's transport, s"),
    ("clientapp_start_s", "start of a ClientApp, which Flower adds to every message, s"),
    ("cold_s", "the same with libraries, model and data loaded in it, s"),
)
TRAFFIC = (
    ("largest_payload", "largest payload, bytes"),
    ("messages", "messages"),
    ("ledger_up", "up, ledger"),
    ("flower_up", "up, SuperLink's count"),
    ("ledger_down", "down, ledger"),
    ("flower_down", "down, SuperLink's count"),
    ("difference", "difference, bytes"),
    ("allowed", "1 % + 2 KB a message, bytes"),
    ("round_s", "rounds, s"),
)


def _pairs(title: str, names: Sequence[tuple[str, str]], values: Mapping[str, Any]) -> Table:
    table = Table("what", "measured", title=title)
    for key, words in names:
        held = values[key] if isinstance(values[key], list) else [values[key]]
        table.add_row(words, ", ".join(f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" for v in held))
    return table
