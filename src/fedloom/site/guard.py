"""Training under a site's rules: how long it takes, how large its change is, noise on it, what is told of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fedloom.errors import PolicyRefusal
from fedloom.lora.pair import from_tensors
from fedloom.methods.method import State
from fedloom.rounds.step import Train, Trained
from fedloom.site.policy import REFUSED
from fedloom.site.privacy import release_change, total_norm
from fedloom.site.rules import Policy


def limit_time(policy: Policy) -> Callable[[], None]:
    """Start the clock. Call the result before every forward pass: it raises PolicyRefusal once the time is over."""
    until = math.inf if policy.max_seconds_round is None else time.monotonic() + policy.max_seconds_round

    def check() -> None:
        if time.monotonic() > until:
            raise PolicyRefusal(
                f"the training takes longer than policy.max_seconds_round = {policy.max_seconds_round:g}",
                f"{REFUSED}: max_seconds_round is over",
            )

    return check


def guard_training(
    policy: Policy, train: Train, parts: Callable[[int], Sequence[str]], charge: Callable[[], object]
) -> Train:
    """The training step as the policy lets its outcome be used; give this one to `rounds.client_turn`.

    parts: the factors that a round trains (`Method.trainable`). Without noise a change beyond max_update_norm raises
    PolicyRefusal. With noise the change is clipped instead, and the loss, which the noise does not cover, withheld.
    charge() is called before noise is drawn: a draw that nobody has recorded could be released without being counted.
    """

    def step(state: State, round: int, seed: int) -> Trained:
        trained = train(state, round, seed)
        if policy.privacy and trained.moved.numel():
            raise PolicyRefusal(
                "the method sends scalars of a training by forward passes, which the noise of [privacy] on the adapter "
                "does not cover: leave the method out of policy.methods, or the noise",
                f"{REFUSED}: noise does not go with this method",
            )
        before, after = state.adapter.tensors(), trained.adapter.tensors()
        # A site may train some of the modules only: what it did not train is not in `after`, and nothing of it leaves.
        names = [name for name in after if name.rpartition("/")[2] in parts(round)]
        change = {
            name: after[name].detach().cpu() - before[name]
            for name in (names if policy.privacy or policy.max_update_norm is not None else ())
        }
        if policy.privacy is None:
            _check_norm(policy, change)
        else:
            charge()
            noisy = release_change(change, policy.privacy)
            untouched = {name: before[name] for name in after}
            adapter = from_tensors(untouched | {name: before[name] + noisy[name] for name in names})
            trained = replace(trained, adapter=adapter, loss=math.nan)
        return replace(trained, num_examples=policy.declared_examples or trained.num_examples)

    return step


def _check_norm(policy: Policy, change: Mapping[str, Tensor]) -> None:
    if policy.max_update_norm is None:
        return
    size = total_norm(change)
    if not size <= policy.max_update_norm:
        raise PolicyRefusal(f"the change has norm {size:.4g}; policy.max_update_norm is {policy.max_update_norm:g}")
