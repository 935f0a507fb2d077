"""`python -m benchmarks wan`: the wall time of a round over a slow line, method by method.

A round is played by the real `client_turn` and `server_turn` on an adapter of true shapes with synthetic, heavy-tailed
changes, each client's drawn from its own seed; its payloads cross a shaped line (`benchmarks.link`) in pieces over two
connections, as Flower moves them. Training is left out: it is the same for all. Client and server are told in seconds
of processor time, so that other work on the machine does not count; the line in seconds on the wall.
"""

from __future__ import annotations

import hashlib
import http.client
import http.server
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from torch import Tensor

from benchmarks.link import Lane, Link
from benchmarks.wire import heavy_tailed
from fedloom.compress.quantize import quantize
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError, WireError
from fedloom.flower.payload import piece_size
from fedloom.lora.pair import LoraPair, LoraState, initial_state
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.rounds.job import Job
from fedloom.rounds.step import Trained
from fedloom.rounds.turns import ClientTurn, client_turn, server_turn, start
from fedloom.server.spool import Spool
from fedloom.studies.estimate.presets import preset_named, preset_shapes

CONNECTIONS = 2
"""Requests at the same time, as in flwr 1.41."""


@dataclass(frozen=True, slots=True)
class Line:
    """What a site is connected by: Mbit/s up and down, milliseconds there and back."""

    up: float = 10.0
    down: float = 50.0
    rtt: float = 80.0

    def lanes(self, scale: float) -> tuple[Lane, Lane]:
        """The two directions of a line that is `scale` times as fast in everything."""
        delay = self.rtt / 2000 / scale
        return Lane(scale * self.up * 125_000, delay), Lane(scale * self.down * 125_000, delay)


@dataclass(frozen=True, slots=True)
class Row:
    """One method under one coding. Sizes in bytes; seconds of the client (all but training), the line, the server.

    floor_s: what the line's rates alone allow. total_s: client, line, server. scale: of the line, times counted back.
    """

    method: str
    values: str
    down_bytes: int
    up_bytes: int
    client_s: float
    down_s: float
    up_s: float
    server_s: float
    floor_s: float
    total_s: float
    scale: float


@dataclass(frozen=True, eq=False, slots=True)
class Workload:
    """An adapter, and the change that training it makes in a round."""

    before: LoraState
    change: LoraState


@dataclass(frozen=True, eq=False, slots=True)
class Played:
    """A round's payloads and the seconds beside the line."""

    down: bytes
    up: bytes
    client_s: float
    server_s: float


def run(
    preset: str = "llama-3.2-3b",
    runs: Sequence[str] = ("fedit:fp32", "fedsrd:fp32", "fedsrd:bf16", "fedsrd:int8", "fedsrd:int4"),
    *,
    line: Line | None = None,
    clients: int = 4,
    rank: int | None = None,
    layers: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """{"workload": …, "rows": [Row as a dict, …]}. runs: METHOD:VALUES.

    scale > 1 measures on a line that is so many times as fast, delay included, and counts its seconds back. Raises
    ConfigError for an unknown preset, method or coding.
    """
    line = line or Line()
    modules = preset_shapes(preset_named(preset), layers=layers)
    width = preset_named(preset).rank if rank is None else rank
    rows, before = [], grown(modules, width, seed)
    for text in runs:
        method, colon, values = text.partition(":")
        if not colon:
            raise ConfigError(f"{text!r}: expected METHOD:VALUES, such as fedsrd:int8")
        rows.append(_row(method, values, played(method, values, before, clients, seed), line, scale))
    return {
        "workload": {
            "name": f"{preset}, rank {width}",
            "parameters": width * sum(m + n for m, n in modules.values()),
            "clients": clients,
            **asdict(line),
        },
        "rows": [asdict(row) for row in rows],
    }


def _row(method: str, values: str, round: Played, line: Line, scale: float) -> Row:
    up, down = line.lanes(scale)
    with _server(round.down) as port, Link(port, up, down) as link:
        down_s = scale * _timed(partial(_fetch, link.port, round.down))
        up_s = scale * _timed(partial(_push, link.port, round.up))
    floor = 8e-6 * (len(round.down) / line.down + len(round.up) / line.up)
    total = round.client_s + down_s + up_s + round.server_s
    sizes = len(round.down), len(round.up)
    return Row(method, values, *sizes, round.client_s, down_s, up_s, round.server_s, floor, total, scale)


def workload(modules: Mapping[str, tuple[int, int]], rank: int, seed: int, structured: bool = False) -> Workload:
    """`grown`, and a change of it. structured: changes have row and column structure, see `bench.wire`."""
    change = {
        module: LoraPair(
            *(heavy_tailed(shape, structured, derived_seed(seed, "change", module)) for shape in ((rank, n), (m, rank)))
        )
        for module, (m, n) in modules.items()
    }
    return Workload(grown(modules, rank, seed, structured), LoraState(change))


def grown(modules: Mapping[str, tuple[int, int]], rank: int, seed: int, structured: bool = False) -> LoraState:
    """A start whose B is not zero, as if some rounds had passed: no element of A is worth sending while B is."""
    fresh = initial_state(modules, dict.fromkeys(modules, rank), seed)
    return LoraState(
        {
            module: LoraPair(
                pair.A, heavy_tailed((pair.shape[0], rank), structured, derived_seed(seed, "grown", module))
            )
            for module, pair in fresh.items()
        }
    )


def changed(state: LoraState, seed: int) -> LoraState:
    """The adapter after a round of made-up training; another seed makes another change."""

    def moved(tensor: Tensor, *labels: str) -> Tensor:
        rows, columns = tensor.shape
        return heavy_tailed((rows, columns), False, derived_seed(seed, *labels)).add_(tensor)

    return LoraState(
        {name: LoraPair(moved(pair.A, name, "A"), moved(pair.B, name, "B")) for name, pair in state.items()}
    )


def played(method: str, values: str, before: LoraState, clients: int, seed: int) -> Played:
    """The second round of a run, whose download is the first one's outcome: one client's work, all clients' updates.

    Every client trains a change of its own. They are played one after the other and their payloads wait on disk, so
    that one client's adapters are in memory at a time. The first one alone remembers its first turn; the updates of
    the others are as large without.
    """
    job = Job(build(method), seed, quantize(values))
    server = fresh = known = start(job, before)
    down: tuple[bytes, ...] = ()
    for round in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            uploads = Spool[str](Path(folder))
            own, client_s = turn_of(job, "site-0", known, down, round)
            uploads["site-0"] = own.payload
            for number in range(1, clients):
                uploads[f"site-{number}"] = turn_of(job, f"site-{number}", fresh, down, round)[0].payload
            began = time.process_time()
            done = server_turn(job, server, uploads, round)
            server_s = time.process_time() - began
            if round == 2:
                break
            known, server, down = own.state, done.state, (done.payload,)
    return Played(down[0], own.payload, client_s, server_s)


def turn_of(job: Job, client: str, state: State, payloads: Sequence[bytes], round: int) -> tuple[ClientTurn, float]:
    """A client's turn, and its seconds of processor time without those of training."""
    training = 0.0

    def train(state: State, round: int, seed: int) -> Trained:
        nonlocal training
        began = time.process_time()
        after = changed(state.adapter, seed)
        training = time.process_time() - began
        return Trained(after, num_examples=1, loss=0.0)

    began = time.process_time()
    turn = client_turn(job, client, state, payloads, train, round)
    return turn, time.process_time() - began - training


@contextmanager
def _server(payload: bytes) -> Iterator[int]:
    """The port of a server that gives pieces of the payload, and takes pieces of another."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            begin = int(self.path[1:])
            self._reply(payload[begin : begin + piece_size(len(payload))])

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            self._reply(hashlib.sha256(content).digest())

        def _reply(self, content: bytes) -> None:
            self.send_response_only(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def _fetch(port: int, payload: bytes) -> None:
    begins = range(0, len(payload), piece_size(len(payload)))
    pieces = _over(port, begins, lambda line, begin: _exchange(line, "GET", begin, None))
    if b"".join(pieces) != payload:
        raise WireError("the line changed what it carried")


def _push(port: int, payload: bytes) -> None:
    size = piece_size(len(payload))

    def put(line: http.client.HTTPConnection, begin: int) -> bytes:
        piece = payload[begin : begin + size]
        if _exchange(line, "PUT", begin, piece) != hashlib.sha256(piece).digest():
            raise WireError("the line changed what it carried")
        return b""

    _over(port, range(0, len(payload), size), put)


def _exchange(line: http.client.HTTPConnection, verb: str, begin: int, body: bytes | None) -> bytes:
    line.request(verb, f"/{begin}", body)
    return line.getresponse().read()


def _over(port: int, begins: Sequence[int], call: Callable[[http.client.HTTPConnection, int], bytes]) -> list[bytes]:
    """The calls in order of `begins`, over as many connections at the same time as Flower has."""
    lines = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(CONNECTIONS)]

    def share(number: int) -> dict[int, bytes]:
        return {begin: call(lines[number], begin) for begin in begins[number::CONNECTIONS]}

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        found = {begin: piece for part in pool.map(share, range(CONNECTIONS)) for begin, piece in part.items()}
    for line in lines:
        line.close()
    return [found[begin] for begin in begins]


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The result for a terminal."""
    work, rows = result["workload"], result["rows"]
    title = (
        f"{work['name']}: {work['parameters']:,} parameters, {work['clients']} clients; each {work['up']:g} Mbit/s up, "
        f"{work['down']:g} down, {work['rtt']:g} ms there and back"
    )
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for column in ("method", "values"):
        table.add_column(column)
    names = ("down MiB", "up MiB", "client s", "down s", "up s", "server s", "round s", "× first", "floor s", "line")
    for column in names:
        table.add_column(column, justify="right")
    for row in rows:
        sizes = [f"{row[key] / 2**20:.2f}" for key in ("down_bytes", "up_bytes")]
        times = [f"{row[key]:.2f}" for key in ("client_s", "down_s", "up_s", "server_s", "total_s")]
        ratio = f"{rows[0]['total_s'] / row['total_s']:.1f}"
        line = "measured" if row["scale"] == 1 else f"measured × {row['scale']:g}"
        table.add_row(row["method"], row["values"], *sizes, *times, ratio, f"{row['floor_s']:.2f}", line)
    yield table
