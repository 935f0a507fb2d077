"""What a site asks for its single examples: noise in a job's training, and an ε that all jobs together keep to."""

from __future__ import annotations

from fedloom.errors import PolicyRefusal
from fedloom.model.private import PrivateRound
from fedloom.noise.accounting import SampledNoise, example_epsilon
from fedloom.records.config import Config
from fedloom.site.audit import AuditTrail
from fedloom.site.rules import Policy, Spending

USED_UP = "refused by the site's policy: its privacy budget for examples is used up"


def check_protects(policy: Policy, config: Config) -> None:
    """Raises PolicyRefusal where single examples must be protected and the job's training does not."""
    if policy.example_privacy is not None and config.training.dp is None:
        raise PolicyRefusal(
            "the job has no training.dp; policy.example_privacy lets only training run that protects single examples",
            "refused by the site's policy: training.dp is not set",
        )


def check_budget(policy: Policy, spent: Spending, noise: SampledNoise | None, examples: int) -> None:
    """Raises PolicyRefusal where one more round of this noise would pass the ε that the policy allows."""
    limit = policy.example_privacy
    if limit is None or limit.max_epsilon is None or noise is None:
        return
    delta = delta_for(policy, examples)
    after = example_epsilon([*spent.sampled, noise], delta)
    if after > limit.max_epsilon:
        raise PolicyRefusal(
            f"another round would bring ε at example level to {after:.3g} at δ = {delta:.2g}; "
            f"policy.example_privacy.max_epsilon is {limit.max_epsilon:g}",
            USED_UP,
        )


def charge_examples(
    trail: AuditTrail, policy: Policy, job: str, round: int, private: PrivateRound, examples: int, turns: int
) -> str:
    """Have it on record that noise on so many examples is about to be drawn; the digest of the line.

    turns: in how many rounds of the job the site trains at most, which its noise is made for.

    A draw that was charged for already, and with which nothing has left, costs nothing more. Raises PolicyRefusal where
    the policy's ε for single examples leaves no further round, or the job's own.
    """
    check_turns(trail, job, round, turns)
    mu = policy.privacy.mu if policy.privacy else None
    line = trail.find_charge(job, round, private.noise, private.draw, mu)
    if line is None:
        check_budget(policy, trail.count_spent(job, round), private.noise, examples)
        delta = delta_for(policy, examples)
        line = trail.charge_examples(job, round, private.noise, private.draw, delta, mu)
    return line.digest


def check_turns(trail: AuditTrail, job: str, round: int, turns: int) -> None:
    """Raises PolicyRefusal where the site has trained in as many rounds of a job as its noise is made for."""
    others = {line.round for line in trail.lines() if line.job == job and line.sampled} - {round}
    if len(others) >= turns:
        raise PolicyRefusal(
            f"this site has trained in {len(others)} rounds of job {job}, and its noise is made for {turns} "
            "(training.dp.rounds, federation.num_rounds)",
            "refused: the job's noise on examples is made for fewer rounds of this site",
        )


def delta_for(policy: Policy, examples: int) -> float:
    """The δ at which this site states ε for single examples, of which it has so many."""
    own = policy.example_privacy.delta if policy.example_privacy else None
    return min(1.0 / examples, 0.5) if own is None else own
