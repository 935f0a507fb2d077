"""What a client's turn costs beside its training steps: the whole turn against a bare loop over the same batches."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.made_up import made_up_base
from benchmarks.stages import STAGES, STEPS, Stopwatch, watch_method, watch_turn
from fedloom.errors import ConfigError
from fedloom.methods.method import State
from fedloom.model import peft_bridge
from fedloom.model.tokens import TokenizedExamples, Tokens
from fedloom.model.training import rate_at
from fedloom.records.config import Config, TrainingSettings
from fedloom.rounds.turns import ClientTurn, accept, client_turn, server_turn, start
from fedloom.site.store import Store, TurnRecord
from fedloom.workspace.assemble import Setup, build_setup, load_setup
from fedloom.workspace.data import client_examples
from fedloom.workspace.participants import select_participants

ROUND = 4
"""The round that is measured: a client remembers earlier ones, and a payload is of their kind. In the first, B is 0."""


def run(configs: Sequence[Config], *, model: str = "", clients: Sequence[str] = (), repeats: int = 5) -> dict[str, Any]:
    """{"rows": one for each of the settings and each client, "rounds": one for each of the settings, "threads": …}.

    Medians over interleaved repeats, of the processor, all threads. turn_cpu_s: receive a broadcast, train, choose,
    encode, and save the site's state. stages: of these, by stage (`stages.STAGES`). bare_cpu_s: forward, backward,
    clipping and AdamW over the very batches of the turn, nothing else. times_bare: a turn over the loop that followed
    it. beside_cpu_s: all stages but the steps; of_ten_steps: over the time of ten steps. send_cpu_s: choosing and
    encoding; send_share: over the training. clock: turn, beside and of_ten_steps on the wall. prepare_s: loading, too.
    A round is the turns of these clients and server_cpu_s, the server's; its times_bare: over their bare loops.

    clients: by name; all if left out. model: a made-up one (`made_up.SHAPES`) in place of the settings' own.
    """
    rows, rounds = [], []
    for config in configs:
        begun = time.perf_counter()
        setup = prepare(config, model)
        prepared = time.perf_counter() - begun
        names = clients or tuple(setup.sites)
        with tempfile.TemporaryDirectory() as scratch:
            played = Played.until(setup, names, Path(scratch))
            own = [{**measure(one, repeats), "prepare_s": prepared} for one in played]
            rounds.append(whole_round(played, own, repeats))
            for one in played:
                one.store.close()
        rows += own
    return {"rows": rows, "rounds": rounds, "threads": torch.get_num_threads()}


def prepare(config: Config, model: str) -> Setup:
    """The things of the run, on the settings' own model or on a made-up one."""
    if not model:
        return load_setup(config)
    texts = select_participants(client_examples(config)[0], config.federation.participants)
    return build_setup(config, texts, {}, load=made_up_base(model))


def whole_round(played: Sequence[Played], rows: Sequence[Mapping[str, Any]], repeats: int) -> dict[str, Any]:
    """The row of the round that these turns make, with the server's turn at its end."""
    first = played[0]
    payloads = {one.client: one.play(Drawn.of(one.setup.sites[one.client].data), Stopwatch())[1] for one in played}
    taken = []
    for _ in range(repeats + 1):
        begun = time.process_time()
        server_turn(first.setup.job, first.server, payloads, ROUND)
        taken.append(time.process_time() - begun)
    server = statistics.median(taken[1:])  # the first one warms up
    turns, bare = (sum(row[key] for row in rows) for key in ("turn_cpu_s", "bare_cpu_s"))
    return {
        "method": first.setup.job.method.name,
        "clients": len(rows),
        "turns_cpu_s": turns,
        "server_cpu_s": server,
        "bare_cpu_s": bare,
        "times_bare": (turns + server) / bare,
    }


def measure(played: Played, repeats: int) -> dict[str, Any]:
    """One row."""
    setup, client = played.setup, played.client
    taken = [played.again() for _ in range(repeats + 1)][1:]  # the first one warms up
    middle = {key: statistics.median(one[key] for one in taken) for key in taken[0]}
    # Of every turn and the loop right after it: what slows the machine down for a while slows both.
    times_bare = statistics.median(one["turn_cpu_s"] / one["bare_cpu_s"] for one in taken)
    stages = {stage: middle.pop(stage) for stage in STAGES}
    turn_s, steps_s = middle.pop("turn_s"), middle.pop("steps_s")
    clock = {"turn_s": turn_s, "beside_s": turn_s - steps_s}
    clock["of_ten_steps"] = clock["beside_s"] / (10 * steps_s / played.steps)
    beside = sum(seconds for stage, seconds in stages.items() if stage != STEPS)
    sent = stages["choose"] + stages["encode"]
    return {
        "client": client,
        "method": setup.job.method.name,
        "values": setup.initial.numel(),
        "up_bytes": len(played.turn.payload),
        "steps": played.steps,
        **middle,
        "stages": stages,
        "times_bare": times_bare,
        "beside_cpu_s": beside,
        "of_ten_steps": beside / (10 * stages[STEPS] / played.steps),
        "send_cpu_s": sent,
        "send_share": sent / sum(stages[stage] for stage in ("write", "trainer", STEPS, "read")),
        "clock": clock,
    }


@dataclass(frozen=True, eq=False)
class Played:
    """A client before the round that is measured: its last turn, and the broadcast that it has yet to receive.

    server: the server's state after that broadcast.
    """

    setup: Setup
    client: str
    store: Store
    turn: ClientTurn
    broadcast: bytes
    server: State

    @classmethod
    def until(cls, setup: Setup, clients: Sequence[str], folder: Path, last: int = ROUND) -> list[Played]:
        """Play the rounds before `last` with these clients. Their stores are below `folder`."""
        job, sites = setup.job, setup.sites
        server = start(job, setup.initial)
        states = {client: start(job, setup.initial, sites[client].ranks) for client in clients}
        broadcasts: tuple[bytes, ...] = ()
        for round in range(1, last):
            turns = {
                client: client_turn(job, client, state, broadcasts, setup.train(client), round)
                for client, state in states.items()
            }
            done = server_turn(job, server, {client: turn.payload for client, turn in turns.items()}, round)
            server, broadcasts = done.state, (done.payload,)
            states = {client: turn.state for client, turn in turns.items()}
        return [
            cls(setup, client, Store(folder / client, "made up"), turn, done.payload, server)
            for client, turn in turns.items()
        ]

    @property
    def training(self) -> TrainingSettings:
        """The client's settings, its steps counted."""
        return self.setup.config.training_of(self.client).for_examples(self.setup.sites[self.client].data.num_rows)

    @property
    def steps(self) -> int:
        """Of the optimiser, in a turn."""
        return self.training.steps

    def again(self) -> dict[str, float]:
        """One turn and one bare loop."""
        watch = Stopwatch()
        drawn = Drawn.of(self.setup.sites[self.client].data)
        turn_cpu_s, _ = self.play(drawn, watch)
        stages = dict.fromkeys(STAGES, 0.0) | watch.seconds
        clock = {"turn_s": sum(watch.clock.values()), "steps_s": watch.clock[STEPS]}
        return {"turn_cpu_s": turn_cpu_s, "bare_cpu_s": self.bare(drawn), **stages, **clock}

    def play(self, drawn: Drawn, watch: Stopwatch) -> tuple[float, bytes]:
        """CPU seconds of the turn, and what it sends."""
        setup = self.with_examples(drawn)
        job = replace(setup.job, method=watch_method(watch, setup.job.method))
        begun = time.process_time()
        with watch_turn(watch, setup.model), watch.during("rest"):
            with watch.during("receive"):
                state = accept(job, self.turn.state, self.broadcast)
            train = watch.around("write", setup.train(self.client))
            turn = client_turn(job, self.client, state, [], train, ROUND)
            with watch.during("keep"):
                self.store.save(TurnRecord(ROUND, state, turn.state, payload=turn.payload))
        return time.process_time() - begun, turn.payload

    def with_examples(self, data: TokenizedExamples) -> Setup:
        """The same things, the client's examples replaced."""
        mine = replace(self.setup.sites[self.client], data=data)
        return replace(self.setup, sites={**self.setup.sites, self.client: mine})

    def bare(self, drawn: Drawn) -> float:
        """CPU seconds of a plain loop over the batches that a turn drew; its adapter stays in the model."""
        training, model, plain = self.training, self.setup.model, drawn.plain
        peft_bridge.write_adapter(model, accept(self.setup.job, self.turn.state, self.broadcast).adapter)
        peft_bridge.set_frozen(model, None)
        factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate = rate_at(training, ROUND, self.setup.config.federation.num_rounds, 0)
        parts = training.gradient_accumulation_steps
        model.train()
        begun = time.process_time()
        optimizer = torch.optim.AdamW(factors, lr=rate, weight_decay=training.weight_decay)
        for number, batch in enumerate(drawn.batches[: training.steps * parts], start=1):
            (model(**plain.collate(batch)).loss / parts).backward()
            if number % parts == 0:
                torch.nn.utils.clip_grad_norm_(factors, training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
        taken = time.process_time() - begun
        model.eval()
        return taken


@dataclass(frozen=True, eq=False, slots=True)
class Drawn(TokenizedExamples):
    """A client's examples, and the batches that a training drew of them."""

    batches: list[Sequence[Tokens]] = field(default_factory=list)

    @classmethod
    def of(cls, data: TokenizedExamples) -> Drawn:
        """The same examples. Raises ConfigError for packed rows, of which no batches are noted."""
        if data.rows:
            raise ConfigError("the batches of packed rows are not noted: measure with data.packing = false")
        return cls(data.examples, data.pad)

    def __getitems__(self, places: Sequence[int]) -> list[Tokens]:
        """The examples of a batch, which torch's loader asks for at once; it is noted."""
        self.batches.append([self.examples[place] for place in places])
        return list(self.batches[-1])

    @property
    def plain(self) -> TokenizedExamples:
        """The examples, whose batches are not noted."""
        return TokenizedExamples(self.examples, self.pad)


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The rows for a terminal, CPU seconds but for the columns that name the clock."""
    title = f"a client's turn: CPU seconds, {result['threads']} threads"
    table = Table(title=title)
    names = ("client", "method", "values", "turn", "bare loop", "× bare", "beside steps", "of ten steps", "sending")
    clocked = ("turn, by the clock", "beside steps", "of ten steps")
    for number, name in enumerate((*names, *clocked)):
        table.add_column(name, justify="right" if number > 1 else "left")
    for row in result["rows"]:
        shares = f"{row['times_bare']:.3f}", f"{row['beside_cpu_s']:.3f}", f"{row['of_ten_steps']:.1%}"
        spent = f"{row['turn_cpu_s']:.3f}", f"{row['bare_cpu_s']:.3f}"
        clock = row["clock"]
        told = f"{clock['turn_s']:.3f}", f"{clock['beside_s']:.3f}", f"{clock['of_ten_steps']:.1%}"
        sending = f"{row['send_cpu_s']:.3f}"
        table.add_row(row["client"], row["method"], f"{row['values']:,}", *spent, *shares, sending, *told)
    yield table
    table = Table(title="of these, by stage")
    for number, name in enumerate(("client", "method", *STAGES)):
        table.add_column(name, justify="right" if number > 1 else "left")
    for row in result["rows"]:
        table.add_row(row["client"], row["method"], *(f"{row['stages'][stage]:.3f}" for stage in STAGES))
    yield table
    table = Table(title="the round of these turns")
    for number, name in enumerate(("method", "clients", "turns", "server", "bare loops", "× bare")):
        table.add_column(name, justify="right" if number else "left")
    for row in result["rounds"]:
        seconds = (f"{row[key]:.3f}" for key in ("turns_cpu_s", "server_cpu_s", "bare_cpu_s", "times_bare"))
        table.add_row(row["method"], str(row["clients"]), *seconds)
    yield table
