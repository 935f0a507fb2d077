"""Whether a run may go into a folder, and what may change in one that goes on: nothing that its outcome rests on, but
for the number of its rounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import CheckpointError, ConfigError
from fedloom.records.config import Config
from fedloom.records.ledger import Choice
from fedloom.workspace.occupied import Occupant, find_occupant

ROUNDS = "federation.num_rounds"
FREE: Mapping[str, bool] = dict.fromkeys(("local", "flower", "output", "evaluation"), True)
"""Tables that may change at any time, since the outcome does not rest on them."""
FREE_FEDERATION = {"eval_every"}
"""Keys of [federation] that may."""
BUFFERED = {"mode", "buffer_size", "staleness_exponent", "max_staleness", "pace"}
"""Keys of [federation] that asynchronous rounds rest on."""
ROBUST = {"max_examples", "robust", "num_malicious_clients", "clip_ratio", "public", "public_tolerance"}
"""Keys of [federation] that bound what a liar can do. They came later: at their defaults they mean nothing."""
SHOWN = 4
"""Settings that a message names; who has changed more has another run in mind."""


def check_way(
    path: Path, config: Config, *, resume: bool = False, force: bool = False, extend: bool = True
) -> Occupant | None:
    """The run that lies in a folder, if any, where another or the same may go into it.

    extend: whether the number of rounds may change. Raises CheckpointError where the folder holds something else, a run
    that has learnt something and is neither to go on nor to be replaced, or nothing to resume.
    """
    if resume and force:
        raise ConfigError("--resume goes on with a run, --force replaces it: give one of the two")
    held = find_occupant(path)
    if resume and held is None:
        raise CheckpointError(f"{path} holds no run to resume; run without --resume")
    if resume and held:
        check_resumable(held, config, extend)
    elif held and held.rounds and not force:
        raise CheckpointError(
            f"{path} holds another run ({held.describe()}): add --resume to go on with it, --force to replace it, or "
            "choose another --out"
        )
    return held


def dump_fixed(config: Config) -> str:
    """The settings that a run is held to as long as it lasts, as one text: without the free ones and num_rounds."""
    # Where rounds are synchronous, runs of before there were others go on as well.
    unused = BUFFERED if config.federation.mode == "synchronous" else set()
    without: dict[str, bool | set[str]] = {**FREE, "federation": {*FREE_FEDERATION, "num_rounds", *unused, *ROBUST}}
    fixed = config.model_dump(mode="json", exclude_none=True, exclude={**without, "privacy": True})
    # A table that came later: at its defaults it means what its absence meant.
    private = config.privacy.model_dump(mode="json", exclude_defaults=True)
    # So are the keys of one that was there.
    robust = config.federation.model_dump(mode="json", exclude_defaults=True, include=ROBUST)
    later = {"privacy": private, "robust": robust}
    return json.dumps({**fixed, **{name: held for name, held in later.items() if held}}, sort_keys=True)


def find_differences(held: Config, given: Config) -> dict[str, tuple[object, object]]:
    """Dotted key → (value in the run, value given) of all settings that differ and that the outcome rests on.

    A run that is judged on its validation split ends by its evaluations: how often they come is held there.
    """
    judged = held.federation.validates or given.federation.validates
    without: dict[str, bool | set[str]] = {**FREE, "federation": set() if judged else FREE_FEDERATION}
    before, now = (dict(_flatten(config.model_dump(exclude=without))) for config in (held, given))
    keys = dict.fromkeys([*before, *now])
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


def check_resumable(held: Occupant, config: Config, extend: bool) -> None:
    """Raises CheckpointError, which names the settings that differ, where a run does not go on with these."""
    settings = held.path / "config.toml"
    if held.settings is None:
        raise CheckpointError(f"{settings} is missing or not of this version of fedloom: the run cannot be resumed")
    found = find_differences(held.settings, config)
    rounds = config.federation.num_rounds
    if found.keys() == {ROUNDS} and extend:
        chosen = next((row for row in held.rows if isinstance(row, Choice)), None)
        if chosen:
            raise CheckpointError(
                f"the run in {held.path} ended after round {chosen.round} by its validation split and takes no more "
                f"rounds: begin another with model.adapter = {str(held.path / 'adapter')!r}"
            )
        dp, more = config.training.dp, config.turns_of_client != held.settings.turns_of_client
        if dp is not None and dp.epsilon is not None and more:
            raise CheckpointError(
                f"the noise in {held.path} was made for {held.settings.turns_of_client} rounds, and more of them "
                "would pass training.dp.epsilon: begin another run with "
                f"model.adapter = {str(held.path / 'adapter')!r}, whose ε comes on top"
            )
        if rounds < held.rounds:
            raise CheckpointError(f"{ROUNDS} is {rounds}, but {held.rounds} rounds of the run in {held.path} are over")
    elif found:
        other = "replace it with --force" if held.rounds else "begin anew without --resume (nothing is learnt yet)"
        raise CheckpointError(
            f"{settings} differs from the settings given: {name_differences(found)}. Resume with the settings of that "
            f"run, {other}, or choose another --out"
        )


def name_differences(found: Mapping[str, tuple[object, object]]) -> str:
    """The differences in words: "training.learning_rate was 0.001 and is 0.01", the first few of many."""
    named = [f"{key} was {_shown(old)} and is {_shown(new)}" for key, (old, new) in list(found.items())[:SHOWN]]
    more = len(found) - len(named)
    return "; ".join([*named, f"and {more} more"] if more else named)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: object) -> str:
    """A value as it is written in a settings file, or its beginning."""
    text = "unset" if value in (None, {}) else str(value)
    return text if len(text) <= 60 else f"{text[:60]} …"
