"""FedLoomStrategy in a ServerApp of the user's own gives what fedloom's rounds give."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from desks import LOST
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import toy
from fedloom.compress.entries import Dense
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.flower.strategy import FedLoomStrategy, agree, take_turn
from fedloom.lora.pair import digest
from fedloom.site.protocol import Parcel
from fedloom.wire import Message as Update
from fedloom.wire import decode, encode

pytestmark = pytest.mark.flower


class Grid:
    """Three nodes whose ClientApp is one call of `take_turn`; `lost` names rounds whose reply of node 1 is lost."""

    def __init__(self, job, lost=(), forged=()):
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
        self.job, self.lost, self.forged = job, lost, forged
        self.contexts = {node: Context(1, node, {}, RecordDict(), {}) for node in (1, 2, 3)}

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        return [self.reply(message) for message in messages]

    def reply(self, message):
        message.metadata.__dict__.update(_message_id=message.object_id, _run_id=1, _src_node_id=99)
        node, round = message.metadata.dst_node_id, int(message.metadata.group_id)
        reply = take_turn(message, self.contexts[node], self.job, toy.initial(), toy.trainer(self.job.method))
        if node == 1 and round in self.lost:
            reply = Message(LOST, reply_to=message)
        if node == 1 and round in self.forged:
            reply = Message(pack_parcel(Parcel({}, (b"FLOM" + bytes(60),))), reply_to=message)
        return reply


@pytest.mark.parametrize("method", ["fedsrd", "florist", "fedit"])
def test_the_strategy_gives_what_the_rounds_give(method: str):
    job = agree(method, seed=3, values="fp32")
    strategy = FedLoomStrategy(toy.initial(), job)
    result = strategy.start(Grid(job), strategy.arrays(), num_rounds=3)
    twin = toy.Federation(job, {"1": toy.RANK, "2": toy.RANK, "3": toy.RANK})
    for _ in range(3):
        twin.play()
    assert (strategy.server.version, strategy.server.digest) == (3, twin.server.digest)
    assert digest(strategy.server.adapter) == digest(twin.server.adapter)
    held = result.arrays["base_model.model.layers.0.q_proj.lora_A.weight"].numpy()
    assert held.shape == tuple(strategy.server.total["layers.0.q_proj"].A.shape)
    assert len(result.train_metrics_clientapp) == 3


def test_a_node_that_was_lost_is_brought_in_step_and_a_forged_update_is_refused():
    job = agree("fedit", seed=3)
    strategy = FedLoomStrategy(toy.initial(), job)
    grid = Grid(job, lost=(2,), forged=(3,))
    result = strategy.start(grid, strategy.arrays(), num_rounds=4)
    assert [result.train_metrics_clientapp[round]["refused"] for round in (1, 2, 3, 4)] == [0, 1, 1, 0]
    assert strategy.server.version == 4


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda entry: Dense((), torch.ones(1)), "has shape ()"),
        (lambda entry: Dense(entry.shape, entry.values * 1e3), "federation.max_norm_ratio is 100"),
        (lambda entry: Dense(entry.shape, entry.values * 1e8), "federation.max_norm is 1e+06"),
        (lambda entry: Dense(entry.shape, entry.values * float("nan")), "NaN or infinity"),
    ],
)
def test_one_nodes_update_neither_ends_nor_bends_a_round(spoil, reason: str):
    job = agree("fedit", seed=3, values="fp32")

    class Lying(Grid):
        def reply(self, message):
            node, reply = message.metadata.dst_node_id, super().reply(message)
            if node == 2:
                update = decode(unpack_parcel(reply.content).payloads[0])
                entries = {name: spoil(entry) for name, entry in update.entries.items()}
                reply = Message(pack_parcel(Parcel({}, (encode(Update(update.header, entries)),))), reply_to=message)
            return reply

    strategy = FedLoomStrategy(toy.initial(), job)
    result = strategy.start(Lying(job), strategy.arrays(), num_rounds=2)
    assert [result.train_metrics_clientapp[round]["refused"] for round in (1, 2)] == [1, 1]
    assert set(strategy.refused) == {"2"} and reason in strategy.refused["2"]
    assert strategy.server.version == 2


def test_a_round_with_too_few_updates_changes_nothing():
    job = agree("fedit", seed=3)
    strategy = FedLoomStrategy(toy.initial(), job, min_replies=3)
    before = digest(strategy.server.adapter)
    result = strategy.start(Grid(job, lost=(1,)), strategy.arrays(), num_rounds=1, train_config=ConfigRecord())
    assert digest(strategy.server.adapter) == before and not result.train_metrics_clientapp


def test_a_server_that_wants_the_strategy_alone_needs_no_model_libraries():
    code = """
import sys
own = ("fedloom.workspace.assemble", "fedloom.model.peft_bridge")
for name in ("transformers", "peft", "trl", "datasets", "pyarrow", *own):
    sys.modules[name] = None  # importing it raises ImportError
import toy
from fedloom.flower.strategy import FedLoomStrategy, agree
print(len(FedLoomStrategy(toy.initial(), agree("loom", values="sign")).arrays()))
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout.split()) == (0, ["6"]), done.stderr
