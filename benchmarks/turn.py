"""What a client's turn costs beside its training steps: the whole turn against a bare loop over the same batches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from rich.table import Table

from benchmarks.compress import sending
from fedloom.methods.method import State
from fedloom.model import peft_bridge
from fedloom.records.config import Config
from fedloom.rounds.turns import client_turn, start
from fedloom.workspace.assemble import Setup, load_setup


def run(config: Config, *, repeats: int = 5) -> dict[str, Any]:
    """Rows of the medians over interleaved repeats, and seconds of preparation.

    turn_s: receive, train, compress and encode. bare_s: forward, backward and AdamW on as many batches of the client's
    examples, nothing else. overhead_s: turn_s − bare_s. train_s: the training of a turn. send_s and send_cpu_s: all but
    receiving and training, where the client remembers an earlier turn, on the wall and of the processor. send_share:
    send_s / train_s.
    """
    begun = time.perf_counter()
    setup = load_setup(config)
    prepared = time.perf_counter() - begun
    rows = []
    for client, site in setup.sites.items():
        state = start(setup.job, setup.initial, site.ranks)
        taken = [repeat(setup, client, state) for _ in range(repeats + 1)][1:]  # the first one warms up
        row = {key: statistics.median(one[key] for one in taken) for key in taken[0]}
        differences = {"overhead_s": row["turn_s"] - row["bare_s"], "send_share": row["send_s"] / row["train_s"]}
        rows.append({"client": client, **row, **differences})
    return {"rows": rows, "prepare_s": prepared, "threads": torch.get_num_threads()}


def repeat(setup: Setup, client: str, state: State) -> dict[str, float]:
    """One measurement of each kind."""
    bare_s = bare_steps(setup, client)
    begun = time.perf_counter()
    turn = client_turn(setup.job, client, state, [], setup.train(client), 1)
    turn_s = time.perf_counter() - begun
    spent = sending(setup.job, client, turn.state, turn.trained, 1)[1]
    train_s = turn.trained.seconds
    return {"turn_s": turn_s, "bare_s": bare_s, "train_s": train_s, "send_s": spent.wall, "send_cpu_s": spent.cpu}


def bare_steps(setup: Setup, client: str) -> float:
    """Seconds of a plain loop over one turn's batches."""
    data = setup.sites[client].data
    training = setup.config.training_of(client).for_examples(len(data))
    peft_bridge.write_adapter(setup.model, setup.initial)
    peft_bridge.set_frozen(setup.model, None)
    factors = [parameter for parameter in setup.model.parameters() if parameter.requires_grad]
    setup.model.train()
    begun = time.perf_counter()
    optimizer = torch.optim.AdamW(factors, lr=training.learning_rate, weight_decay=training.weight_decay)
    for step in range(training.steps * training.gradient_accumulation_steps):
        first = step * training.per_device_train_batch_size
        batch = [data[(first + i) % len(data)] for i in range(training.per_device_train_batch_size)]
        setup.model(**data.collate(batch)).loss.backward()
        if (step + 1) % training.gradient_accumulation_steps == 0:
            torch.nn.utils.clip_grad_norm_(factors, training.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    taken = time.perf_counter() - begun
    setup.model.eval()
    return taken


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows for a terminal."""
    table = Table(title=f"a client's turn, {result['threads']} threads; prepared in {result['prepare_s']:.2f} s")
    for name in ("client", "turn s", "bare loop s", "overhead s", "training s", "sending s", "of training"):
        table.add_column(name, justify="left" if name == "client" else "right")
    for row in result["rows"]:
        times = [f"{row[key]:.3f}" for key in ("turn_s", "bare_s", "overhead_s", "train_s", "send_s")]
        table.add_row(row["client"], *times, f"{row['send_share']:.1%}")
    return [table]
