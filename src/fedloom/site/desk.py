"""A site's side of a round: a request comes in, the policy is asked, the model is trained, the reply is on disk.

Requests may be repeated without harm: after a crash anywhere between site and server the same request gets the same
bytes again, and no residual is taken or counted twice.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fedloom.errors import SiteError
from fedloom.methods.method import State
from fedloom.model.identity import base_digest, weights_digest
from fedloom.model.patch import PatchedTrainer
from fedloom.model.shared_base import SharedBase
from fedloom.noise.secret import keep_secret
from fedloom.records.config import Config
from fedloom.records.ledger import Row
from fedloom.report.card import CardFacts
from fedloom.rounds.memory import give_back
from fedloom.rounds.step import Train, Trained
from fedloom.rounds.turns import client_turn
from fedloom.site.approval import NOTES, JobBook
from fedloom.site.audit import AuditTrail
from fedloom.site.config import SiteConfig
from fedloom.site.examples import charge_examples
from fedloom.site.guard import guard_training, limit_time
from fedloom.site.order import own_seed
from fedloom.site.places import Place, Places
from fedloom.site.policy import (
    check_epochs,
    check_job,
    check_may_leave,
    check_room,
    check_settings,
    check_spending,
    count_drawn,
)
from fedloom.site.presence import compare_clocks, note_request
from fedloom.site.protocol import SPOKEN, Fact, Parcel, Request, parse_request
from fedloom.site.replies import Rows, facts_of, reply_error
from fedloom.site.setups import build_around_trainer, build_own
from fedloom.site.store import Store, TurnRecord
from fedloom.site.sums import Sums, hide_turn
from fedloom.site.told import read_told
from fedloom.site.withdrawal import Dropped, Wanted
from fedloom.workspace.assemble import Setup, base_form
from fedloom.workspace.cards import write_card
from fedloom.workspace.export import export_adapter, save_run_adapter
from fedloom.workspace.private import FILE, needs_secret

log = logging.getLogger("fedloom.worker")


class Desk:
    """Answers requests, one at a time. What a job needs stays loaded from one request to the next, until `release`;
    jobs over one base model share its weights.

    assembled: the run's settings → model and examples, where several sites of one process share them. own: the site's
    own trainer, which trains in place of fedloom's, on its own model and examples; SITE.toml's `data` is not read then.
    """

    def __init__(
        self, site: SiteConfig, assembled: Callable[[Config], Setup] | None = None, own: PatchedTrainer | None = None
    ) -> None:
        self.site = site
        self.own_trainer = own
        self.assembled = assembled or self.build_own_setup
        state = Path(site.state)
        self.trail = AuditTrail(state / "audit")
        self.jobs = JobBook(state, ask=site.policy.approve == "ask", room=partial(check_room, site.policy, state))
        self.places = Places()
        self.shared = SharedBase()
        self.wanted = Wanted()
        self.sums = Sums(site, self.trail)
        self._base = ""

    @property
    def place(self) -> Place | None:
        """The job that was asked for last."""
        return self.places.newest

    @property
    def held(self) -> TurnRecord | None:
        """The state that this job is in."""
        return None if self.place is None else self.place.held

    def answer(self, parcel: Parcel, waited: float = 0.0) -> Parcel:
        """The reply to a request that came `waited` seconds ago.

        Never raises: what goes wrong is logged here and told as the policy allows.
        """
        began, came = time.perf_counter(), self.trail.clock.now()
        asked: Request | None = None
        try:
            asked = parse_request(parcel.facts, SPOKEN)
            note_request(Path(self.site.state), asked, came)
            log.info("%s of job %s, round %d", asked.ask, asked.job, asked.round)
            with self.wanted.during(asked, waited):
                payloads = parcel.payloads if isinstance(parcel.payloads, list) else list(parcel.payloads)
                reply = _ANSWERS[asked.ask](self, asked, payloads)
        except Dropped as dropped:
            log.info("the turn was dropped: %s", dropped.why)
            return Parcel({"dropped": dropped.why, "protocol": SPOKEN.newest})
        except Exception as error:  # a worker outlives every job
            return reply_error(self.site, error, self.places.get(asked.job) if asked else None)
        finally:
            if asked:
                self.places.rest(asked.job)
                note_request(Path(self.site.state), asked, came, self.trail.clock.now())
        log.info("%s answered in %.2f s", asked.ask, time.perf_counter() - began)
        facts: dict[str, Fact] = {"protocol": SPOKEN.newest, "busy": time.perf_counter() - began}
        return Parcel({**reply.facts, **facts}, reply.payloads)

    def hello(self, asked: Request, payloads: list[bytes]) -> Parcel:
        """Get ready; say who this is and which global state it holds."""
        check_spending(self.site.policy, self.trail.count_spent(asked.job, asked.round))
        place, held = self.open(asked)
        if not place.store.exists():
            self.keep(place, held, (), len(asked.settings.encode()))
        now = self.trail.clock.now()
        self.jobs.note("begun", asked, now)
        compare_clocks(asked, now)
        return Parcel({"name": self.site.name, "version": held.after.version, "digest": held.after.digest})

    def turn(self, asked: Request, payloads: list[bytes]) -> Parcel:
        """Bring the state in step, train, answer; or answer again where this was done before."""
        place, held = self.open(asked)
        self.wanted.check_time()
        job, rows = place.setup.job, Rows(asked.round, self.site.name)
        rounds = place.setup.config.federation.num_rounds
        if not 1 <= asked.round <= rounds:  # in a round beyond them the learning rate could be anything
            raise SiteError(f"a turn of round {asked.round} of a run of {rounds} rounds")
        state = held.base(asked.counted) if held.round != asked.round else held.before
        state = place.bring_in_step(state, payloads, rows.received)
        spent = self.trail.count_spent(asked.job, asked.round)
        parts = job.method.parts(state, asked.round)
        if held.round == asked.round and (held.after.version, held.after.digest) == (state.version, state.digest):
            log.info("round %d was trained already: the same reply is sent again", asked.round)
            if job.secure:
                return self.be_ready(asked, place, held)
            held = replace(held, payload=place.store.read_payload())
            check_may_leave(self.site.policy, held.payload, state.adapter, spent, parts)
            return self.leave(asked, held)
        check_spending(self.site.policy, spent)
        self.jobs.check_updates(asked, self.trail.payloads_of(asked.job), rounds)
        self.check_room(place, TurnRecord(asked.round, state, state))
        log.info("round %d: training", asked.round)
        del held
        if place.store.exists():
            place.held = None  # as large as the state that training begins with, and on disk
            give_back(4 * state.adapter.numel())
        charges: list[str] = []
        done = client_turn(job, self.site.name, state, (), self.training(asked, place, charges), asked.round)
        check_may_leave(self.site.policy, done.payload, state.adapter, spent, parts)
        told, payload = facts_of(done), done.payload
        if job.secure:
            told, payload = hide_turn(place.setup, self.site.name, state, done, asked.round)
        rows.sent(done, hidden=job.secure is not None)
        held = TurnRecord(asked.round, state, done.state, told, payload, "".join(charges))
        del done, payload  # and with it the adapter after training
        give_back(4 * state.adapter.numel())
        self.keep(place, held, rows.found)
        return self.be_ready(asked, place, held) if job.secure else self.leave(asked, held)

    def training(self, asked: Request, place: Place, charges: list[str]) -> Train:
        """The training step under the site's rules; digests of the lines that charge for its noise go to `charges`."""
        policy, name = self.site.policy, self.site.name

        def charge() -> None:
            if policy.privacy and not charges:
                charges.append(self.trail.charge(asked.job, asked.round, policy.privacy.mu).digest)

        def ordered(state: State, round: int, seed: int) -> Trained:
            if policy.order == "site":
                seed = own_seed(Path(self.site.state), asked.job, round)
            private = place.setup.private_round(name, state, round, seed) if self.own_trainer is None else None
            if private is not None:
                held, turns = len(place.setup.sites[name].data), place.setup.config.turns_of_client
                charges.append(charge_examples(self.trail, policy, asked.job, asked.round, private, held, turns))
            trained = step(state, round, seed)
            still_wanted()  # the last moment at which nothing was charged or kept
            # The steps of an epoch tell how many examples there are.
            return replace(trained, steps=0) if hidden else trained

        epochs = place.setup.config.training_of(self.site.name).num_train_epochs
        hidden = policy.declared_examples is not None and epochs is not None
        still_wanted = self.wanted.guard()
        interrupt = self.wanted.guard(limit_time(policy))
        if self.own_trainer is None:
            step = place.setup.train(self.site.name, interrupt)
        else:
            step = self.own_trainer.for_task(place.setup.task(self.site.name, interrupt))
        return guard_training(policy, ordered, place.setup.job.method.trainable, charge)

    def leave(self, asked: Request, held: TurnRecord) -> Parcel:
        """The reply, recorded in the audit trail before it goes."""
        self.jobs.check(asked, self.trail.clock.now())  # a person may have said no while it trained
        mu = self.site.policy.privacy.mu if self.site.policy.privacy else None
        self.trail.record(held.payload, asked.job, asked.round, mu, charge=held.charge or None)
        return Parcel(json.loads(held.facts), (held.payload,))

    def be_ready(self, asked: Request, place: Place, held: TurnRecord) -> Parcel:
        """The reply to a turn whose vector is asked for in a secure sum: nothing of it leaves yet."""
        self.jobs.check(asked, self.trail.clock.now())
        return Parcel({**json.loads(held.facts), **self.sums.ready(place, held)})

    def sum(self, asked: Request, payloads: list[bytes]) -> Parcel:
        """The next message of a secure sum."""
        place, held = self.open(asked)
        if place.setup.job.secure is None or len(payloads) != 1:
            raise SiteError("a message of a secure sum that is none, or of a run without secure aggregation")
        return Parcel({"phase": asked.phase}, (self.sums.answer(asked, place, held, payloads.pop()),))

    def withdraw(self, asked: Request, payloads: list[bytes]) -> Parcel:
        """Nothing is left to withdraw: while a turn trains, `wanted` takes its withdrawal."""
        return Parcel({})

    def deliver(self, asked: Request, payloads: list[bytes]) -> Parcel:
        """Bring the state in step after the last round, and write the result as an adapter."""
        place, held = self.open(asked)
        rows = Rows(asked.round, self.site.name)
        state = place.bring_in_step(held.base(asked.counted), payloads, rows.received)
        adapter, _ = export_adapter(state, None)
        held = replace(held, before=state, after=state)
        if place.store.exists():
            place.held = None  # as large as the state that was received, and on disk
            give_back(4 * state.adapter.numel())
        self.keep(place, replace(held, payload=place.store.read_payload()), rows.found, 4 * adapter.numel())
        out, config = place.store.folder / "adapter", place.setup.config
        save_run_adapter(adapter, self.site.model, place.setup.sites[self.site.name].adapter, out)
        named = config.model_copy(update={"model": config.model.model_copy(update={"path": self.site.model})})
        rank, digest = max(adapter.ranks().values(), default=0), weights_digest(self.site.model)
        write_card(out, named, CardFacts(rank, digest, asked.round))
        self.jobs.note("done", asked, self.trail.clock.now())
        return Parcel({"version": state.version, "digest": state.digest})

    def keep(self, place: Place, held: TurnRecord, rows: Sequence[Row], more: int = 0) -> None:
        """Have a state on disk, and be in it. more: bytes that will be written beside it."""
        if not place.store.exists():
            rows = (place.setup.describe(), *rows)
        self.check_room(place, held, more)
        place.save(held, rows)

    def check_room(self, place: Place, held: TurnRecord, more: int = 0) -> None:
        """Raises PolicyRefusal unless there is room for a record, or for the largest of the job so far, and more."""
        check_room(self.site.policy, Path(self.site.state), place.store.count_room(held) + more + NOTES)

    def open(self, asked: Request) -> tuple[Place, TurnRecord]:
        """The job's model, data and state, loaded unless they are at hand.

        Raises SiteError for another base model, PolicyRefusal for a job that is not allowed here: nothing is loaded
        then. Nothing is written yet either, so that a request that fails later leaves nothing of a new job.
        """
        config = read_told(asked.settings, self.site)
        check_settings(self.site.policy, config, self.site.name, asked.round)
        self._base = self._base or base_digest(self.site.model)
        if asked.base != self._base:
            raise SiteError(
                f"the server's base model has digest {asked.base!r}, the one in {self.site.model} has {self._base}: "
                "both sides need the same files"
            )
        self.jobs.check(asked, self.trail.clock.now(), delivery=asked.ask == "deliver")
        place = self.places.find(asked.job, asked.settings)
        if place is None:
            if self.shared.is_loaded and not self.shared.holds(*base_form(config)):
                self.release()  # before the weights in another form are loaded beside them
            place = self.load_place(asked, config)
            self.let_go(self.places.add(place))
        else:
            check_epochs(self.site.policy, config, self.site.name, self.count_steps(place.setup), asked.round)
        held = place.recall()
        assert held is not None  # a place has a first state, or one on disk
        return place, held

    def load_place(self, asked: Request, config: Config) -> Place:
        """Base model, examples and folder for a job. Raises SiteError where the site is not among its participants."""
        names = config.federation.participants or ()
        if self.site.name not in names:
            raise SiteError(f"the run is for {', '.join(map(repr, names[:9]))}; this site is {self.site.name!r}")
        setup = self.assembled(config).with_files_in(Path(self.site.state))
        data = setup.sites[self.site.name].data
        # A packed row holds one example at least, so these are no fewer than said.
        examples, draws = len(data), count_drawn(setup.config.training_of(self.site.name).for_examples(data.num_rows))
        if self.own_trainer is not None:
            task = setup.task(self.site.name)
            self.own_trainer.for_task(task)  # what does not go together is said before a round
            examples, draws = self.own_trainer.num_examples, self.own_trainer.count_drawn(task)
        check_epochs(self.site.policy, config, self.site.name, self.count_steps(setup), asked.round)
        check_job(self.site.policy, setup.job.method.name, tuple(setup.initial), examples, draws)
        # Residuals from rounds without noise may not leave later, so a change of the privacy settings ends a job here.
        rests_on = "\n".join((self._base, asked.settings, repr(self.site.policy.privacy)))
        if needs_secret(config):
            setup = replace(setup, secret=keep_secret(Path(self.site.state) / FILE))
        seal = hashlib.blake2b(rests_on.encode(), digest_size=16).hexdigest()
        store = Store(Path(self.site.state) / "jobs" / asked.job, seal)
        return Place.of(asked.job, asked.settings, setup, store, self.site.name)

    def count_steps(self, setup: Setup) -> int:
        """Optimiser steps of a round here."""
        if self.own_trainer is not None:
            return self.own_trainer.count_steps(setup.task(self.site.name))
        return setup.config.training_of(self.site.name).for_examples(setup.sites[self.site.name].data.num_rows).steps

    def build_own_setup(self, config: Config) -> Setup:
        """The base model with this site's examples, or the job around its own trainer."""
        if self.own_trainer is not None:
            return build_around_trainer(self.site, self.own_trainer, self._base, config)
        return build_own(self.site, self.shared, config)

    def close(self) -> None:
        """Let go of the jobs' folders; the next request reads what is there then."""
        self.places.drop(list(self.places))

    def release(self, idle_seconds: float = -1.0) -> None:
        """Let go of the jobs that nobody has asked for in so many seconds, and with the last one of the base model."""
        idle = self.places.idle(idle_seconds)
        if idle:
            self.let_go(self.places.drop(idle))

    def let_go(self, gone: Sequence[Place]) -> None:
        """Have the memory back of places that were dropped."""
        for place in gone:
            log.info("model and data of job %s released", place.job)
        has_loaded = self.shared.is_loaded
        if not self.places:
            self.shared.release()
        if gone and has_loaded:  # collecting goes through all objects of the process, which takes a while
            gc.collect()
            torch.cuda.empty_cache()


_ANSWERS = {"hello": Desk.hello, "turn": Desk.turn, "withdraw": Desk.withdraw, "deliver": Desk.deliver, "sum": Desk.sum}
