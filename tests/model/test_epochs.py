"""How long a client trains in a round: steps, or passes over its own examples; and what it has of its own."""

from __future__ import annotations

import dataclasses
import tomllib

import pytest
from test_peft_bridge import random_state
from test_training import LORA, SETTINGS, changed, client
from test_training import update as train

from fedloom.errors import ConfigError, PolicyRefusal
from fedloom.model import peft_bridge
from fedloom.model.patch import PatchedTrainer
from fedloom.model.training import rate_at
from fedloom.records.config import Config, TrainingSettings
from fedloom.records.configfile import dump, parse
from fedloom.records.sections.training import count_steps
from fedloom.rounds.step import Task
from fedloom.site.policy import check_epochs, check_settings
from fedloom.site.rules import Policy
from tiny_models import MODELS, placed


def config(**training: object) -> Config:
    clients = {"lab": {"max_steps": 3, "learning_rate": 1e-3, "r": 4}, "bank": {"num_train_epochs": 0.5}}
    return parse({"training": training, "clients": clients}, "test")


@pytest.mark.parametrize(("epochs", "accumulation", "steps"), [(2.0, 1, 6), (2.0, 2, 4), (0.5, 1, 2), (1.0, 1, 3)])
def test_whole_epochs_see_every_example_as_often(epochs: float, accumulation: int, steps: int):
    """Ten examples, four in a batch: the last batch of a pass is smaller, and none of it is lost."""
    adapter = placed(base := MODELS["llama"](), **LORA.model_dump())
    settings = changed(SETTINGS, max_steps=None, num_train_epochs=epochs, gradient_accumulation_steps=accumulation)
    model, data = peft_bridge.attach(base, adapter), client(count=10)
    _, stats = train(model, random_state(adapter.shapes, adapter.ranks), data, settings)
    assert stats.steps == steps == count_steps(epochs, 10, 4, accumulation)
    if epochs >= 1:
        assert stats.tokens == epochs * sum(len(tokens.ids) for tokens in data.examples)


def test_the_learning_rate_of_a_client_follows_its_own_steps():
    """Warm-up over a tenth of all steps: of 10 rounds of 4 steps with 16 examples, of 10 rounds of 1 step with 3."""
    settings = TrainingSettings(
        learning_rate=1.0, num_train_epochs=1.0, per_device_train_batch_size=4, warmup_ratio=0.1
    )
    rates = [[rate_at(settings.for_examples(count), 1, 10, step) for step in range(4)] for count in (16, 3)]
    assert rates == [[0.25, 0.5, 0.75, 1.0], [1.0, 1.0, 1.0, 1.0]]


def test_a_client_has_its_own_steps_and_rates():
    given = config(num_train_epochs=2.0, learning_rate=5e-4, per_device_train_batch_size=4)
    steps = {name: given.training_of(name).for_examples(10).steps for name in ("lab", "bank", "depot")}
    assert steps == {"lab": 3, "bank": 2, "depot": 6}
    assert [given.training_of(name).learning_rate for name in ("lab", "depot")] == [1e-3, 5e-4]
    assert given.lora_of("lab").r == 4 and "learning_rate" not in given.lora_of("lab").model_dump()
    assert config().training_of("bank").for_examples(64).steps == 4  # half a pass of 8 batches, over max_steps = 10
    assert parse(tomllib.loads(dump(given)), "again") == given


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (
            {"training": {"max_steps": 3, "num_train_epochs": 1.0}},
            "training.max_steps and training.num_train_epochs are",
        ),
        ({"clients": {"lab": {"max_steps": 3, "num_train_epochs": 1.0}}}, "clients.lab.max_steps and clients.lab.num"),
        ({"training": {"num_train_epochs": 0.0}}, "training.num_train_epochs is 0.0; expected more than 0"),
        ({"clients": {"lab": {"learning_rate": -1.0}}}, "clients.lab.learning_rate is -1.0; expected more than 0"),
        ({"clients": {"lab": {"optimizer": "sgd"}}}, "unknown key 'clients.lab.optimizer'"),
    ],
)
def test_steps_and_epochs_exclude_each_other(tree: dict[str, object], told: str):
    with pytest.raises(ConfigError, match=told):
        parse(tree, "test")


def test_a_sites_limits_hold_for_its_own_settings_and_for_epochs():
    policy = Policy(max_steps=4, max_learning_rate=6e-4)
    with pytest.raises(PolicyRefusal, match="a learning rate is 0.001"):
        check_settings(policy, config(learning_rate=5e-4, max_steps=4), "lab", 1)
    asked = config(learning_rate=5e-4, num_train_epochs=2.0, per_device_train_batch_size=4)
    check_settings(policy, asked, "depot", 1)  # nothing is known of its examples yet
    check_epochs(policy, asked, "depot", 4, 1)
    with pytest.raises(PolicyRefusal, match="num_train_epochs = 2 here: training.max_steps is 6") as refusal:
        check_epochs(policy, asked, "depot", 6, 1)
    assert refusal.value.public == "refused by the site's policy"


def test_a_trainer_of_ones_own_counts_epochs_in_its_own_batches():
    arguments = dataclasses.make_dataclass("Arguments", ["per_device_train_batch_size", "gradient_accumulation_steps"])
    own = object.__new__(PatchedTrainer)
    own.trainer = type("Trainer", (), {"args": arguments(3, 2), "train_dataset": range(10)})()
    assert own.count_steps(Task(epochs=2.0)) == 4 and own.count_drawn(Task(epochs=2.0)) == 24
