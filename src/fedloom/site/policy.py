"""What a site allows, whatever the server asks for. The worker holds every job and every payload to it.

    check_method   before a job is loaded: a method may be code of another package
    check_job      before training: method, modules, examples, bytes and ε that are left
    guarded        around training: size of the change, noise, what the server learns beside the change
    check_update   before a payload leaves: what is in it, and its bytes
    told_to_server what the server may know of an error

A refusal names what the server already knows (method, modules, bytes). Where the reason rests on the site's data, the
server is told no more than that there was one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedloom.config import Bytes, Section, parse_bytes
from fedloom.errors import PolicyRefusal
from fedloom.lora import PARTS, LoraState, from_tensors
from fedloom.method import State
from fedloom.methods.foreign import is_foreign
from fedloom.rounds import Train, Trained
from fedloom.site.privacy import Privacy, epsilon, norm, released
from fedloom.wire import Limits, decode

Names = Annotated[tuple[str, ...], Field(strict=False, min_length=1)]


class Policy(Section):
    """The table [policy] of SITE.toml. What is left out is not limited, except that error texts are withheld."""

    methods: Names | None = Field(
        None,
        description="Methods that may run here; without a list, fedloom's own. One of another package runs only where "
        'its name, "package.module:builder", is in the list: the site then imports that module.',
        examples=[["fedsrd", "fedit"]],
    )
    modules: Names | None = Field(
        None,
        description="Modules that may be trained: names, their last parts, or patterns such as *.self_attn.*.",
        examples=[["q_proj", "v_proj"]],
    )
    min_examples: int = Field(1, ge=1, description="Training examples that the site must hold to take part.")
    declared_examples: int | None = Field(
        None, ge=1, description="Number of examples told to the server in place of the true one.", examples=[1000]
    )
    max_bytes_round: Bytes | None = Field(None, description="Bytes that may leave in one round.", examples=["8MiB"])
    max_bytes_day: Bytes | None = Field(None, description="Bytes that may leave in 24 hours.", examples=["500MiB"])
    max_update_norm: float | None = Field(
        None, gt=0, description="Largest norm of a round's change of all factors together.", examples=[10.0]
    )
    scrub_errors: bool = Field(True, description="Keep the text of errors from the server.")
    privacy: Privacy | None = Field(None, description="Noise on every update.")


@dataclass(frozen=True, slots=True)
class Spent:
    """What has left the site: bytes in this round of this job, bytes in the last 24 hours, and μ² of all noise so far.

    `audit.AuditTrail.spent` works it out.
    """

    bytes_round: int = 0
    bytes_day: int = 0
    mu_squared: float = 0.0


def check_job(policy: Policy, method: str, modules: Iterable[str], examples: int, spent: Spent) -> None:
    """Raises PolicyRefusal unless a round of this job may be trained here.

    modules: names of all modules that the job would adapt; examples: how many the site holds for it.
    """
    _check_names(policy, method, modules)
    if examples < policy.min_examples:
        raise PolicyRefusal(f"{examples} training examples; policy.min_examples is {policy.min_examples}")
    _check_bytes(policy, 1, spent)
    privacy = policy.privacy
    if privacy and privacy.max_epsilon is not None:
        after = epsilon(math.sqrt(spent.mu_squared + privacy.mu**2), privacy.delta)
        if after > privacy.max_epsilon:
            raise PolicyRefusal(
                f"another round would bring ε to {after:.3g} at δ = {privacy.delta:g}; policy.privacy.max_epsilon is "
                f"{privacy.max_epsilon:g}",
                "refused by the site's policy: its privacy budget is used up",
            )


def check_method(policy: Policy, method: str) -> None:
    """Raises PolicyRefusal unless this method may run here. Ask before it is built: that may import its code."""
    if method in (policy.methods or ()) or (policy.methods is None and not is_foreign(method)):
        return
    allowed = "policy.methods allows " + ", ".join(policy.methods) if policy.methods else "it must be in policy.methods"
    raise PolicyRefusal(
        f"method {method!r}; {allowed}", f"refused by the site's policy: method {method!r} is not allowed"
    )


def check_update(policy: Policy, payload: bytes, before: LoraState, spent: Spent) -> None:
    """Raises PolicyRefusal unless this payload may leave: an update of allowed modules, within the bytes allowed.

    before: the adapter that training began with; nothing may leave that is not one of its factors.
    """
    _check_bytes(policy, len(payload), spent)
    message = decode(payload, Limits(max_values=4 * before.numel()))
    if message.header.kind != "update":
        raise PolicyRefusal(f"a payload of kind {message.header.kind!r} was about to leave; only updates may")
    for name, entry in message.entries.items():
        module, _, part = name.rpartition("/")
        if module not in before or part not in PARTS:
            raise PolicyRefusal(f"the update holds {name}, which is no factor of the adapter")
        if math.prod(entry.shape) > before[module].part(part).numel():
            raise PolicyRefusal(f"the update's {name} has shape {entry.shape}, more than the adapter's own factor")
    _check_names(policy, message.header.method, {name.rpartition("/")[0] for name in message.entries})


def guarded(policy: Policy, train: Train, parts: Callable[[int], Sequence[str]]) -> Train:
    """The training step as the policy lets its outcome be used; give this one to `rounds.client_turn`.

    parts: the factors that a round trains (`Method.trainable`). Without noise a change beyond max_update_norm raises
    PolicyRefusal. With noise the change is clipped instead, and the loss, which the noise does not cover, withheld.
    """

    def step(state: State, round: int, seed: int) -> Trained:
        trained = train(state, round, seed)
        before, after = state.adapter.tensors(), trained.adapter.tensors()
        names = [name for name in before if name.rpartition("/")[2] in parts(round)]
        change = {name: after[name].detach().cpu() - before[name] for name in names}
        if policy.privacy is None:
            _check_norm(policy, change)
        else:
            noisy = released(change, policy.privacy)
            adapter = from_tensors(before | {name: before[name] + noisy[name] for name in names})
            trained = replace(trained, adapter=adapter, loss=math.nan)
        return replace(trained, num_examples=policy.declared_examples or trained.num_examples)

    return step


def told_to_server(policy: Policy, error: Exception, reference: str) -> str:
    """What the server may know of an error. `reference` finds the whole of it in the site's own log."""
    if isinstance(error, PolicyRefusal):
        return f"{error.public} (reference {reference})"
    if policy.scrub_errors:
        return f"the site could not take its turn: {type(error).__name__} (reference {reference})"
    return f"{type(error).__name__}: {error} (reference {reference})"


def _check_names(policy: Policy, method: str, modules: Iterable[str]) -> None:
    check_method(policy, method)
    for module in sorted(modules):
        if policy.modules is not None and not any(_matches(module, pattern) for pattern in policy.modules):
            raise PolicyRefusal(
                f"module {module}; policy.modules allows {', '.join(policy.modules)}",
                f"refused by the site's policy: module {module} is not allowed",
            )


def _matches(module: str, pattern: str) -> bool:
    """Whether a pattern is for this module: its whole name, its last part, or a shell pattern of either."""
    return fnmatchcase(module, pattern) or fnmatchcase(module.rpartition(".")[2], pattern)


def _check_bytes(policy: Policy, size: int, spent: Spent) -> None:
    for key, limit, used in (
        ("max_bytes_round", policy.max_bytes_round, spent.bytes_round),
        ("max_bytes_day", policy.max_bytes_day, spent.bytes_day),
    ):
        if limit is not None and used + size > parse_bytes(limit):
            raise PolicyRefusal(
                f"{used} bytes have left and {size} more would; policy.{key} is {limit}",
                f"refused by the site's policy: {key} is used up",
            )


def _check_norm(policy: Policy, change: Mapping[str, Tensor]) -> None:
    if policy.max_update_norm is None:
        return
    size = norm(change)
    if not size <= policy.max_update_norm:
        raise PolicyRefusal(f"the change has norm {size:.4g}; policy.max_update_norm is {policy.max_update_norm:g}")
