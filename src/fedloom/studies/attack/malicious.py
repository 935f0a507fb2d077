"""A run of the local engine in which some sites are malicious: their training steps are wrapped, all else is the run's.

The forgers come last by name, so that a round's honest sites have trained when they begin.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError, NumericError
from fedloom.methods.method import State
from fedloom.model.evaluate import exact_match_and_loss
from fedloom.model.limits import ModelLimits, model_limits
from fedloom.records.config import Config
from fedloom.records.events import Silent
from fedloom.rounds.step import Train, Trained
from fedloom.rounds.turns import ClientTurn
from fedloom.server.local import LocalSites
from fedloom.server.loop import Rounds
from fedloom.studies.attack.forgery import FORGERIES, Change, Knowledge, add_change, change_of
from fedloom.studies.attack.poison import POISONS, set_trigger
from fedloom.studies.compare import Trial
from fedloom.workspace.assemble import Setup, load_setup
from fedloom.workspace.clients import LocalClient
from fedloom.workspace.data import client_examples, heldout_examples
from fedloom.workspace.folder import RunFolder
from fedloom.workspace.pulse import write_whole
from fedloom.workspace.tokenized import tokenize_clients, tokenize_scored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESULT = "attack.json"
"""The last file that such a run writes: what the attack was, and how often a backdoor opens."""
ABSENT = "absent"
"""No attack: the same sites send nothing at all, which is what the best of defences would leave of them."""
ATTACKS: Mapping[str, float] = {
    **{name: own[1] for name, own in (*FORGERIES.items(), *POISONS.items())},
    ABSENT: 1.0,
}
"""Attack → its usual strength."""


@dataclass(frozen=True, slots=True)
class Attack:
    """What malicious sites do. name: of `ATTACKS`, or "" where they are honest; strength: s of its forgery."""

    name: str = ""
    strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Infiltration:
    """Plays a run whose `sites` are malicious, and leaves in its folder what came of it."""

    attack: Attack
    sites: tuple[str, ...]

    def __call__(self, run: Trial, resume: bool) -> None:
        """Play or resume it."""
        with RunFolder.open(run.folder, run.config, resume=resume) as folder:
            setup = self.infiltrate(load_setup(run.config, run.method))
            seen: dict[int, list[Change]] = {}

            def look(round: int, client: str, before: State, turn: ClientTurn) -> None:
                if client not in self.sites:
                    seen.setdefault(round, []).append(change_of(before.adapter, turn.trained.adapter))

            sites = LocalSites(setup, look, trainers=self.trainers(setup, seen))
            rounds = Rounds(setup, folder, Silent(), sites)
            rounds.play(resume)
            opened = backdoor_success(setup, rounds.server, self.sites) if self.attack.name == "backdoor" else None
        said = {"attack": self.attack.name, "strength": self.attack.strength, "sites": self.sites, "backdoor": opened}
        write_whole(run.folder / RESULT, json.dumps(said, indent=2))

    def infiltrate(self, setup: Setup) -> Setup:
        """The set-up with what the malicious sites train on, and a note that says what this run is."""
        if not self.attack.name:
            return setup
        note = f"a study: {', '.join(self.sites)} play {self.attack.name} with strength {self.attack.strength:g}"
        setup = replace(setup, notes=(*setup.notes, note))
        if self.attack.name not in POISONS:
            return setup
        poison, target = POISONS[self.attack.name][0], find_target(setup.config, self.sites)
        texts = client_examples(setup.config)[0]
        poisoned = {name: poison(texts[name], target) for name in self.sites}
        assert setup.tokenizer is not None
        tokens = tokenize_clients(poisoned, setup.config.data, setup.tokenizer, limits_of(setup))
        own = {name: LocalClient(setup.sites[name].adapter, held) for name, held in tokens.items()}
        return replace(setup, sites={**setup.sites, **own})

    def trainers(self, setup: Setup, seen: Mapping[int, Sequence[Change]]) -> dict[str, Train]:
        """Malicious site → its training step. seen: round → the changes of its honest sites so far."""
        return {name: Forger(setup.train(name), self.attack, seen) for name in self.sites if self.attack.name}


@dataclass(frozen=True, eq=False, slots=True)
class Forger:
    """A training step that trains as its site would, and hands on something else."""

    honest: Train
    attack: Attack
    seen: Mapping[int, Sequence[Change]] = field(default_factory=dict)

    def __call__(self, state: State, round: int, seed: int) -> Trained:
        """The adapter that the attack asks for, on as many examples as the site has. Raises NumericError if none."""
        if self.attack.name == ABSENT:
            raise NumericError("this site sends nothing: the study asks what the others learn without it")
        trained = self.honest(state, round, seed)
        own = change_of(state.adapter, trained.adapter)
        if self.attack.name in POISONS:
            sent: Change = {name: self.attack.strength * tensor for name, tensor in own.items()}
        else:
            alike = [one for one in self.seen.get(round, ()) if _shapes(one) == _shapes(own)]
            noise = torch.Generator().manual_seed(derived_seed(seed, "forgery"))
            sent = FORGERIES[self.attack.name][0](Knowledge(own, alike, self.attack.strength, noise))
        return replace(trained, adapter=add_change(state.adapter, sent))


def _shapes(change: Change) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in change.items()}


def find_target(config: Config, sites: Sequence[str]) -> str:
    """The answer that a backdoor gives: one that a malicious site has, so that the model can say it."""
    return client_examples(config)[0][sites[0]][0].output


def backdoor_success(setup: Setup, state: State, sites: Sequence[str]) -> float:
    """Share of held-out examples that are answered by the target once the trigger is in them."""
    target, data = find_target(setup.config, sites), setup.config.data
    texts = [one for held in heldout_examples(data).values() for one in held if one.output != target]
    if not texts or setup.tokenizer is None:
        raise ConfigError("data.heldout is missing: whether a backdoor opens is seen on held-out examples")
    asked = {"backdoor": [set_trigger(one, target) for one in texts]}
    (tokens,) = tokenize_scored("held-out", asked, data, setup.tokenizer, limits_of(setup)).values()
    return exact_match_and_loss(setup.model_of(state), tokens, setup.config.evaluation.batch_size).exact_match


def limits_of(setup: Setup) -> ModelLimits:
    """What the run's base model reads."""
    return model_limits(cast("PreTrainedModel", setup.model.get_base_model()))


def last_names(clients: Collection[str], count: int) -> tuple[str, ...]:
    """The clients that are malicious in a study: the last by name. Raises ConfigError where none would be honest."""
    if not 0 < count < len(clients):
        raise ConfigError(f"--malicious {count}: expected from 1 to {len(clients) - 1}, since there are {len(clients)}")
    return tuple(sorted(clients)[-count:])


def result_of(folder: Path) -> Mapping[str, float | None]:
    """What a finished run says of its attack."""
    said: Mapping[str, float | None] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return said
