"""From settings to things: the base model, the clients with their data, the held-out sets, and the job they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedloom.adapters.folder import AdapterFolder, other_base_note
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, subset
from fedloom.methods.method import Method, State
from fedloom.model import peft_bridge
from fedloom.model.base import base_digest, load_base
from fedloom.model.evaluate import Scores, exact_match_and_loss
from fedloom.model.examples import Example, client_sources, load_examples
from fedloom.model.partition import Manifest, data_digest, partition
from fedloom.model.placement import Adapter, linear_modules
from fedloom.model.tokens import TokenizedExamples, tokenize
from fedloom.model.training import local_update
from fedloom.model.volume import Volume, weigh_examples
from fedloom.records.config import (
    Config,
    DataSettings,
    FlowerSettings,
    OutputSettings,
)
from fedloom.records.configfile import dump
from fedloom.records.ledger import RunRow
from fedloom.report.baseline import group_modules
from fedloom.rounds.job import Job
from fedloom.rounds.turns import Task, Train, Trained
from fedloom.workspace.clients import LocalClient, split_trained
from fedloom.workspace.plan import choose_method, plan_job, values_of

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True, eq=False, slots=True)
class Setup:
    """All that a run works with. `heldout` maps domains to the examples that scores are taken on.

    data: what the clients' examples weigh, where they are at hand.
    """

    config: Config
    job: Job
    model: PeftModel
    adapter: Adapter
    initial: LoraState
    sites: Mapping[str, LocalClient]
    heldout: Mapping[str, TokenizedExamples]
    manifest: Manifest | None
    fingerprint: str
    data: Volume = Volume()

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
            modules=group_modules(
                {module: (pair.shape, pair.rank) for module, pair in self.initial.items()},
                {name: site.ranks for name, site in self.sites.items()},
            ),
            baseline_r=self.config.output.baseline_r,
            data_bytes=self.data.by_client,
            data_coding=self.data.coding,
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

    def task(self, client: str, interrupt: Callable[[], None] | None = None) -> Task:
        """What a training step of the client's own has to know; `interrupt` as for `train`."""
        adapter = self.sites[client].adapter
        return Task(
            method=self.job.method,
            num_rounds=self.config.federation.num_rounds,
            ranks=adapter.ranks,
            alphas={module: placed.alpha for module, placed in adapter.modules.items()},
            use_rslora=adapter.lora.use_rslora,
            steps=self.config.training.max_steps,
            interrupt=interrupt,
        )

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
    return replace(
        build_setup(config, texts, heldout_examples(config.data), manifest, method), data=weigh_examples(texts)
    )


def build_setup(
    config: Config,
    texts: Mapping[str, Sequence[Example]],
    heldout: Mapping[str, Sequence[Example]],
    manifest: Manifest | None = None,
    method: Method | None = None,
) -> Setup:
    """`load_setup` from examples by client. Of a client without examples only the ranks are used."""
    set_threads(config)
    method = choose_method(config, method)
    base, tokenizer = load_base(config.model.path, config.model.dtype, config.model.quantization, config.model.device)
    plan = plan_job(linear_modules(base), config, texts, method)
    data = config.data
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
    return Setup(
        config=config,
        job=plan.job,
        initial=plan.initial,
        model=peft_bridge.attach(base, plan.shared),
        adapter=plan.shared,
        sites={name: LocalClient(adapter, tokens[name]) for name, adapter in plan.adapters.items()},
        heldout=scored,
        manifest=manifest,
        fingerprint=fingerprint(config, texts),
    )


def build_setup_around(config: Config, model: PeftModel, clients: Collection[str]) -> Setup:
    """`build_setup` around a model that somebody has loaded and wrapped, and trains himself: it brings no examples."""
    set_threads(config)
    plan = plan_job(peft_bridge.linear_beneath(model), config, clients, choose_method(config, None))
    return Setup(
        config=config,
        job=plan.job,
        initial=plan.initial,
        model=model,
        adapter=plan.shared,
        sites={name: LocalClient(adapter, TokenizedExamples((), 0)) for name, adapter in plan.adapters.items()},
        heldout={},
        manifest=None,
        fingerprint=fingerprint(config, {name: [] for name in clients}),
    )


def set_threads(config: Config) -> None:
    """Have torch use model.threads from now on."""
    if config.model.threads:
        torch.set_num_threads(config.model.threads)


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


def check_clients_exist(
    settings: Collection[str], clients: Collection[str], what: str = "[clients.{name}] has settings"
) -> None:
    """Raises ConfigError where [clients.<name>], or `what` else goes by name, is about a client that there is not."""
    for name in settings:
        if name not in clients:
            near = get_close_matches(name, clients, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(clients)[:9])}"
            raise ConfigError(f"{what.format(name=name)} for a client without data; {hint}")


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
