"""A whole run of the in-process engine with a made-up training step, and what crosses between server and clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedloom.compress.entries import to_dense
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.model.placement import Adapter
from fedloom.model.volume import Volume
from fedloom.records.config import Config, LoraSettings
from fedloom.records.events import Observer, Silent
from fedloom.rounds.joint import split_entries
from fedloom.rounds.step import Train
from fedloom.rounds.turns import Job, start
from fedloom.server import local, loop
from fedloom.server.buffer import Buffer
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.server.roster import Roster
from fedloom.wire import decode
from fedloom.workspace.assemble import Setup
from fedloom.workspace.folder import RunFolder
from fedloom.workspace.privacy import plan_sums
from toy import SHAPES, client_seed, job, on_base, ranks, step, trainer


@dataclass(frozen=True)
class ToySetup:
    """Stands in for `setup.Setup`: no model, no data."""

    config: Config
    job: Job
    initial: LoraState
    sites: dict[str, SimpleNamespace]
    manifest: None = None
    fingerprint: str = "toy"
    adapter: Adapter = Adapter(LoraSettings(r=4, target_modules=sorted(SHAPES)), {})
    describe = Setup.describe
    data: Volume = Volume()

    def warnings(self) -> list[str]:
        return []

    def train(self, client: str) -> Train:
        return trainer(self.job.method)

    def evaluate(self, state: State) -> dict[str, object]:
        return {}

    def answer(self, state: State) -> list[object]:
        return []


def toy_setup(config: Config, clients: int, initial: LoraState) -> ToySetup:
    method = on_base(build(config.method.name, config.method.settings), initial)
    sites = {f"client-{index:04d}": SimpleNamespace(ranks=ranks(4)) for index in range(clients)}
    sums = plan_sums(config, method, {name: site.ranks for name, site in sites.items()})
    made = replace(job(method, weighting=config.federation.weighting), secure=sums)
    return ToySetup(config, made, initial, sites)


@contextmanager
def simulation(
    setup: ToySetup, out: Path, observer: Observer | None = None, resume: bool = False, force: bool = False
) -> Iterator[Rounds]:
    with RunFolder.open(out, setup.config, resume=resume, force=force) as folder:
        yield Rounds(setup, folder, observer or Silent(), LocalSites(setup))


def count_bytes(patch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts what crosses between server and clients, where it crosses, and knows nothing of the ledger.

    down: payloads that a client applies; up: those that a client's turn gives; heard: those that the server is given.
    """
    crossed: Counter[str] = Counter()
    receive, client_turn, server_turn = Roster.receive, local.client_turn, loop.server_turn

    def counted_receive(roster, client, payloads):
        crossed["down"] += sum(map(len, payloads))
        receive(roster, client, payloads)

    def counted_client(job, client, state, payloads, train, round):
        crossed["down"] += sum(map(len, payloads))
        turn = client_turn(job, client, state, payloads, train, round)
        crossed["up"] += len(turn.payload)
        return turn

    def counted_server(job, state, payloads, round, **options):
        crossed["heard"] += sum(map(len, payloads.values()))
        return server_turn(job, state, payloads, round, **options)

    patch.setattr(Roster, "receive", counted_receive)
    patch.setattr(local, "client_turn", counted_client)
    patch.setattr(loop, "server_turn", counted_server)
    return crossed


def counted(patch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """Client → the updates of its that the server takes into a step, from now on."""
    found: dict[str, list[bytes]] = {}
    take = Buffer.take

    def noting(self: Buffer) -> list:
        taken = take(self)
        for one in taken:
            found.setdefault(one.client, []).append(one.payload)
        return taken

    patch.setattr(Buffer, "take", noting)
    return found


def check_nothing_is_lost(setup, client: str, updates: list[bytes], memory) -> None:
    """What was sent and what is kept back add up to what the counted turns have changed, which is toy noise."""
    whole = {name: torch.zeros_like(tensor) for name, tensor in setup.initial.tensors().items()}
    left = {name: tensor.clone() for name, tensor in whole.items()}
    for payload in updates:
        message = decode(payload)
        state = start(setup.job, setup.initial)
        for name, entry in split_entries(message.entries, state).items():
            whole[name] += to_dense(entry)
        seed = client_seed(setup.job, client, message.header.round)
        after = step(state, message.header.round, seed).adapter.tensors()
        for name, tensor in after.items():
            left[name] += tensor - setup.initial.tensors()[name]
    for name, tensor in memory.items():
        whole[name] += tensor
    for name, tensor in whole.items():
        assert torch.allclose(tensor, left[name], atol=1e-4), f"{client} {name}"
