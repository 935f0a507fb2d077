"""`python -m benchmarks course`: what a run costs beside training, as its rounds and its clients become many.

The local engine plays a run whose training step only adds noise: everything else is the real thing, on disk too. Rounds
are told in seconds of processor time, from the end of one to the end of the next; the end of the run from the end of
its last round: everybody receives the result, and the run's folder is finished.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from fedloom.compress.quantize import quantize
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraPair, LoraState, initial_state
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.model.placement import Adapter, Placement
from fedloom.model.tokens import TokenizedExamples, Tokens
from fedloom.records.config import Config, LoraSettings
from fedloom.records.configfile import load_config
from fedloom.records.events import Silent
from fedloom.rounds.job import Job
from fedloom.rounds.step import Train, Trained
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.testbeds import testbed_folder
from fedloom.workspace.assemble import Setup
from fedloom.workspace.clients import LocalClient
from fedloom.workspace.folder import RunFolder

_LAYER = {
    "q_proj": (128, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128),
    "gate_proj": (320, 128), "up_proj": (320, 128), "down_proj": (128, 320),
}  # fmt: skip
ADAPTERS: Mapping[str, tuple[int, Mapping[str, tuple[int, int]]]] = {
    "demo": (16, {f"layers.{layer}.{kind}": shape for layer in range(4) for kind, shape in _LAYER.items()}),
    "tiny": (4, {"layers.0.k_proj": (6, 10), "layers.0.q_proj": (12, 10), "layers.1.down": (10, 17)}),
}
"""Name → rank and shapes: of the demo's model, and so small that only what a run does besides is left."""
WINDOW = 50
"""Rounds at the beginning and at the end whose median is told, if the run has twice as many."""


class Meter(Silent):
    """Seconds of processor time at the end of every round."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def round_finished(self, round: int, *facts: object) -> None:
        """Round 0 is the state before the first."""
        self.ends.append(time.process_time())


def run(
    *, clients: int = 4, attending: int = 4, rounds: int = 2000, adapter: str = "tiny", method: str = "fedsrd"
) -> dict[str, Any]:
    """{"rows": [{"clients", "part", "cpu_s"}]} of three parts: "early round", "late round" and "end".

    An early and a late round are the medians of the first and the last WINDOW rounds, the first ten left out; of a
    short run, the halves. "times" of the late round: over the early one. Raises ConfigError for what there is not.
    """
    if adapter not in ADAPTERS or not 1 <= attending <= clients or rounds < 2:
        raise ConfigError(
            f"adapter {adapter}, {attending} of {clients} clients, {rounds} rounds: expected one of "
            f"{', '.join(ADAPTERS)}, some of the clients in a round, and two rounds or more"
        )
    asked = [
        f"method.name={method}",
        f"federation.num_rounds={rounds}",
        f"federation.fraction_train={attending / clients}",
        "federation.eval_every=0",
        "data.heldout=null",
        "output.answers=0",
    ]
    config, meter = load_config(testbed_folder() / "demo.toml", asked), Meter()
    setup = made_up_setup(config, clients, adapter)
    with tempfile.TemporaryDirectory() as scratch, RunFolder.open(Path(scratch) / "run", config) as folder:
        Rounds(setup, folder, meter, LocalSites(setup)).play(resume=False)
        end = time.process_time() - meter.ends[-1]
    taken = [after - before for before, after in zip(meter.ends, meter.ends[1:], strict=False)]
    width = min(WINDOW, rounds // 2)
    skipped = min(10, rounds - 2 * width)
    early, late = (statistics.median(some) for some in (taken[skipped : skipped + width], taken[-width:]))
    parts = {"early round": early, "late round": late, "end": end}
    rows = [{"clients": clients, "part": part, "cpu_s": seconds} for part, seconds in parts.items()]
    return {
        "workload": {"adapter": adapter, "method": method, "attending": attending, "rounds": rounds},
        "rows": [{**row, "times": late / early} if row["part"] == "late round" else row for row in rows],
    }


class NoisySetup(Setup):
    """A setup without a model, whose training step adds noise."""

    def train(self, client: str, interrupt: Callable[[], None] | None = None) -> Train:
        """Noise on what the method trains, drawn from the seed."""

        def step(state: State, round: int, seed: int) -> Trained:
            draw = torch.Generator().manual_seed(seed)
            parts = self.job.method.trainable(round)

            def moved(pair: LoraPair, part: str) -> torch.Tensor:
                tensor = pair.part(part)
                return tensor + torch.randn(tensor.shape, generator=draw).mul_(1e-3 * (part in parts))

            pairs = {name: LoraPair(moved(pair, "A"), moved(pair, "B")) for name, pair in state.adapter.items()}
            return Trained(LoraState(pairs), num_examples=1, loss=1.0, steps=1)

        return step

    def evaluate(self, state: State) -> dict[str, Any]:
        """Nothing is held out."""
        return {}


def made_up_setup(config: Config, clients: int, adapter: str) -> Setup:
    """What `build_setup` would make of the settings, were there a model of these modules."""
    rank, shapes = ADAPTERS[adapter]
    placed = Adapter(LoraSettings(r=rank), {name: Placement(shape, rank, 1.0) for name, shape in shapes.items()})
    method = build(config.method.name, config.method.settings)
    ranks = dict.fromkeys(shapes, rank)
    names = [f"client-{number:06d}" for number in range(clients)]
    num_rounds = config.federation.num_rounds
    job = Job(method, 0, quantize(method.form(None)), ranks=dict.fromkeys(names, ranks), num_rounds=num_rounds)
    examples = TokenizedExamples((Tokens(torch.ones(2, dtype=torch.int64), 1, whole=True),), 0)
    sites = {name: LocalClient(placed, examples) for name in names}
    initial = initial_state(shapes, ranks, 0)
    return NoisySetup(config, job, None, placed, initial, sites, None, "made up")  # type: ignore[arg-type]


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows for a terminal."""
    work = result["workload"]
    title = (
        f"{work['method']}, {work['adapter']} adapter: {work['attending']} clients in each of {work['rounds']} rounds"
    )
    table = Table(title=title)
    for name in ("clients", "part", "CPU s", "× early"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in result["rows"]:
        times = f"{row['times']:.2f}" if "times" in row else ""
        table.add_row(f"{row['clients']:,}", row["part"], f"{row['cpu_s']:.4f}", times)
    return [table]
