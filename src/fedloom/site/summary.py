"""A site's record summed up in words: what left, under which noise, and what that is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedloom.errors import ConfigError
from fedloom.noise.accounting import FALSE_ALARMS, example_epsilon, example_risk
from fedloom.site.audit import FIRST, Line, mu_squared, sampled_noise
from fedloom.site.privacy import epsilon

DELTAS = (1e-5, 1e-6, 1e-9)
"""Where ε of a site's own noise is stated."""


def summarise_record(lines: Sequence[Line], moved: Sequence[Line], unlisted: Sequence[str] = ()) -> list[str]:
    """A verified record, summed up in words."""
    said = [f"{len(lines)} lines, unbroken; newest digest {lines[-1].digest if lines else FIRST} (note it elsewhere)"]
    if unlisted:
        said.append(
            f"{len(unlisted)} payloads have no line, {unlisted[0]} for one: they could not be recorded and did not "
            "leave, or their lines were cut off"
        )
    if moved:
        said.append(f"{len(moved)} payloads are no longer in the folder: their bytes were not checked")
    protected = {line.digest for line in lines if line.sampled is not None}
    mu = math.sqrt(mu_squared(lines))
    bare = sum(
        bool(line.payload) and line.mu is None and line.charge not in protected and not line.summed for line in lines
    )
    if mu:
        values = ", ".join(f"{epsilon(mu, delta):.3g} at δ = {delta:g}" for delta in DELTAS)
        said.append(f"noise at site level: μ = {mu:.4g} over all rounds and jobs together; ε = {values}")
    if protected:
        said.append(describe_examples_spent(lines))
    if costs := {line.payload: line.summed for line in lines if line.payload and line.summed}:
        said.append(
            f"noise in secure sums at site level: ρ = {math.fsum(costs.values()):.3g} of concentrated privacy over all "
            "of them together, if the other sites add their shares"
        )
    if bare:
        said.append(f"{bare} payloads left without noise: no ε can be claimed for what they were trained on")
    return said


def describe_examples_spent(lines: Sequence[Line]) -> str:
    """What was spent on single examples, in words: ε at the least δ of the jobs, and an attacker's best chances."""
    spent, delta = sampled_noise(lines), min(line.delta for line in lines if line.delta is not None)
    steps = sum(one.steps for one in spent)
    try:
        worth, risk = example_epsilon(spent, delta), example_risk(spent)
    except ConfigError as error:  # the record can be read where the library that counts is not installed
        return f"noise at example level: {steps:,} steps over all jobs; {error}"
    return (
        f"noise at example level: {steps:,} steps over all jobs together; ε = {worth:.3g} at δ = {delta:.2g}; whoever "
        f"asks whether an example was there is right at most {risk.hits:.1%} of the time when he may be wrong "
        f"{FALSE_ALARMS:.0%} of it (advantage {risk.advantage:.2f})"
    )
