"""A site's side of a round: a request comes in, the policy is asked, the model is trained, the reply is on disk.

Requests may be repeated without harm: after a crash anywhere between site and server the same request gets the same
bytes again, and no residual is taken or counted twice.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import math
import secrets
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedloom.adapters import save_adapter
from fedloom.base_model import weights_digest
from fedloom.config import Config
from fedloom.configfile import parse
from fedloom.data import load_examples
from fedloom.errors import FedloomError, SiteError
from fedloom.export import exported
from fedloom.ledger import Training
from fedloom.rounds import ClientTurn, accept, client_turn, start
from fedloom.runs import transfer_row
from fedloom.setup import Setup, assemble
from fedloom.site.audit import AuditTrail
from fedloom.site.config import SiteConfig
from fedloom.site.policy import check_job, check_method, check_update, guarded, told_to_server
from fedloom.site.protocol import Fact, Parcel, Request, request
from fedloom.site.store import Held, Store
from fedloom.wire import read_header

log = logging.getLogger("fedloom.worker")


@dataclass(frozen=True, eq=False, slots=True)
class Place:
    """The job that the site is working for, with everything loaded."""

    job: str
    settings: str
    setup: Setup
    store: Store


class Desk:
    """Answers requests, one at a time. The model stays loaded from one to the next, until `release`.

    assembled: the run's settings → model and examples, where several sites of one process share them.
    """

    def __init__(self, site: SiteConfig, assembled: Callable[[Config], Setup] | None = None) -> None:
        self.site = site
        self.assembled = assembled or self.alone
        self.trail = AuditTrail(Path(site.state) / "audit")
        self.place: Place | None = None
        self.held: Held | None = None
        self._base = ""

    def answer(self, parcel: Parcel) -> Parcel:
        """The reply to a request. Never raises: what goes wrong is logged here and told as the policy allows."""
        began = time.perf_counter()
        try:
            asked = request(parcel.facts)
            log.info("%s of job %s, round %d", asked.ask, asked.job, asked.round)
            reply = _ANSWERS[asked.ask](self, asked, parcel.payloads)
        except Exception as error:  # a worker outlives every job
            reference = secrets.token_hex(4)
            log.error("reference %s: %s", reference, error, exc_info=not isinstance(error, FedloomError))
            said: dict[str, Fact] = {"error": told_to_server(self.site.policy, error, reference)}
            if self.held is not None:
                said |= {"version": self.held.after.version, "digest": self.held.after.digest}
            return Parcel(said)
        log.info("%s answered in %.2f s", asked.ask, time.perf_counter() - began)
        return Parcel({**reply.facts, "busy": time.perf_counter() - began}, reply.payloads)

    def hello(self, asked: Request, payloads: Sequence[bytes]) -> Parcel:
        """Get ready; say who this is and which global state it holds."""
        place, held = self.open(asked)
        spent = self.trail.spent(asked.job, asked.round)
        data = place.setup.sites[self.site.name].data
        check_job(self.site.policy, place.setup.job.method.name, tuple(place.setup.initial), len(data), spent)
        return Parcel({"name": self.site.name, "version": held.after.version, "digest": held.after.digest})

    def turn(self, asked: Request, payloads: Sequence[bytes]) -> Parcel:
        """Bring the state in step, train, answer; or answer again where this was done before."""
        place, held = self.open(asked)
        job, current = place.setup.job, held.after
        state = held.base(asked.counted) if held.round != asked.round else held.before
        fresh = [payload for payload in payloads if not _applied(payload, state.version)]
        for payload in fresh:
            state = accept(job, state, payload)
        spent = self.trail.spent(asked.job, asked.round)
        if held.round == asked.round and (current.version, current.digest) == (state.version, state.digest):
            log.info("round %d was trained already: the same reply is sent again", asked.round)
            check_update(self.site.policy, held.payload, state.adapter, spent)
            return self.leave(asked, held)
        data = place.setup.sites[self.site.name].data
        check_job(self.site.policy, job.method.name, tuple(place.setup.initial), len(data), spent)
        train = guarded(self.site.policy, place.setup.train(self.site.name), job.method.trainable)
        log.info("round %d: training", asked.round)
        done = client_turn(job, self.site.name, state, (), train, asked.round)
        check_update(self.site.policy, done.payload, state.adapter, spent)
        held = Held(asked.round, state, done.state, json.dumps(_facts(done)).encode(), done.payload)
        ledger, trained = place.store.ledger, done.trained
        for payload in fresh:
            ledger.append(transfer_row(asked.round, self.site.name, "down", payload))
        ledger.append(
            Training(asked.round, self.site.name, trained.loss, trained.steps, trained.num_examples, trained.seconds)
        )
        ledger.append(transfer_row(asked.round, self.site.name, "up", done.payload))
        place.store.save(held)
        self.held = held
        return self.leave(asked, held)

    def leave(self, asked: Request, held: Held) -> Parcel:
        """The reply, recorded in the audit trail before it goes."""
        privacy = self.site.policy.privacy
        self.trail.record(held.payload, asked.job, asked.round, privacy.mu if privacy else None)
        return Parcel(json.loads(held.facts), (held.payload,))

    def deliver(self, asked: Request, payloads: Sequence[bytes]) -> Parcel:
        """Bring the state in step after the last round, and write the result as an adapter."""
        place, held = self.open(asked)
        state = held.base(asked.counted)
        for payload in payloads:
            if not _applied(payload, state.version):
                state = accept(place.setup.job, state, payload)
                place.store.ledger.append(transfer_row(asked.round, self.site.name, "down", payload))
        self.held = replace(held, before=state, after=state)
        place.store.save(self.held)
        adapter, _ = exported(state, None)
        settings = place.setup.sites[self.site.name].adapter
        save_adapter(adapter, self.site.model, settings, place.store.folder / "adapter")
        return Parcel({"version": state.version, "digest": state.digest})

    def open(self, asked: Request) -> tuple[Place, Held]:
        """The job's model, data and state, loaded unless they are at hand. Raises SiteError for another base model."""
        self._base = self._base or weights_digest(self.site.model)
        if asked.base != self._base:
            raise SiteError(
                f"the server's base model has digest {asked.base}, the one in {self.site.model} has {self._base}: "
                "both sides need the same files"
            )
        if (
            self.place is None
            or self.held is None
            or (self.place.job, self.place.settings)
            != (
                asked.job,
                asked.settings,
            )
        ):
            self.release()
            self.place = self.loaded(asked)
            self.held = self.place.store.load() or self.first(self.place)
        return self.place, self.held

    def loaded(self, asked: Request) -> Place:
        """Base model, examples and folder for a job. Raises SiteError where the site is not among its participants."""
        config = self.own(asked.settings)
        names = config.federation.participants or ()
        if self.site.name not in names:
            raise SiteError(f"the run is for {', '.join(names)}; this site is {self.site.name!r}")
        check_method(self.site.policy, config.method.name)
        setup = self.assembled(config)
        # Residuals from rounds without noise may not leave later, so a change of the privacy settings ends a job here.
        rests_on = "\n".join((self._base, asked.settings, repr(self.site.policy.privacy)))
        seal = hashlib.blake2b(rests_on.encode(), digest_size=16).hexdigest()
        return Place(asked.job, asked.settings, setup, Store(Path(self.site.state) / "jobs" / asked.job, seal))

    def alone(self, config: Config) -> Setup:
        """The base model with this site's examples; of the other sites only the ranks are of interest here."""
        mine = load_examples(self.site.data)
        names = sorted(config.federation.participants or ())
        setup = assemble(config, {name: mine if name == self.site.name else [] for name in names}, {})
        for text in setup.warnings():
            log.warning(text)
        return setup

    def own(self, text: str) -> Config:
        """The run's settings with this site's own model and device; the server's paths mean nothing here."""
        config = parse(tomllib.loads(text), "the server's settings")
        model = config.model.model_copy(update={"path": self.site.model, "device": self.site.device, "adapter": None})
        return config.model_copy(update={"model": model})

    def first(self, place: Place) -> Held:
        """The state before the first round. Its seal is on disk before anything rests on it."""
        setup = place.setup
        state = start(setup.job, setup.initial, setup.sites[self.site.name].ranks)
        place.store.ledger.append(setup.described())
        held = Held(0, state, state)
        place.store.save(held)
        return held

    def close(self) -> None:
        """Let go of the job's folder; the next request reads what is there then."""
        if self.place is not None:
            self.place.store.close()
        self.place = self.held = None

    def release(self) -> None:
        """Let go of model and data as well; the next request loads them again."""
        if self.place is not None:
            log.info("model and data of job %s released", self.place.job)
        self.close()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


_ANSWERS = {"hello": Desk.hello, "turn": Desk.turn, "deliver": Desk.deliver}


def _applied(payload: bytes, version: int) -> bool:
    """Whether this change was applied before: it was sent again because nobody knew."""
    header = read_header(payload)
    return header.kind == "change" and header.base_version < version


def _facts(done: ClientTurn) -> dict[str, Fact]:
    trained = done.trained
    loss = trained.loss if math.isfinite(trained.loss) else None
    return {"loss": loss, "steps": trained.steps, "examples": trained.num_examples, "seconds": trained.seconds}
