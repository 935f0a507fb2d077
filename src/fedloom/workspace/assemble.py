"""From settings to things: the base model, the clients with their data, the held-out sets, and the job they share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedloom.adapters.folder import AdapterFolder, other_base_note
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraPair, LoraState, subset
from fedloom.methods.method import Method, State
from fedloom.model import peft_bridge
from fedloom.model.answers import Answered, answer_examples
from fedloom.model.base import load_base
from fedloom.model.evaluate import Scores, exact_match_and_loss, mean_error
from fedloom.model.examples import Example
from fedloom.model.identity import base_digest
from fedloom.model.limits import model_limits
from fedloom.model.local import train_locally
from fedloom.model.packing import check_packs, may_share
from fedloom.model.partition import Manifest, data_digest
from fedloom.model.peft_bridge import linear_modules
from fedloom.model.placement import Adapter, untrained_note
from fedloom.model.private import PrivateRound
from fedloom.model.scorer import Scorer, build_scorer
from fedloom.model.shared_base import LoadBase
from fedloom.model.tokens import TokenizedExamples
from fedloom.model.training import check_optimizer
from fedloom.model.volume import Volume, weigh_examples
from fedloom.noise.accounting import SampledNoise
from fedloom.records.config import Config
from fedloom.records.ledger import RunRow
from fedloom.records.noise import plan_noise
from fedloom.report.baseline import group_modules
from fedloom.rounds.job import Job, group_alike
from fedloom.rounds.step import Task, Train, Trained
from fedloom.workspace.clients import LocalClient, split_trained
from fedloom.workspace.data import (
    check_unseen,
    client_examples,
    describe_examples,
    heldout_examples,
    public_examples,
    validation_examples,
)
from fedloom.workspace.judge import Judge
from fedloom.workspace.participants import check_clients_exist, select_participants
from fedloom.workspace.plan import choose_method, count_values, describe_excess, plan_job
from fedloom.workspace.privacy import describe_masked, describe_sum_noise
from fedloom.workspace.private import describe_noise, plan_round, refuse_own_trainer
from fedloom.workspace.resumption import dump_fixed
from fedloom.workspace.spending import spend_client_budget
from fedloom.workspace.tokenized import rendering_notes, tokenize_clients, tokenize_scored

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False, slots=True)
class Setup:
    """All that a run works with. `scorer` holds the examples that scores are taken on, `validation` those that a round
    is chosen on, by domain.

    public: examples of the server's own, by which updates that do harm are known; none where that is not asked for.
    notes: what was said while the data were read.
    left_out: a note on places of the model that could be adapted and are not.
    data: what the clients' examples weigh, where they are at hand.
    judge: who scores in place of this process, whose `model` then may have no weights.
    secret: what noise on examples comes from; without one it is drawn anew every time.
    """

    config: Config
    job: Job
    model: PeftModel
    adapter: Adapter
    initial: LoraState
    sites: Mapping[str, LocalClient]
    manifest: Manifest | None
    fingerprint: str
    notes: tuple[str, ...] = ()
    scorer: Scorer = Scorer()
    validation: Mapping[str, TokenizedExamples] = field(default_factory=dict)
    public: Mapping[str, TokenizedExamples] = field(default_factory=dict)
    left_out: str | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    data: Volume = Volume()
    judge: Judge | None = None
    secret: bytes = field(default=b"", repr=False)

    @property
    def heldout(self) -> Mapping[str, TokenizedExamples]:
        """Domain → the examples that scores are taken on."""
        return self.scorer.data

    def outlined(self) -> Setup:
        """The same without the values of the first adapter, for whoever has them in a state: its shapes are left."""
        return replace(self, initial=self.initial.map(lambda pair: LoraPair(pair.A.to("meta"), pair.B.to("meta"))))

    def with_files_in(self, folder: Path) -> Setup:
        """The same with large payloads in files there; a secret sum's are drawn noise for, and stay in memory."""
        return self if self.job.secure else replace(self, job=replace(self.job, scratch=folder))

    def warnings(self) -> list[str]:
        """What the user should know about data and settings before the first round."""
        held = {f"client {name}": site.data for name, site in self.sites.items()}
        held |= {f"held-out set {name}": data for name, data in self.heldout.items()}
        held |= {f"validation set {name}": data for name, data in self.validation.items()}
        advice = self.job.method.advise(self.initial, self.job.context(1))
        start = self.config.model.adapter
        other = other_base_note([AdapterFolder(start)], self.config.model.path) if start else None
        both = self.config.federation.validates and self.config.data.validation == self.config.data.heldout
        leak = "data.heldout is the split that the round is chosen on (data.validation): its scores are too good"
        masked = describe_masked(self.job, self.initial)
        told = (other, self.left_out, advice, describe_excess(self.adapter), both and leak, masked)
        said = [note for note in told if note]
        return [*self.notes, *said, *rendering_notes(held, self.config.data.max_length)]

    def describe(self) -> RunRow:
        """The run, as the first row of a ledger says it."""
        whole = self.initial.numel()
        ranks = {name: site.ranks for name, site in self.sites.items()}
        values = {id(own): count_values(self.initial, own) for _, own, _ in group_alike(ranks)}
        held = {name: values[id(own)] for name, own in ranks.items()}
        return RunRow(
            method=self.job.method.name,
            model=self.config.model.path,
            clients=tuple(self.sites),
            num_rounds=self.config.federation.num_rounds,
            adapter_values=whole,
            seed=self.config.federation.seed,
            client_values={name: count for name, count in held.items() if count != whole},
            modules=group_modules(
                {module: (pair.shape, pair.rank) for module, pair in self.initial.items()},
                ranks,
            ),
            baseline_r=self.config.output.baseline_r,
            data_bytes=self.data.by_client,
            data_coding=self.data.coding,
        )

    def noise(self, client: str) -> SampledNoise | None:
        """What a round of the client's training spends on its examples; None without training.dp."""
        examples, rounds = len(self.sites[client].data), self.config.federation.num_rounds
        return plan_noise(self.config.training_of(client), examples, rounds)

    def private_round(self, client: str, state: State, round: int, seed: int) -> PrivateRound | None:
        """The noise of one round of the client's training, drawn from the secret; None without training.dp."""
        noise, training = self.noise(client), self.config.training_of(client)
        about = (self.fingerprint, self.config.federation.num_rounds, client, round, seed, state.version, state.digest)
        return plan_round(training, noise, self.secret, about)

    def train(self, client: str, interrupt: Callable[[], None] | None = None) -> Train:
        """The client's training step; `interrupt` is called before every forward pass, and may end it by raising."""
        site = self.sites[client]

        def step(state: State, round: int, seed: int) -> Trained:
            peft_bridge.configure(self.model, site.adapter)
            trained = train_locally(
                self.model,
                self.job,
                state,
                split_trained(state, site.ranks),
                site.data,
                self.config.training_of(client),
                round=round,
                seed=seed,
                interrupt=interrupt,
                private=self.private_round(client, state, round, seed),
            )
            return replace(trained, adapter=subset(trained.adapter, site.ranks))

        return step

    def task(self, client: str, interrupt: Callable[[], None] | None = None) -> Task:
        """What a training step of the client's own has to know; `interrupt` as for `train`."""
        adapter, training = self.sites[client].adapter, self.config.training_of(client)
        return Task(
            method=self.job.method,
            num_rounds=self.config.federation.num_rounds,
            ranks=adapter.ranks,
            alphas={module: placed.alpha for module, placed in adapter.modules.items()},
            use_rslora=adapter.lora.use_rslora,
            steps=training.max_steps or 0,
            epochs=training.num_train_epochs or 0.0,
            interrupt=interrupt,
        )

    def evaluate(self, state: State) -> dict[str, Scores]:
        """The model that `state` stands for, on every domain's held-out examples."""
        return self.judge.evaluate(state) if self.judge else self.scorer.score(self.model_of(state))

    def validate(self, state: State) -> dict[str, Scores]:
        """The same on every domain's validation examples; exact match and loss alone."""
        if self.judge:
            return self.judge.validate(state)
        model, size = self.model_of(state), self.config.evaluation.batch_size
        return {domain: exact_match_and_loss(model, data, size) for domain, data in self.validation.items()}

    def public_error(self, state: State, bend: float) -> float:
        """What the model `state` stands for gets wrong of the server's public examples (`evaluate.mean_error`)."""
        if self.judge:
            return self.judge.public_error(state, bend)
        (data,) = self.public.values()
        return mean_error(self.model_of(state), data, bend, self.config.evaluation.batch_size)

    def model_of(self, state: State) -> PeftModel:
        """The one model in memory, made the one that `state` stands for until it is made another."""
        peft_bridge.configure(self.model, self.adapter)
        peft_bridge.write_adapter(self.model, state.adapter)
        peft_bridge.set_frozen(self.model, state.fixed)
        return self.model

    def answer(self, state: State) -> list[Answered]:
        """What the model that `state` stands for answers to a few of the held-out examples."""
        number = self.config.output.answers
        if not self.tokenizer or not self.heldout or not number:
            return []
        if self.judge:
            return self.judge.answer(state)
        return answer_examples(self.model_of(state), self.tokenizer, self.heldout, number)


def load_setup(config: Config, method: Method | None = None, load: LoadBase | None = None) -> Setup:
    """Load and check everything. Raises ConfigError, DataError or ModelError before any time is spent on training.

    load: see `build_setup`.
    """
    notes: list[str] = []
    check_unseen(config.data)
    texts, manifest = client_examples(config, notes.append)
    check_clients_exist(config.clients, texts)
    texts = select_participants(texts, config.federation.participants)
    heldout, validation = heldout_examples(config.data, notes.append), validation_examples(config, notes.append)
    public = public_examples(config, notes.append)
    setup = build_setup(
        config, texts, heldout, manifest, method, notes, validation=validation, public=public, load=load
    )
    return replace(setup, data=weigh_examples(texts))


def build_setup(
    config: Config,
    texts: Mapping[str, Sequence[Example]],
    heldout: Mapping[str, Sequence[Example]],
    manifest: Manifest | None = None,
    method: Method | None = None,
    notes: Sequence[str] = (),
    *,
    validation: Mapping[str, Sequence[Example]] | None = None,
    public: Sequence[Example] = (),
    load: LoadBase | None = None,
) -> Setup:
    """`load_setup` from examples by client. Of a client without examples only the ranks are used.

    notes: what was said while they were read. load: how the base model is had; from its files if left out.
    """
    notes = (*notes, *describe_examples(texts, heldout))
    set_threads(config)
    method = choose_method(config, method)
    base, tokenizer = (load or load_base)(*base_form(config))
    linear = linear_modules(base)
    data_bytes = weigh_examples(texts).by_client.values() if config.wire.client_budget else ()
    config, spent = spend_client_budget(linear, config, data_bytes, len(texts), method)
    method = choose_method(config, None) if spent else method
    notes = (*notes, spent) if spent else notes
    plan = plan_job(linear, config, texts, method).on_base(partial(peft_bridge.read_weight, base))
    data, limits = config.data, model_limits(base)
    tokens = tokenize_clients(texts, data, tokenizer, limits)
    scored = tokenize_scored("held-out", heldout, data, tokenizer, limits)
    trains = any(texts.values())  # else nobody does in this process
    if trains and not data.packing:
        may_share(base)  # now, while no adapter changes the answer
    elif trains:
        check_packs(base, limits.rows)
    model = peft_bridge.attach(base, plan.shared)
    if trains:
        check_optimizer(model, config.training)
    told = describe_noise(config, {name: len(tokens[name]) for name, held in texts.items() if held})
    summed = describe_sum_noise(plan.job, plan.initial, config.federation.num_rounds)
    notes = (*notes, *filter(None, (told, summed)))
    return Setup(
        config=config,
        job=plan.job,
        initial=plan.initial,
        model=model,
        adapter=plan.shared,
        sites={name: LocalClient(adapter, tokens[name]) for name, adapter in plan.adapters.items()},
        manifest=manifest,
        fingerprint=fingerprint(config, texts),
        notes=notes,
        scorer=build_scorer(scored, tokenizer, config.evaluation),
        validation=tokenize_scored("validation", validation or {}, data, tokenizer, limits),
        public=tokenize_scored("public", {"public": public} if public else {}, data, tokenizer, limits),
        left_out=untrained_note(linear, plan.shared),
        tokenizer=tokenizer,
    )


def base_form(config: Config) -> tuple[str, str, str, str]:
    """Where a run's base model is, and the form that its weights are loaded in: the arguments of `load_base`."""
    model = config.model
    return model.path, model.dtype, model.quantization, model.device


def build_setup_around(config: Config, model: PeftModel, clients: Collection[str]) -> Setup:
    """`build_setup` around a model that somebody has loaded and wrapped, and trains himself: it brings no examples."""
    set_threads(config)
    linear, method = peft_bridge.linear_beneath(model), choose_method(config, None)
    refuse_own_trainer(config, method)
    if config.wire.client_budget:  # the trainer's model has its ranks already
        raise ConfigError(
            "wire.client_budget chooses the rank, and a trainer of one's own has an adapter already: set wire.budget"
        )
    plan = plan_job(linear, config, clients, method).on_base(partial(peft_bridge.read_weight, model.get_base_model()))
    return Setup(
        config=config,
        job=plan.job,
        initial=plan.initial,
        model=model,
        adapter=plan.shared,
        sites={name: LocalClient(adapter, TokenizedExamples((), 0)) for name, adapter in plan.adapters.items()},
        manifest=None,
        fingerprint=fingerprint(config, {name: [] for name in clients}),
    )


def set_threads(config: Config) -> None:
    """Have torch use model.threads from now on."""
    if config.model.threads:
        torch.set_num_threads(config.model.threads)


def fingerprint(config: Config, texts: Mapping[str, Sequence[Example]]) -> str:
    """32 hex digits for what a run's outcome depends on: settings, base weights and training data.

    The number of rounds is no part of it: a run may be given more.
    """
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(dump_fixed(config).encode())
    hasher.update(base_digest(config.model.path).encode())
    for client, examples in texts.items():
        hasher.update(f"{client} {data_digest(examples)}".encode())
    return hasher.hexdigest()
