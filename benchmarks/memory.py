"""How much memory a round takes in a worker and in the server app, beside what they take at rest.

A run is played once, and all that goes between the server app and two sites is kept in files. Then it is played again
by the server app alone, and by one site's desk alone, each against those files, and the kernel is asked for the peak
of the process (VmHWM) meanwhile. All is the real thing but two: Flower's transport is left out, and training, which
adds noise to the adapter, since what an optimiser holds is not the protocol's.
"""

from __future__ import annotations

import ctypes
import gc
import json
import socket
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from rich.table import Table

from benchmarks.made_up_runs import NoisySetup
from fedloom.compress.quantize import quantize
from fedloom.errors import RoundError
from fedloom.flower.fleet import Fleet
from fedloom.flower.messages import Grid
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.flower.settings import shared_settings
from fedloom.flower.simulated.direct import DirectNode
from fedloom.flower.sites import FlowerSites
from fedloom.lora.pair import initial_state
from fedloom.methods.table import build
from fedloom.model.identity import base_digest
from fedloom.model.placement import Adapter, Placement
from fedloom.model.tokens import TokenizedExamples, Tokens
from fedloom.records.config import Config, LoraSettings
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.records.ledger import Transfer, read_rows
from fedloom.rounds.job import Job
from fedloom.server.loop import Rounds
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import MAGIC, Fact, Parcel, receive_parcel, send_parcel
from fedloom.site.rules import Policy
from fedloom.testbeds import testbed_folder
from fedloom.workspace.assemble import Setup
from fedloom.workspace.clients import LocalClient
from fedloom.workspace.folder import RunFolder

SITES = ("bank", "depot")
SIDE, MODULES = 2048, 32
"""The adapter's modules are square, and there are so many of them."""
SMALL = 0.5
"""MiB of the adapter of the run before."""
MIB = 2**20


def run(sizes: Sequence[float], *, method: str = "fedit", values: str = "fp32", rounds: int = 3) -> dict[str, Any]:
    """{"method", "values", "rounds", "rows": one for each size, an fp32 adapter of so many MiB}, in bytes."""
    own = (f"method.name={method}", f"wire.values={values}")
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(Path(scratch) / str(number), size, own, rounds) for number, size in enumerate((SMALL, *sizes))]
    return {"method": method, "values": values, "rounds": rounds, "rows": rows[1:]}  # the first loaded libraries


def measure(folder: Path, size: float, own: Sequence[str], rounds: int) -> dict[str, Any]:
    """Idle and peak of the server app and of one site, for one adapter."""
    config = settings(size, rounds, own)
    desks = {name: Desk(site_config(folder, name), assembled=made_up_setup) for name in SITES}
    play(config, folder / "first", Recording(config, desks, folder / "kept"))
    desks.clear()
    desk = Desk(site_config(folder / "again", SITES[0]), assembled=made_up_setup)
    replayed = Replayed(folder / "kept")
    took = {
        "server": watch(lambda: play(config, folder / "run", replayed)),
        "worker": watch(lambda: replay_site(desk, folder / "kept")),
    }
    desk.close()
    adapter = config.lora.r * MODULES * 2 * SIDE * 4
    for held in took.values():
        held["adapters"] = (held["peak"] - held["idle"]) / adapter
    sent = [row.bytes for row in read_rows(folder / "run" / "ledger.jsonl") if isinstance(row, Transfer)]
    return {"adapter": adapter, "payload": max(sent), **took}


def watch(call: Callable[[], object]) -> dict[str, Any]:
    """Bytes that the process had resident before the call, at most during it, and after it."""
    tidy()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    idle = read_status("VmRSS")
    call()
    peak = read_status("VmHWM")
    tidy()
    return {"idle": idle, "peak": peak, "after": read_status("VmRSS")}


def tidy() -> None:
    """Give back to the system what is free."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def read_status(key: str) -> int:
    """A size in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def play(config: Config, out: Path, grid: Grid) -> None:
    """All rounds of the server app, with the sites that the grid reaches."""
    with RunFolder.open(out, config) as folder:
        prepare(folder, grid).play(resume=False)


def prepare(folder: RunFolder, grid: Grid) -> Rounds:
    """As `flower.sites.prepare_rounds` does, but with the made-up setup."""
    setup = made_up_setup(folder.config)
    facts = {"job": "0123456789abcdef", "base": base_digest(folder.config.model.path)}
    outlined = setup.outlined().with_files_in(folder.path)
    fleet = Fleet(grid, facts, SITES, expects=4 * setup.initial.numel())
    return Rounds(outlined, folder, Silent(), FlowerSites(outlined, fleet), first=setup.initial)


def replay_site(desk: Desk, kept: Path) -> None:
    """Every request to a site once more, over a socket, as its worker would take it."""
    for path in sorted(kept.glob(f"*-{desk.site.name}-request.json")):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            sender = Thread(target=_send_kept, args=(theirs, path), daemon=True)
            sender.start()
            reply = desk.answer(receive_parcel(ours, folder=Path(desk.site.state)).used_up())
            sender.join()
            told = json.loads(path.with_name(path.name.replace("request", "reply")).read_text(encoding="utf-8"))
            if reply.facts.get("digest") != told["facts"].get("digest") or "error" in reply.facts:
                raise RoundError(f"{path.name} is answered in another way than before: {reply.facts.get('error')}")
            reader = Thread(target=_drain, args=(theirs,), daemon=True)
            reader.start()
            send_parcel(ours, reply)
            ours.shutdown(socket.SHUT_WR)
            reader.join()
            del reply  # a worker holds none while it waits for a request


def _send_kept(connection: socket.socket, path: Path) -> None:
    told = json.loads(path.read_text(encoding="utf-8"))
    head = json.dumps({"facts": told["facts"], "sizes": told["sizes"]}).encode()
    connection.sendall(MAGIC + struct.pack(">I", len(head)) + head)
    with path.with_suffix(".bin").open("rb") as file:
        connection.sendfile(file)


def _drain(connection: socket.socket) -> None:
    while connection.recv(2**16):
        pass


def _keep(path: Path, parcel: Parcel) -> None:
    path.parent.mkdir(exist_ok=True)
    head = {"facts": dict(parcel.facts), "sizes": [len(payload) for payload in parcel.payloads]}
    path.with_suffix(".bin").write_bytes(b"".join(parcel.payloads))
    path.with_suffix(".json").write_text(json.dumps(head), encoding="utf-8")


def _name(facts: Mapping[str, Fact], site: str) -> str:
    """In the order of a run."""
    return f"{facts['round']}-{('hello', 'turn', 'deliver').index(str(facts['ask']))}-{site}"


@dataclass(eq=False)
class Replayed:
    """What the server app sees of Flower: requests are dropped, and the answers are those that were kept."""

    kept: Path
    nodes: Sequence[DirectNode] = tuple(DirectNode(number, name) for number, name in enumerate(SITES, start=2))
    replies: dict[str, tuple[Message, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # as Flower's runtime would

    def get_nodes(self) -> Iterable[DirectNode]:
        """Both."""
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take each message, and its content away."""
        found = []
        for message in messages:
            identifier, site = message.object_id, self.nodes[message.metadata.dst_node_id - 2].name
            message.metadata.__dict__["_message_id"] = identifier
            self.answer(message, site)
            facts = unpack_parcel(message.content).facts
            self.replies[identifier] = message, f"{_name(facts, site)}-reply"
            message.content = RecordDict()
            found.append(identifier)
        return found

    def answer(self, message: Message, site: str) -> None:
        """Nobody is asked."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that were not fetched yet."""
        for identifier in message_ids:
            if identifier in self.replies:
                message, name = self.replies.pop(identifier)
                told = json.loads((self.kept / f"{name}.json").read_text(encoding="utf-8"))
                content = (self.kept / f"{name}.bin").read_bytes()
                yield Message(pack_parcel(Parcel(told["facts"], (content,) if content else ())), reply_to=message)


class Recording(Replayed):
    """The same with desks that answer, and whose answers are kept."""

    def __init__(self, config: Config, desks: Mapping[str, Desk], kept: Path) -> None:
        super().__init__(kept)
        self.settings, self.desks = shared_settings(config), desks

    def answer(self, message: Message, site: str) -> None:
        """Ask the site's desk, and keep both what it is told and what it says."""
        parcel = unpack_parcel(message.content)
        asked = Parcel({**parcel.facts, "settings": self.settings}, parcel.payloads)
        name = _name(asked.facts, site)
        _keep(self.kept / f"{name}-request", asked)
        _keep(self.kept / f"{name}-reply", self.desks[site].answer(asked))


def settings(mebibytes: float, rounds: int, own: Sequence[str]) -> Config:
    """Those of a run whose adapter takes so many MiB in fp32; its rank is what says so to the sites."""
    rank = max(1, round(mebibytes * MIB / 4 / (MODULES * 2 * SIDE)))
    asked = [
        f"federation.num_rounds={rounds}",
        f"federation.participants={list(SITES)}",
        "federation.eval_every=0",
        "data.heldout=null",
        "output.answers=0",
        "flower.deadline=60",
        "flower.min_replies=2",
        f"lora.r={rank}",
    ]
    return load_config(testbed_folder() / "demo.toml", [*asked, *own])


def site_config(folder: Path, name: str) -> SiteConfig:
    """A site that gives everything."""
    return SiteConfig(
        name=name,
        model=str(testbed_folder() / "model"),
        data="",
        device="cpu",
        threads=1,
        state=str(folder / name),
        policy=Policy(order="run"),
    )


def made_up_setup(config: Config) -> Setup:
    """What `build_setup` would make of the settings, were there a model of these modules."""
    torch.set_num_threads(1)
    shapes = {f"layers.{number}.proj": (SIDE, SIDE) for number in range(MODULES)}
    adapter = Adapter(LoraSettings(r=config.lora.r), {n: Placement(s, config.lora.r, 1.0) for n, s in shapes.items()})
    method = build(config.method.name, config.method.settings)
    form = method.form(None) if config.wire.values == "auto" else config.wire.values
    ranks = dict.fromkeys(shapes, config.lora.r)
    job = Job(method, 0, quantize(form), ranks=dict.fromkeys(SITES, ranks), num_rounds=config.federation.num_rounds)
    examples = TokenizedExamples((Tokens(torch.ones(2, dtype=torch.int64), 1, whole=True),) * 3, 0)
    sites = {name: LocalClient(adapter, examples) for name in SITES}
    initial = initial_state(shapes, ranks, 0)
    return NoisySetup(config, job, None, adapter, initial, sites, None, "made up")  # type: ignore[arg-type]


def tables(result: Mapping[str, Any]) -> Iterable[Table]:
    """A row for each size and process."""
    title = f"{result['method']}, {result['values']}: memory of {result['rounds']} rounds of {len(SITES)} sites, MiB"
    table = Table("adapter", "payload", "process", "idle", "peak", "after", "(peak - idle) / adapter", title=title)
    for row in result["rows"]:
        for who in ("worker", "server"):
            sizes = [row[who][key] for key in ("idle", "peak", "after")]
            first = [f"{row[key] / MIB:.1f}" for key in ("adapter", "payload")]
            table.add_row(*first, who, *(f"{size / MIB:.0f}" for size in sizes), f"{row[who]['adapters']:.2f}")
    yield table
