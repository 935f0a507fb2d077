"""What a site allows, whatever the server asks for. The worker holds every job and every payload to it.

    check_method   first of all: a method may be code of another package
    check_settings before a model is loaded: method, modules, ranks, steps, batch, lengths, optimiser, learning rates
    check_epochs   once the examples are loaded: steps and learning rates, where the settings say epochs
    check_job      before anything is kept: the modules that there are, examples, what an update would rest on
    check_left     before training: bytes and ε that are left
    (`guard`       around training: its time, size of the change, noise, what the server learns beside the change)
    check_room     before writing: what the state folder takes
    check_update   before a payload leaves: what is in it, and its bytes
    told_to_server what the server may know of an error

A refusal names what the server already knows (method, modules, settings, bytes). Where the reason rests on the site's
data, the server is told no more than that there was one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from fedloom.errors import DataError, PolicyRefusal, SecureSumError, VersionError
from fedloom.lora.pair import PARTS, LoraState
from fedloom.methods.foreign import is_foreign
from fedloom.methods.forward import MOST_SEEDS
from fedloom.methods.method import CORE, SCALARS, State
from fedloom.model.training import rate_at
from fedloom.records.config import ClientSettings, Config, LoraSettings, TrainingSettings
from fedloom.records.quantities import parse_bytes
from fedloom.rounds.joint import split_entries
from fedloom.site.examples import check_protects
from fedloom.site.privacy import epsilon
from fedloom.site.rules import Policy, Spending
from fedloom.wire import Limits, decode_lazily

REFUSED = "refused by the site's policy"
"""All that the server learns of a reason that rests on the site's data."""


def check_settings(policy: Policy, config: Config, site: str, round: int) -> None:
    """Raises PolicyRefusal where the settings of a job ask for more than this site gives, in this round of it.

    What follows from num_train_epochs and the site's own examples is not known yet: see `check_epochs`.
    """
    for check in setting_checks(policy, config, site, [round]):
        check()


def setting_checks(policy: Policy, config: Config, site: str, rounds: Iterable[int]) -> Iterator[Callable[[], None]]:
    """What `check_settings` asks, one question at a time; each raises PolicyRefusal."""
    training = config.training_of(site)
    yield partial(_check_sums, policy, config)
    yield partial(check_method_allowed, policy, config.method.name)
    yield partial(check_protects, policy, config)
    if policy.optimizers is not None:
        yield partial(_check_choice, "training.optim", training.optim, "optimizers", policy.optimizers)
    yield partial(_check_targets, policy, config.lora_of(site))
    batch, length = training.per_device_train_batch_size, config.data.max_length
    for limit in (
        ("a rank", max(_ranks(config)), "max_rank", None, policy.max_rank),
        ("per_device_train_batch_size", batch, "max_batch", None, policy.max_batch),
        ("data.max_length", length, "min_length", policy.min_length, None),
        ("data.max_length", length, "max_length", None, policy.max_length),
    ):
        yield partial(_check_range, *limit)
    if training.num_train_epochs is None:
        yield from step_checks(policy, config, training, rounds)


def step_checks(
    policy: Policy, config: Config, training: TrainingSettings, rounds: Iterable[int]
) -> Iterator[Callable[[], None]]:
    """The questions about steps and learning rates; `training` is the site's own, with its steps counted."""
    least = policy.min_examples_update
    yield partial(_check_range, "training.max_steps", training.steps, "max_steps", None, policy.max_steps)
    for round in rounds:
        low, high = _rates(training, config.federation.num_rounds, round)
        yield partial(_check_range, "a learning rate", low, "min_learning_rate", policy.min_learning_rate, None)
        yield partial(_check_range, "a learning rate", high, "max_learning_rate", None, policy.max_learning_rate)
    drawn = count_drawn(training)
    yield partial(_check_range, "batch · accumulation · steps", drawn, "min_examples_update", least, None)


def check_epochs(policy: Policy, config: Config, site: str, steps: int, round: int) -> None:
    """`step_checks` where the `steps` follow from num_train_epochs and the site's examples, of which the server learns
    nothing: it is told no more than that there was a reason. Does nothing where the settings give the steps.
    """
    training = config.training_of(site)
    if training.num_train_epochs is None:
        return
    counted = training.model_copy(update={"max_steps": steps, "num_train_epochs": None})
    try:
        for check in step_checks(policy, config, counted, [round]):
            check()
    except PolicyRefusal as refusal:
        raise PolicyRefusal(f"num_train_epochs = {training.num_train_epochs:g} here: {refusal}") from None


def check_job(policy: Policy, method: str, modules: Iterable[str], examples: int, draws: int) -> None:
    """Raises PolicyRefusal unless this job may be kept here.

    modules: names of all modules that the job would adapt; examples: how many the site holds for it; draws: how many
    the training of a round draws, the same one again only once it has seen all.
    """
    check_method_allowed(policy, method)
    check_modules(policy, modules)
    check_examples(policy, examples, draws)


def check_examples(policy: Policy, examples: int, draws: int) -> None:
    """Raises PolicyRefusal unless so many examples are enough, of which a round draws so many."""
    if examples < policy.min_examples:
        raise PolicyRefusal(f"{examples} training examples; policy.min_examples is {policy.min_examples}")
    if min(examples, draws) < policy.min_examples_update:
        raise PolicyRefusal(
            f"an update would rest on {min(examples, draws)} examples; policy.min_examples_update is "
            f"{policy.min_examples_update}"
        )


def check_spending(policy: Policy, spent: Spending) -> None:
    """Raises PolicyRefusal unless a further update may leave."""
    check_bytes(policy, 1, spent)
    privacy = policy.privacy
    if privacy and privacy.max_epsilon is not None:
        after = epsilon(math.sqrt(spent.mu_squared + privacy.mu**2), privacy.delta)
        if after > privacy.max_epsilon:
            raise PolicyRefusal(
                f"another round would bring ε to {after:.3g} at δ = {privacy.delta:g}; policy.privacy.max_epsilon is "
                f"{privacy.max_epsilon:g}",
                f"{REFUSED}: its privacy budget is used up",
            )


def check_method_allowed(policy: Policy, method: str) -> None:
    """Raises PolicyRefusal unless this method may run here. Ask before it is built: that may import its code."""
    if method in (policy.methods or ()) or (policy.methods is None and not is_foreign(method)):
        return
    allowed = "policy.methods allows " + ", ".join(policy.methods) if policy.methods else "it must be in policy.methods"
    raise PolicyRefusal(
        f"method {method!r}; {allowed}", f"refused by the site's policy: method {method!r} is not allowed"
    )


def check_room(policy: Policy, folder: Path, more: int) -> None:
    """Raises PolicyRefusal unless so many more bytes may be written to the state folder, and can be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if more > free:
        raise PolicyRefusal(
            f"the disk of {folder} has {free:,} bytes free and {more:,} are needed: make room",
            "the site's disk has no room for its state",
        )
    if policy.max_disk is None:
        return
    taken = sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
    if taken + more > parse_bytes(policy.max_disk):
        raise PolicyRefusal(
            f"{folder} takes {taken:,} bytes and {more:,} more are needed; policy.max_disk is {policy.max_disk}: "
            "remove jobs that are over, or move payloads of the audit record away",
            f"{REFUSED}: max_disk is used up",
        )


def count_drawn(training: TrainingSettings) -> int:
    """The number of examples that training draws in a round."""
    return training.batch * training.steps


def check_may_leave(
    policy: Policy, payload: bytes, before: LoraState, spent: Spending, parts: Sequence[str] = PARTS
) -> None:
    """Raises PolicyRefusal unless this payload may leave: an update of allowed modules, within the bytes allowed.

    before: the adapter that training began with; nothing may leave that is not one of its `parts` (`Method.parts`):
    its factors, or its rows of the matrix between two that rest.
    """
    check_bytes(policy, len(payload), spent)
    limits = Limits(max_values=4 * before.numel() + (MOST_SEEDS if SCALARS in parts else 0))
    message = decode_lazily(payload, limits)  # one tensor at a time, as far as can be
    if message.header.kind != "update":
        raise PolicyRefusal(f"a payload of kind {message.header.kind!r} was about to leave; only updates may")
    entries = split_entries(message.entries, State(before), message.header.base_digest)
    for name, entry in entries.items():
        module, _, part = name.rpartition("/")
        if module not in before or part not in parts:
            raise PolicyRefusal(f"the update holds {name}, which is not a factor of the adapter that is trained")
        if part == SCALARS:  # what leaves is no more than the bytes allow, and noise at the site is refused (`guard`)
            continue
        pair = before[module]
        # Of the matrix a site of rank q sends q rows, as long as the server's rank: no more than it has of A.
        most = max(pair.rank**2, pair.A.numel()) if part == CORE else pair.part(part).numel()
        if math.prod(entry.shape) > most or (part == CORE and entry.shape[:1] != (pair.rank,)):
            raise PolicyRefusal(f"the update's {name} has shape {entry.shape}, more than the adapter's own factor")
    check_method_allowed(policy, message.header.method)
    check_modules(policy, {name.rpartition("/")[0] for name in entries})


def text_for_server(policy: Policy, error: Exception, reference: str) -> str:
    """The text of an error that the server may see. `reference` finds the full error in the site's own log."""
    if isinstance(error, PolicyRefusal):
        return f"{error.public} (reference {reference})"
    if isinstance(error, VersionError | SecureSumError):  # of what the server itself has sent
        return f"{error} (reference {reference})"
    if policy.scrub_errors:
        # How long prompts are, say, must not be read from whether it was an error or a rule that the data met.
        if isinstance(error, DataError):
            return f"{REFUSED} (reference {reference})"
        return f"the site could not take its turn: {type(error).__name__} (reference {reference})"
    return f"{type(error).__name__}: {error} (reference {reference})"


def _check_sums(policy: Policy, config: Config) -> None:
    """Raises PolicyRefusal where the server would see single updates, or sums of fewer sites than this one wants."""
    asked, least = config.privacy, policy.least_cohort
    if policy.secure_aggregation == "required" and not asked.secure_aggregation:
        raise PolicyRefusal(
            "the job has no secure aggregation, the server would see this site's update; policy.secure_aggregation is "
            "'required'",
            f"{REFUSED}: it requires privacy.secure_aggregation",
        )
    if asked.secure_aggregation and least is not None and asked.least_cohort < least:
        raise PolicyRefusal(
            f"privacy.least_cohort is {asked.least_cohort}; policy.least_cohort is {least}",
            f"{REFUSED}: least_cohort does not allow privacy.least_cohort of {asked.least_cohort}",
        )


def _check_choice(what: str, value: str, key: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise PolicyRefusal(
            f"{what} {value!r}; policy.{key} allows {', '.join(allowed)}", f"{REFUSED}: {what} {value!r} is not allowed"
        )


def _check_targets(policy: Policy, lora: LoraSettings) -> None:
    """Refuse, before a model is loaded, a target that no pattern for last parts of names allows."""
    if policy.modules is None or isinstance(lora.target_modules, str):
        return
    if not any(set(pattern) & set(".*?[") for pattern in policy.modules):
        check_modules(
            policy, (*lora.target_modules, *(name.removesuffix(".weight") for name in lora.target_parameters))
        )


def _ranks(config: Config) -> Iterator[int]:
    """All ranks in the settings: a site holds the server's adapter, whose ranks are the largest of all sites."""
    tables: list[LoraSettings | ClientSettings] = [config.lora, *config.clients.values()]
    for table in tables:
        yield table.r or 1
        yield from (table.rank_pattern or {}).values()


def _check_range(asked: str, value: float, key: str, least: float | None, most: float | None) -> None:
    """Raises PolicyRefusal where what is asked has a value outside the limits of a key."""
    if (least is not None and value < least) or (most is not None and value > most):
        limit = least if most is None else most
        raise PolicyRefusal(
            f"{asked} is {value:g}; policy.{key} is {limit:g}",
            f"{REFUSED}: {key} does not allow {asked} of {value:g}",
        )


def _rates(training: TrainingSettings, rounds: int, round: int) -> tuple[float, float]:
    """The least and the largest learning rate of a round: of its first step and its last; others lie between."""
    place = min(max(round, 1), rounds)
    first, last = (rate_at(training, place, rounds, step) for step in (0, training.steps - 1))
    return min(first, last), max(first, last)


def check_modules(policy: Policy, modules: Iterable[str]) -> None:
    """Raises PolicyRefusal for the first module that may not be trained."""
    for module in sorted(modules):
        if policy.modules is not None and not any(_matches(module, pattern) for pattern in policy.modules):
            raise PolicyRefusal(
                f"module {module}; policy.modules allows {', '.join(policy.modules)}",
                f"{REFUSED}: module {module} is not allowed",
            )


def _matches(module: str, pattern: str) -> bool:
    """Whether a pattern is for this module: its whole name, its last part, or a shell pattern of either.

    One matrix of a parameter, experts.down_proj.3, is of the parameter's name too.
    """
    whole, _, number = module.rpartition(".")
    names = [module, whole] if number.isdigit() else [module]
    return any(fnmatchcase(part, pattern) for name in names for part in (name, name.rpartition(".")[2]))


def check_bytes(policy: Policy, size: int, spent: Spending) -> None:
    """Raises PolicyRefusal unless so many more bytes may leave."""
    for key, limit, used in (
        ("max_bytes_round", policy.max_bytes_round, spent.bytes_round),
        ("max_bytes_day", policy.max_bytes_day, spent.bytes_day),
    ):
        if limit is not None and used + size > parse_bytes(limit):
            raise PolicyRefusal(
                f"{used} bytes have left and {size} more would; policy.{key} is {limit}",
                f"{REFUSED}: {key} is used up",
            )
