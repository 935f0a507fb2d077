"""A step that is made in memory that the next module's step overwrites is the one that is made in fresh memory."""

from __future__ import annotations

import pytest
import torch
from benchmarks.server_turn import ROUND, before_round

from fedloom.compress import sparsify
from fedloom.compress.quantize import quantize
from fedloom.lora.pair import digest
from fedloom.methods.table import build
from fedloom.rounds.job import Job
from fedloom.rounds.turns import server_turn

MODULES = {"wide": (40, 4200), "tall": (4200, 40), "square": (4200, 4200)}  # factors of 2¹⁵ elements and more


@pytest.mark.parametrize("settings", [{"server_residual": 0.5}, {"download": "random"}, {}])
def test_fedsrd_leaves_nothing_in_memory_that_is_used_again(settings, monkeypatch):
    job = Job(build("fedsrd-e", settings), 0, quantize("int4"))
    state, payloads = before_round(job, MODULES, 8, 2)
    found = server_turn(job, state, payloads, ROUND)
    monkeypatch.setattr(sparsify._Scratch, "like", lambda self, use, tensor: None)
    wanted = server_turn(job, state, payloads, ROUND)
    assert found.payload == wanted.payload and digest(found.state.adapter) == digest(wanted.state.adapter)
    assert found.state.memory.keys() == wanted.state.memory.keys()
    assert all(torch.equal(found.state.memory[name], held) for name, held in wanted.state.memory.items())
