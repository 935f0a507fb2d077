"""What a job is, in the words of those who answer for a site's data: what it trains, what leaves, what that costs.

Made of the settings, the shapes of the base model and the site's own record; no weights are loaded, nothing is asked of
a server.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fedloom.errors import ConfigError, FedloomError, PolicyRefusal
from fedloom.methods.foreign import is_foreign
from fedloom.methods.table import build
from fedloom.model.base import empty_base
from fedloom.model.peft_bridge import linear_modules
from fedloom.model.placement import Adapter
from fedloom.model.sources import load_examples
from fedloom.noise.accounting import example_epsilon
from fedloom.records.config import Config, TrainingSettings
from fedloom.records.noise import plan_noise
from fedloom.records.quantities import parse_bytes
from fedloom.site.audit import AuditTrail, Line, mu_squared, sampled_noise
from fedloom.site.config import SiteConfig
from fedloom.site.examples import delta_for
from fedloom.site.policy import (
    check_examples,
    check_modules,
    check_spending,
    count_drawn,
    setting_checks,
    step_checks,
)
from fedloom.site.privacy import epsilon
from fedloom.workspace.clients import place_client

VALUE_BYTES = 4 + 1 / 8
"""Of a value, at most: float32, and its place in a bitmap."""
NAME_BYTES = 128
"""Of a factor's entry in a payload beside its name and its values: shape, form, lengths."""
HEAD_BYTES = 4096
"""Of a payload's header and checksum, at most."""
WEIGHT_VALUES = 32
"""Values of a vector that say what a site counts for, at most."""
SUM_BYTES = 300
"""Of what a site sends beside its vector in a secure sum, and again for each other site, at most."""
SUPERNODE = "supernode.sh"
"""The script beside SITE.toml that names the server."""


@dataclass(frozen=True, slots=True)
class Noise:
    """ε at δ: of the rounds of this job that are still to come, of all that left before, of both together.

    rounds: how many of them max_epsilon leaves; None where it leaves them all.
    """

    sigma: float
    clip_norm: float
    delta: float
    job: float
    spent: float
    together: float
    most: float | None
    rounds: int | None


@dataclass(frozen=True, slots=True)
class Dossier:
    """A job as one site sees it.

    method: its name and source; sends: what an update holds, in words; modules: name of a module's last part → in how
    many places it is trained; ranks: least and largest; values: numbers that the site trains; drawn: examples that a
    round draws; examples: that the site holds, None where they could not be read (`trouble` says why); told: the number
    of examples that the server is told. least_cohort: sites that a secure sum is of at least, 0 where the server sees
    single updates. bytes_round, bytes_all: that leave at most, in a round and in all. protected: whether the training
    puts noise on single examples; protection: how much, in words. objections: what the site's policy would refuse, and
    why.
    """

    method: str
    sends: str
    modules: dict[str, int]
    ranks: tuple[int, int]
    values: int
    participants: tuple[str, ...]
    rounds: int
    steps: int | None
    epochs: float | None
    batch: int
    drawn: int | None
    optimizer: str
    learning_rate: float
    examples: int | None
    trouble: str
    told: int | None
    least_cohort: int
    bytes_round: int
    bytes_all: int
    noise: Noise | None
    protected: bool
    protection: str
    server: str
    objections: tuple[str, ...]


def describe_job(site: SiteConfig, config: Config, file: Path, job: str = "") -> Dossier:
    """The job that `config` is for this site, whose SITE.toml is `file`. job: its number, where it has one.

    Raises FedloomError where the base model or the settings cannot be used at all.
    """
    adapter = place_client(linear_modules(empty_base(site.model)), config, site.name)
    examples, trouble = count_examples(site)
    training, rounds = config.training_of(site.name), config.federation.num_rounds
    if training.num_train_epochs is not None and examples:
        training = training.for_examples(examples)
    lines = AuditTrail(Path(site.state) / "audit").lines()
    counted = None if training.max_steps is None else training
    secret = config.privacy
    most = bound_masked(adapter, site, config) if secret.secure_aggregation else bound_payload(adapter, site)
    ranks = sorted(adapter.ranks.values())
    method, sends = describe_method(site, config)
    return Dossier(
        method=method,
        sends=sends,
        modules=dict(Counter(name.rpartition(".")[2] for name in adapter.ranks)),
        ranks=(ranks[0], ranks[-1]),
        values=count_values(adapter),
        participants=tuple(config.federation.participants or ()),
        rounds=rounds,
        steps=training.max_steps,
        epochs=config.training_of(site.name).num_train_epochs,
        batch=training.batch,
        drawn=count_drawn(counted) if counted else None,
        optimizer=training.optim,
        learning_rate=training.learning_rate,
        examples=examples,
        trouble=trouble,
        told=None if secret.secure_aggregation else site.policy.declared_examples or examples,
        least_cohort=secret.least_cohort if secret.secure_aggregation else 0,
        bytes_round=most,
        bytes_all=most * rounds,
        noise=weigh_noise(site, lines, job, rounds),
        protected=config.training.dp is not None,
        protection=describe_protection(site, config, examples, lines),
        server=read_server(file),
        objections=tuple(list_objections(site, config, adapter, examples, counted)),
    )


def describe_method(site: SiteConfig, config: Config) -> tuple[str, str]:
    """(name and source, what it sends). Another package's method is built only where the policy lets its code run."""
    name = config.method.name
    if is_foreign(name) and name not in (site.policy.methods or ()):
        return f"{name}, code of another package", "not known: its code may not run here"
    facts = build(name, config.method.settings).facts
    return f"{name}: {facts.paper}", facts.sends


def count_examples(site: SiteConfig) -> tuple[int | None, str]:
    """(examples that the site holds, ""), or (None, why they cannot be read)."""
    try:
        return len(load_examples(site.data, settings=site.reading())), ""
    except (FedloomError, OSError) as error:
        return None, str(error)


def count_values(adapter: Adapter) -> int:
    """Numbers in the two factors of every module."""
    return sum(placed.rank * sum(placed.shape) for placed in adapter.modules.values())


def bound_payload(adapter: Adapter, site: SiteConfig) -> int:
    """Bytes that no update of this adapter is over: all values in full, with names; or what the policy lets out."""
    names = sum(2 * (len(name.encode()) + NAME_BYTES) for name in adapter.ranks)
    most = HEAD_BYTES + names + math.ceil(VALUE_BYTES * count_values(adapter))
    policy = site.policy
    limits = [parse_bytes(limit) for limit in (policy.max_bytes_round, policy.max_bytes_day) if limit]
    return min([most, *limits])


def bound_masked(adapter: Adapter, site: SiteConfig, config: Config) -> int:
    """Bytes that no round of a secure sum is over: a vector under masks of all values, and the messages around it."""
    vector = math.ceil(config.privacy.bits * (count_values(adapter) + WEIGHT_VALUES) / 8)
    limits = [parse_bytes(limit) for limit in (site.policy.max_bytes_round, site.policy.max_bytes_day) if limit]
    return min([vector, *limits]) + SUM_BYTES * (1 + len(config.federation.participants or ()))


def weigh_noise(site: SiteConfig, lines: Sequence[Line], job: str, rounds: int) -> Noise | None:
    """What the job's noise costs beside all that has left; None without noise."""
    privacy = site.policy.privacy
    if privacy is None:
        return None
    spent, each = mu_squared(lines), privacy.mu**2
    left = max(rounds - sum(line.job == job and not line.payload for line in lines), 0)

    def worth(squared: float) -> float:
        return epsilon(math.sqrt(squared), privacy.delta)

    allowed = None
    if privacy.max_epsilon is not None and worth(spent + left * each) > privacy.max_epsilon:
        # ε grows with every round, so the rounds that fit are found by halving.
        low, high = 0, left
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if worth(spent + middle * each) > privacy.max_epsilon else (middle, high)
        allowed = low
    return Noise(
        sigma=privacy.noise_multiplier,
        clip_norm=privacy.clip_norm,
        delta=privacy.delta,
        job=worth(left * each),
        spent=worth(spent),
        together=worth(spent + left * each),
        most=privacy.max_epsilon,
        rounds=allowed,
    )


def describe_protection(site: SiteConfig, config: Config, examples: int | None, lines: Sequence[Line]) -> str:
    """What the job's noise on single examples costs beside all that was spent on them, in words."""
    training = config.training_of(site.name)
    if training.dp is None:
        return "off: what an update says of a single example has no bound but that of the site's own noise"
    if examples is None:
        return f"on (C = {training.dp.clip_norm:g}); how much follows from the examples, which cannot be read"
    delta, spent = delta_for(site.policy, examples), sampled_noise(lines)
    try:
        noise = plan_noise(training, examples, config.federation.num_rounds)
        assert noise is not None
        job = [replace(noise, steps=noise.steps * config.turns_of_client)]
        alone, before, together = (example_epsilon(one, delta) for one in (job, spent, [*job, *spent]))
    except ConfigError as error:
        return f"on (C = {training.dp.clip_norm:g}); {error}"
    how = f"σ = {noise.noise_multiplier:.3g}, C = {training.dp.clip_norm:g}, a step draws {noise.sampling_rate:.2%}"
    return (
        f"on ({how}): ε {alone:.3g} for this job from its beginning, {before:.3g} spent so far, {together:.3g} "
        f"together, at δ = {delta:.2g}"
    )


def list_objections(
    site: SiteConfig, config: Config, adapter: Adapter, examples: int | None, training: TrainingSettings | None
) -> Iterator[str]:
    """Everything that the site's policy has against a job, one key at a time. training: with its steps counted."""
    names = config.federation.participants or ()
    if site.name not in names:
        yield f"the run is for {', '.join(map(repr, names[:9])) or 'nobody by name'}; this site is {site.name!r}"
    seen: set[str] = set()
    for check in _questions(site, config, adapter, examples, training):
        try:
            check()
        except PolicyRefusal as refusal:
            found = re.search(r"policy\.([\w.]+)", str(refusal))
            key = found[1] if found else str(refusal)
            if key not in seen:
                yield str(refusal)
            seen.add(key)


def _questions(
    site: SiteConfig, config: Config, adapter: Adapter, examples: int | None, training: TrainingSettings | None
) -> Iterator[Callable[[], None]]:
    policy, rounds = site.policy, range(1, config.federation.num_rounds + 1)
    yield from setting_checks(policy, config, site.name, rounds)
    if training is not None:
        if config.training_of(site.name).num_train_epochs is not None:
            yield from step_checks(policy, config, training, rounds)
        if examples is not None:
            yield partial(check_examples, policy, examples, count_drawn(training))
    yield partial(check_modules, policy, adapter.ranks)
    yield partial(check_spending, policy, AuditTrail(Path(site.state) / "audit").count_spent("", 0))


def read_server(file: Path) -> str:
    """The server's address, of [node] in a SITE.toml or of the SuperNode's script beside it; "" where neither says."""
    try:
        node = tomllib.loads(file.read_text(encoding="utf-8")).get("node")
        if isinstance(node, dict) and "superlink" in node:
            return str(node["superlink"])
        found = re.search(r"--superlink[ =](\S+)", (file.parent / SUPERNODE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return found[1] if found else ""
