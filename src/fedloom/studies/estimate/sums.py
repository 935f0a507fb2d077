"""What a secure sum takes: each site's vector on the whole model, and the messages beside it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedloom.methods.method import State
from fedloom.rounds.job import Job
from fedloom.rounds.secure import count_values, pick, unchanged
from fedloom.secagg import count_talk
from fedloom.studies.estimate.sizes import Sample, occurrences


def size_vector(job: Job, state: State, round: int, chosen: Sample) -> float:
    """Bytes of a site's vector on the whole model, in a round that rests on `state`."""
    assert job.secure is not None
    sent = pick(job, state, unchanged(job, state, round), round)
    here = sum(tensor.numel() for tensor in sent.values())
    whole = sum(occurrences(name, chosen) * tensor.numel() for name, tensor in sent.items())
    weight = count_values(job, state, round) - here
    return -(-(whole + weight) * job.secure.grid.bits // 8)


def count_messages(sites: Collection[str]) -> int:
    """Bytes of all messages of these sites' sum beside their vectors, both ways."""
    return len(sites) * sum(count_talk(sites))


def add_messages(sent: Mapping[str, float], fetched: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes up and down of a round's clients with the messages of their sum. sent: of those whose vectors come."""
    up, down = count_talk(sent)
    return (
        {client: size + up for client, size in sent.items()},
        {**fetched, **{client: fetched.get(client, 0.0) + down for client in sent}},
    )
