"""A federation of real processes over TLS: where the time of a round goes, and what carrying the messages costs.

Sites train one step, so that a round is what is around it. All processes are on this machine and tell the time by one
clock: the server's log has when a site was sent its turn and when its update was there, the worker's when it began and
was done. What lies between those is Flower's transport, and the looks for messages at both ends of it.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from benchmarks.loopback import Loopback, WayIn
from fedloom.flower import launch
from fedloom.records.config import Config
from fedloom.records.configfile import load_config

RUN = "benchmark"


def run(*, sites: int = 2, rounds: int = 8, way: WayIn = "node") -> dict[str, Any]:
    """Medians over all rounds but the first, in seconds; of the sites in a round the one that took longest."""
    names = [f"site-{number:02d}" for number in range(1, sites + 1)]
    with resources.as_file(resources.files("fedloom") / "testbeds") as testbed, tempfile.TemporaryDirectory() as folder:
        data = str(testbed / "data" / "bank")
        with Loopback(Path(folder), names, testbed / "model", data, way=way) as loopback:
            config = settings(testbed, names, rounds, loopback)
            loopback.everything(config, names)
            launch.run_on_superlink(config, Path(folder) / RUN)
            memory = resident(loopback, names[0])
            cpu = {name: processor_seconds(loopback.started[name].pid) for name in loopback.started}
            times = list(read_times(loopback, Path(folder) / RUN, names))
    return summarise(times, cpu, names) | {"way": way, "sites": sites, "rounds": rounds, "memory_mb": memory}


def settings(testbed: Path, names: Sequence[str], rounds: int, loopback: Loopback) -> Config:
    """The demo's settings for these sites, one step a round."""
    own = [
        f"federation.participants={list(names)}",
        f"federation.num_rounds={rounds}",
        "federation.eval_every=0",
        "data.heldout=null",
        "training.max_steps=1",
        f"flower.min_replies={len(names)}",
        "flower.deadline=300",
    ]
    return load_config(testbed / "demo.toml", [*own, *loopback.overrides()])


def resident(loopback: Loopback, site: str) -> float:
    """MB in memory of what carries a site's messages, with all processes that it has started."""
    process = psutil.Process(loopback.started[f"node-{site}"].pid)
    return float(sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))) / 1e6


def processor_seconds(pid: int) -> float:
    """User and system time of a process and of all that it has started, those that have ended included."""
    process = psutil.Process(pid)
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        spent = one.cpu_times()
        total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


def read_times(loopback: Loopback, run: Path, names: Sequence[str]) -> Iterator[dict[str, float]]:
    """(round, site) by (round, site): the moments of its turn, in seconds since 1970, and how long it trained."""
    sent: dict[tuple[int, str], float] = {}
    came: dict[tuple[int, str], float] = {}
    trained: dict[tuple[int, str], float] = {}
    for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        at = datetime.fromisoformat(row["time"]).timestamp()
        key = (row.get("round", 0), row.get("client", ""))
        if row["event"] == "training":
            trained[key] = row["seconds"]
        elif row["event"] == "transfer":
            # Of the first round nothing is counted: it has several broadcasts, and workers that load the model.
            (sent if row["direction"] == "down" else came)[key] = at
    for site in names:
        for round, (began, done) in enumerate(turns_of(loopback.log(f"worker-{site}")), start=1):
            key = (round, site)
            if key in came and key in trained:
                yield {
                    "round": round,
                    "sent": sent.get(key, 0.0),
                    "began": began,
                    "done": done,
                    "came": came[key],
                    "trained": trained[key],
                }


def turns_of(log: Path) -> Iterator[tuple[float, float]]:
    """When each turn was begun and done, by the worker's log."""
    began = 0.0
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        match = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) \w+ turn (of job|answered)", line)
        if match:
            at = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(match[2]) / 1000
            if match[3] == "of job":
                began = at
            else:
                yield began, at


def summarise(times: Sequence[Mapping[str, float]], cpu: Mapping[str, float], names: Sequence[str]) -> dict[str, Any]:
    """Medians over the rounds, and processor seconds a message: a request and its reply."""
    rounds = sorted({int(turn["round"]) for turn in times})
    ends = {round: max(turn["came"] for turn in times if turn["round"] == round) for round in rounds}
    parts: dict[str, list[float]] = {name: [] for name, _ in ROWS if name.endswith("_s") and not name.startswith("cpu")}
    for round in rounds[1:]:
        mine = [turn for turn in times if turn["round"] == round]
        trained = max(turn["trained"] for turn in mine)
        parts["round_s"].append(ends[round] - ends[round - 1])
        parts["training_s"].append(trained)
        parts["beyond_s"].append(ends[round] - ends[round - 1] - trained)
        parts["to_begin_s"].append(max(turn["began"] - turn["sent"] for turn in mine))
        parts["worker_s"].append(max(turn["done"] - turn["began"] - turn["trained"] for turn in mine))
        parts["back_s"].append(max(turn["came"] - turn["done"] for turn in mine))
        parts["server_s"].append(min(turn["sent"] for turn in mine) - ends[round - 1])
    carried = sum(spent for name, spent in cpu.items() if name.startswith("node-"))
    requests = len(names) * (len(rounds) + 2)  # a greeting before the rounds, the result after them
    return {
        **{name: statistics.median(seconds) for name, seconds in parts.items()},
        "cpu_message_s": carried / requests,
        "cpu_superlink_s": cpu["superlink"] / requests,
    }


ROWS = (
    ("way", "carried by"),
    ("sites", "sites"),
    ("rounds", "rounds"),
    ("round_s", "from round to round, s"),
    ("training_s", "of that training, s"),
    ("beyond_s", "beyond training, s"),
    ("to_begin_s", "from sent to begun, s (Flower's transport, looks for messages)"),
    ("worker_s", "in the worker beside training, s"),
    ("back_s", "from done to the server, s (Flower's transport, looks for messages)"),
    ("server_s", "at the server between two rounds, s"),
    ("cpu_message_s", "processor time of carrying, s a request with its start"),
    ("cpu_superlink_s", "processor time of SuperLink and server app, s a request"),
    ("memory_mb", "memory of what carries a site's messages, MB"),
)


def tables(result: Mapping[str, Any]) -> Iterable[Table]:
    """The measurements for a terminal."""
    table = Table("what", "measured", title="where a round's time goes")
    for key, words in ROWS:
        value = result[key]
        table.add_row(words, f"{value:,.2f}" if isinstance(value, float) else str(value))
    yield table
