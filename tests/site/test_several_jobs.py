"""Several runs at one site at the same time, with a real model: it is loaded once, and each gets what it gets alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w
import torch

from fedloom.model import shared_base
from fedloom.model.base import load_base
from fedloom.model.identity import base_digest
from fedloom.model.shared_base import SharedBase
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy

SETTINGS = {
    "federation": {"participants": ["bank", "lab"], "num_rounds": 3, "seed": 1},
    "training": {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
    "data": {"template": "plain", "max_length": 32},
}
JOBS = {
    "a" * 16: {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "method": {"name": "fedit"}},
    "b" * 16: {"lora": {"r": 2, "lora_dropout": 0.1}, "method": {"name": "fedsrd"}, "wire": {"values": "fp32"}},
    "c" * 16: {
        "lora": {"r": 4, "lora_alpha": 32.0, "target_modules": ["q_proj", "v_proj"]},
        "method": {"name": "flora"},
    },
}


@pytest.fixture
def loads(monkeypatch):
    """What was loaded from a model's files."""
    loaded = []
    monkeypatch.setattr(shared_base, "load_base", lambda *form: loaded.append(form) or load_base(*form))
    return loaded


def made(base: Path, state: Path) -> Desk:
    paths = {"model": str(base / "model"), "data": str(base / "data.jsonl"), "state": str(state)}
    return Desk(SiteConfig(name="lab", device="cpu", threads=1, policy=Policy(order="run"), **paths))


def ask(desk: Desk, job: str, round: int) -> bytes:
    settings = tomli_w.dumps(SETTINGS | JOBS[job])
    facts = {"ask": "turn", "job": job, "settings": settings, "round": round, "counted": round - 1}
    reply = desk.answer(Parcel({**facts, "base": base_digest(desk.site.model)}))
    assert "error" not in reply.facts, reply.facts
    return reply.payloads[0]


def test_runs_side_by_side_load_the_model_once_and_get_what_each_gets_alone(tmp_path, base, loads):
    threads = torch.get_num_threads()
    both = made(base, tmp_path / "both")
    mixed = {(job, round): ask(both, job, round) for round in (1, 2) for job in JOBS}
    assert len(loads) == 1
    weights = [{id(p) for p in place.setup.model.parameters() if not p.requires_grad} for place in both.places]
    assert weights[0] & weights[1] and len({len(held) for held in weights}) == 1
    for job in JOBS:
        alone = made(base, tmp_path / job)
        assert [ask(alone, job, round) for round in (1, 2)] == [mixed[job, round] for round in (1, 2)]
        alone.close()
    both.close()
    torch.set_num_threads(threads)


def test_weights_in_another_form_are_loaded_in_the_place_of_the_others(base, loads):
    shared = SharedBase()
    first, _ = shared(str(base / "model"), "float32", "none", "cpu")
    second, _ = shared(str(base / "model"), "float32", "none", "cpu")
    assert second is not first and second.config is not first.config and len(loads) == 1
    assert all(one is other for one, other in zip(first.parameters(), second.parameters(), strict=True))
    third, _ = shared(str(base / "model"), "bfloat16", "none", "cpu")
    assert third.dtype == torch.bfloat16 and len(loads) == 2
    assert shared.holds(str(base / "model"), "bfloat16", "none", "cpu")
    shared.release()
    assert not shared.is_loaded
