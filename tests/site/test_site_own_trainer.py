"""A site whose own trainer trains: the desk's rules hold, and what it sends is what the same trainer gives by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

import desks
import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from fedloom.flower.settings import shared_settings
from fedloom.model.base import load_base
from fedloom.model.examples import Example
from fedloom.model.identity import base_digest
from fedloom.model.patch import PatchedTrainer, patch
from fedloom.model.tokens import tokenize
from fedloom.noise import secret
from fedloom.rounds.federation import Federation
from fedloom.site import order
from fedloom.site.desk import Desk
from fedloom.site.privacy import Privacy
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy
from fedloom.workspace.assemble import build_setup_around

pytestmark = pytest.mark.flower
JOB = "0123456789abcdef"
CONFIG = desks.settings("training.max_steps=2", "lora.target_modules=['q_proj', 'v_proj']", "federation.num_rounds=2")
DESKS: list[Desk] = []


@pytest.fixture(autouse=True)
def closed(monkeypatch):
    """One thread; no base model is loaded but the trainer's; every desk lets go of its files at the end."""

    def loaded(*arguments, **others):
        raise AssertionError("a second base model is loaded")

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("fedloom.workspace.assemble.load_base", loaded)
    yield
    torch.set_num_threads(threads)
    for desk in DESKS:
        desk.close()
    DESKS.clear()


def own(tmp_path: Path, model: Path = desks.TESTBED / "model", **changes: object) -> PatchedTrainer:
    base, tokenizer = load_base(model)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    data = tokenize([Example(f"{k}?", str(k)) for k in range(6)], tokenizer, "plain", 32)
    arguments = TrainingArguments(
        **{
            "output_dir": str(tmp_path / "out"),
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "report_to": "none",
            "disable_tqdm": True,
            **changes,
        }
    )
    wrapped = peft.get_peft_model(base, lora)
    return patch(Trainer(model=wrapped, args=arguments, data_collator=data.collate, train_dataset=data))


def made(folder: Path, trainer: PatchedTrainer, **policy: object) -> Desk:
    folder.mkdir(exist_ok=True)
    DESKS.append(Desk(desks.site("lab", folder, Policy(**{"order": "run", **policy})), own=trainer))
    return DESKS[-1]


def ask(desk: Desk, what: str, round: int = 1, payloads: tuple[bytes, ...] = (), config=CONFIG, **facts) -> Parcel:
    base = base_digest(desk.site.model)
    asked = {"ask": what, "job": JOB, "settings": shared_settings(config), "round": round, "base": base}
    return desk.answer(Parcel({**asked, **facts}, payloads))


def test_a_desk_sends_what_the_trainer_gives_by_hand(tmp_path):
    """Two rounds of three such sites; after a kill the same request gets the same bytes."""
    trainer = own(tmp_path)
    setup = build_setup_around(CONFIG, trainer.model, sorted(desks.SITES))
    by_hand = Federation(setup.job, setup.initial, dict.fromkeys(desks.SITES))
    first = by_hand.round({name: trainer.for_task(setup.task(name)) for name in desks.SITES})
    second = by_hand.round({name: trainer.for_task(setup.task(name)) for name in desks.SITES})
    desk = made(tmp_path / "site", trainer)
    assert ask(desk, "hello").facts["version"] == 0
    one = ask(desk, "turn")
    assert one.payloads == (first.uploads["lab"],) and one.facts["examples"] == 6 and one.facts["steps"] == 2
    desk.close()  # as after kill -9: only what is on disk is known
    calls = []
    again = made(tmp_path / "site", trainer)
    again.training = lambda *arguments: calls.append(arguments)
    assert ask(again, "turn").payloads == one.payloads and not calls
    again.close()
    anew = made(tmp_path / "other", own(tmp_path))
    assert ask(anew, "turn").payloads == one.payloads
    counted = {"counted": 1}
    reply = ask(anew, "turn", 2, (first.broadcast,), **counted)
    assert reply.payloads == (second.uploads["lab"],)
    delivered = ask(anew, "deliver", 2, (second.broadcast,), counted=2)
    assert delivered.facts["digest"] == by_hand.server.digest


def test_the_sites_order_noise_and_time_hold(tmp_path):
    trainer = own(tmp_path)
    plain = ask(made(tmp_path / "plain", trainer), "turn")
    own_order = made(tmp_path / "ordered", trainer, order="site")
    key = Path(own_order.site.state) / order.FILE
    key.parent.mkdir(exist_ok=True)
    key.write_bytes(bytes(secret.SIZE))  # a drawn secret may give the run's own batches: 1 of 90 does
    key.chmod(0o600)
    ordered = ask(own_order, "turn")
    assert ordered.payloads and ordered.payloads != plain.payloads
    noisy = made(tmp_path / "noisy", trainer, privacy=Privacy(clip_norm=1.0, noise_multiplier=2.0))
    said = ask(noisy, "turn")
    assert said.facts["loss"] is None and noisy.trail.count_spent(JOB, 1).mu_squared > 0
    slow = made(tmp_path / "slow", trainer, max_seconds_round=1e-9)
    assert "max_seconds_round is over" in str(ask(slow, "turn").facts["error"])
    assert not slow.trail.count_spent(JOB, 1).bytes_round


@pytest.mark.parametrize(
    ("policy", "changes", "words"),
    [
        ({"min_examples": 7}, {}, "6 training examples; policy.min_examples is 7"),
        ({"min_examples_update": 5}, {}, "an update would rest on 4 examples"),
        ({"max_steps": 1}, {}, "training.max_steps is 2"),
        ({"scrub_errors": False}, {"lora.r": 8}, "r = 16, the run has 8"),
    ],
)
def test_what_does_not_go_together_is_said_before_a_round(policy, changes, words, tmp_path, caplog):
    """Rows and batch are the trainer's, whatever the job's settings say."""
    overrides = [f"{key}={value}" for key, value in changes.items()]
    config = desks.settings("training.max_steps=2", "lora.target_modules=['q_proj', 'v_proj']", *overrides)
    desk = made(tmp_path / "site", own(tmp_path), **policy)
    assert "error" in ask(desk, "hello", config=config).facts
    assert words in caplog.text
    assert not list(Path(desk.site.state).glob("jobs/*"))


def test_another_base_model_is_refused(tmp_path, caplog):
    other = tmp_path / "other"
    shutil.copytree(desks.TESTBED / "model", other)
    (other / "generation_config.json").write_text("{}")
    desk = made(tmp_path / "site", own(tmp_path, other), scrub_errors=False)
    assert f"was loaded from {other}" in str(ask(desk, "hello").facts["error"])
    same = tmp_path / "same"
    shutil.copytree(desks.TESTBED / "model", same)
    assert "error" not in ask(made(tmp_path / "good", own(tmp_path, same)), "hello").facts


def test_serve_site_is_the_worker_with_the_trainer(tmp_path, monkeypatch):
    import fedloom

    served = []
    monkeypatch.setattr("fedloom.site.worker.serve_site", lambda site, own=None: served.append((site, own)))
    (tmp_path / "SITE.toml").write_text('name = "lab"\nmodel = "model"\ndata = "data"\n')
    trainer = own(tmp_path)
    fedloom.serve_site(tmp_path / "SITE.toml", trainer)
    assert [(site.name, given) for site, given in served] == [("lab", trainer)]
