"""From settings to things: the base model, the clients with their data, the held-out sets, and the job they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedloom.adapters.folder import AdapterFolder, load_adapter, other_base_note
from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.compress.seeds import derived_seed
from fedloom.errors import ConfigError, ModelError
from fedloom.lora.pair import LoraState, initial_state, subset
from fedloom.methods.method import Method, State
from fedloom.methods.table import build
from fedloom.model import peft_bridge
from fedloom.model.base import base_digest, load_base
from fedloom.model.evaluate import Scores, exact_match_and_loss
from fedloom.model.examples import Example, client_sources, load_examples
from fedloom.model.partition import Manifest, data_digest, partition
from fedloom.model.placement import Adapter, linear_modules, place_adapter
from fedloom.model.tokens import TokenizedExamples, tokenize
from fedloom.model.training import local_update
from fedloom.records.config import (
    Config,
    DataSettings,
    FederationSettings,
    FlowerSettings,
    OutputSettings,
)
from fedloom.records.configfile import dump
from fedloom.records.ledger import RunRow
from fedloom.records.quantities import parse_budget
from fedloom.rounds.caps import Caps
from fedloom.rounds.consolidation import Consolidation
from fedloom.rounds.job import Job
from fedloom.rounds.turns import Train, Trained
from fedloom.workspace.clients import LocalClient, place_client, place_shared, split_trained, top_ranks

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, eq=False, slots=True)
class Setup:
    """All that a run works with. `heldout` maps domains to the examples that scores are taken on."""

    config: Config
    job: Job
    model: PeftModel
    adapter: Adapter
    initial: LoraState
    sites: Mapping[str, LocalClient]
    heldout: Mapping[str, TokenizedExamples]
    manifest: Manifest | None
    fingerprint: str

    def warnings(self) -> list[str]:
        """What the user should know about data and settings before the first round."""
        held = {f"client {name}": site.data for name, site in self.sites.items()}
        held |= {f"held-out set {name}": data for name, data in self.heldout.items()}
        limit = self.config.data.max_length
        cut = [
            f"{name}: {data.cut} examples cut and {data.dropped} dropped at data.max_length = {limit}"
            for name, data in held.items()
            if data.cut or data.dropped
        ]
        advice = self.job.method.advise(self.initial, self.job.context(1))
        start = self.config.model.adapter
        other = other_base_note([AdapterFolder(start)], self.config.model.path) if start else None
        return [*(note for note in (other, advice) if note), *cut]

    def describe(self) -> RunRow:
        """The run, as the first row of a ledger says it."""
        whole = self.initial.numel()
        held = {name: values_of(self.initial, site.ranks) for name, site in self.sites.items()}
        return RunRow(
            method=self.job.method.name,
            model=self.config.model.path,
            clients=tuple(self.sites),
            num_rounds=self.config.federation.num_rounds,
            adapter_values=whole,
            seed=self.config.federation.seed,
            client_values={name: values for name, values in held.items() if values != whole},
        )

    def train(self, client: str, interrupt: Callable[[], None] | None = None) -> Train:
        """The client's training step; `interrupt` is called before every forward pass, and may end it by raising."""
        site = self.sites[client]

        def step(state: State, round: int, seed: int) -> Trained:
            trained, fixed = split_trained(state, site.ranks)
            peft_bridge.configure(self.model, site.adapter)
            after, stats = local_update(
                self.model,
                trained,
                fixed,
                site.data,
                self.config.training,
                round=round,
                num_rounds=self.config.federation.num_rounds,
                seed=seed,
                trainable=self.job.method.trainable(round),
                core=self.job.method.core(state),
                penalty=self.job.method.penalty,
                interrupt=interrupt,
            )
            return Trained(subset(after, site.ranks), stats.examples, stats.loss, stats.steps, stats.seconds)

        return step

    def evaluate(self, state: State) -> dict[str, Scores]:
        """The model that `state` stands for, on every domain's held-out examples."""
        peft_bridge.configure(self.model, self.adapter)
        peft_bridge.write_adapter(self.model, state.adapter)
        peft_bridge.set_frozen(self.model, state.fixed)
        return {domain: exact_match_and_loss(self.model, data) for domain, data in self.heldout.items()}


def load_setup(config: Config, method: Method | None = None) -> Setup:
    """Load and check everything. Raises ConfigError, DataError or ModelError before any time is spent on training."""
    texts, manifest = client_examples(config)
    check_clients_exist(config.clients, texts)
    texts = select_participants(texts, config.federation.participants)
    return build_setup(config, texts, heldout_examples(config.data), manifest, method)


def build_setup(
    config: Config,
    texts: Mapping[str, Sequence[Example]],
    heldout: Mapping[str, Sequence[Example]],
    manifest: Manifest | None = None,
    method: Method | None = None,
) -> Setup:
    """`load_setup` from examples by client. Of a client without examples only the ranks are used."""
    if config.model.threads:
        torch.set_num_threads(config.model.threads)
    method = method or build(config.method.name, config.method.settings)
    budget = Budget(*parse_budget(config.wire.budget)) if config.wire.budget else None
    check_method_takes(method, config)
    base, tokenizer = load_base(config.model.path, config.model.dtype, config.model.quantization, config.model.device)

    # Where everybody's adapter sits: the model is walked once, the rest is arithmetic on dictionaries.
    linear = linear_modules(base)
    common = place_adapter(linear, config.lora)
    adapters = {name: place_client(linear, config, name) if name in config.clients else common for name in texts}
    client_ranks = {name: adapter.ranks for name, adapter in adapters.items()}
    ranks = top_ranks(method, client_ranks)
    shared = place_shared(linear, common, ranks)

    data, federation = config.data, config.federation
    tokens = {
        name: tokenize(held, tokenizer, data.template, data.max_length, f"client {name!r}")
        if held
        else TokenizedExamples((), 0)
        for name, held in texts.items()
    }
    scored = {
        domain: tokenize(held, tokenizer, data.template, data.max_length, f"held-out set {domain!r}")
        for domain, held in heldout.items()
    }
    initial = first_adapter(config, shared.shapes, ranks)
    job = Job(
        method=method,
        seed=federation.seed,
        quantize=quantize(method.form(budget) if config.wire.values == "auto" else config.wire.values),
        weighting=federation.weighting,
        budget=budget,
        module_weighting=federation.module_weighting,
        consolidation=Consolidation(federation.consolidate_every, federation.consolidate_energy),
        num_rounds=federation.num_rounds,
        downloads=download_share(initial, client_ranks, federation.clients_per_round(len(texts))),
        caps=caps_of(federation, texts),
        ranks=client_ranks,
    )
    return Setup(
        config=config,
        job=job,
        initial=initial,
        model=peft_bridge.attach(base, shared),
        adapter=shared,
        sites={name: LocalClient(adapter, tokens[name]) for name, adapter in adapters.items()},
        heldout=scored,
        manifest=manifest,
        fingerprint=fingerprint(config, texts),
    )


def check_method_takes(method: Method, config: Config) -> None:
    """Raises ConfigError for a setting outside [method] that does nothing with this method."""
    if config.wire.budget and not method.takes_budget:
        raise ConfigError(
            f"wire.budget does not work with method {method.name!r}, which always sends all that it trains; unset it"
        )
    if config.federation.consolidate_every and not method.merges:
        raise ConfigError(
            f"federation.consolidate_every does nothing with method {method.name!r}, which merges nothing; unset it"
        )


def caps_of(federation: FederationSettings, clients: Collection[str]) -> Caps:
    """What one client may count for. Raises ConfigError where federation.client_examples is about nobody."""
    for name in federation.client_examples:
        if name not in clients:
            raise ConfigError(
                f"federation.client_examples has a number for {name!r}, which takes no part; there are "
                f"{', '.join(sorted(clients)[:9])}"
            )
    return Caps(federation.max_share, federation.client_examples, federation.max_norm, federation.max_norm_ratio)


def values_of(adapter: LoraState, ranks: Mapping[str, int]) -> int:
    """How many values a client of these ranks holds."""
    return sum(rank * sum(adapter[module].shape) for module, rank in ranks.items())


def download_share(adapter: LoraState, client_ranks: Mapping[str, Mapping[str, int]], asked: int) -> float:
    """Values that go down in a turn, where everything is sent that was missed, over the values that a client holds.

    adapter: the server's. client_ranks: client → module → rank. asked: clients in a round.
    """
    # Of K clients, `asked` turn in each round, so one turns every K / asked rounds and receives as many broadcasts,
    # each of all the server's values. A client holds held / K values on the mean. So the share is
    # (values · K / asked) / (held / K) = values · K² / (held · asked).
    held = sum(values_of(adapter, ranks) for ranks in client_ranks.values())
    return adapter.numel() * len(client_ranks) ** 2 / (held * asked) if held else 1.0


def first_adapter(config: Config, shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> LoraState:
    """The seeded start, or the adapter that model.adapter names. Raises ModelError if that is for another model."""
    if config.model.adapter is None:
        return initial_state(shapes, ranks, derived_seed(config.federation.seed, "start"))
    state, folder = load_adapter(config.model.adapter)
    for module in sorted({*shapes, *state}):
        wanted = (shapes[module], ranks[module]) if module in shapes else None
        found = (state[module].shape, state[module].rank) if module in state else None
        if wanted != found:
            raise ModelError(
                f"{folder.folder} does not fit {config.model.path}: module {module} has (shape, rank) {found} in the "
                f"adapter and {wanted} in the run; it is for another base model, or [lora] differs"
            )
    return state


def client_examples(config: Config) -> tuple[dict[str, list[Example]], Manifest | None]:
    """(client → its examples, manifest): a file or folder each, or everything pooled, shuffled and split."""
    settings, federation = config.data, config.federation
    if settings.partitioner == "files":
        found = {client: load_examples(path) for client, path in client_sources(settings.source).items()}
        if federation.num_clients not in (None, len(found)):
            raise ConfigError(
                f"federation.num_clients is {federation.num_clients}, but {settings.source} holds data for {len(found)}"
            )
        return found, None
    pooled = [example for path in sources_by_client(settings.source).values() for example in load_examples(path)]
    manifest = partition(pooled, settings, federation)
    return {client: [pooled[index] for index in held] for client, held in manifest.clients.items()}, manifest


def select_participants(texts: dict[str, list[Example]], wanted: Sequence[str] | None) -> dict[str, list[Example]]:
    """The clients that federation.participants names, or all. Raises ConfigError for a name without data."""
    unknown = sorted(set(wanted or ()) - set(texts))
    if unknown:
        raise ConfigError(
            f"federation.participants names {unknown[0]!r}, which has no data; there are {', '.join(sorted(texts))}"
        )
    return {client: examples for client, examples in texts.items() if wanted is None or client in wanted}


def check_clients_exist(settings: Collection[str], clients: Collection[str]) -> None:
    """Raises ConfigError where [clients.<name>] is about a client that there is not."""
    for name in settings:
        if name not in clients:
            near = get_close_matches(name, clients, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(clients)[:9])}"
            raise ConfigError(f"[clients.{name}] has settings for a client without data; {hint}")


def heldout_examples(settings: DataSettings) -> dict[str, list[Example]]:
    """Domain → examples to score. The setting names a split beside the training data, or files of their own."""
    name = settings.heldout
    if name is None:
        return {}
    if "{client}" in name or Path(name).exists():
        return {domain: load_examples(path) for domain, path in sources_by_client(name).items()}
    return {domain: load_examples(path, name) for domain, path in sources_by_client(settings.source).items()}


def sources_by_client(source: str) -> dict[str, Path | str]:
    """One source per client where the text has {client} in it, otherwise the source itself under its own name."""
    return dict(client_sources(source)) if "{client}" in source else {Path(source).stem: source}


def fingerprint(config: Config, texts: Mapping[str, Sequence[Example]]) -> str:
    """32 hex digits for what a run's outcome depends on: settings, base weights and training data."""
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(dump(config.model_copy(update={"output": OutputSettings(), "flower": FlowerSettings()})).encode())
    hasher.update(base_digest(config.model.path).encode())
    for client, examples in texts.items():
        hasher.update(f"{client} {data_digest(examples)}".encode())
    return hasher.hexdigest()
