"""What may change in a run that goes on: nothing that its outcome rests on, but for the number of its rounds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fedloom.records.config import Config

ROUNDS = "federation.num_rounds"
FREE: Mapping[str, bool] = dict.fromkeys(("flower", "output", "evaluation"), True)
"""Tables that may change at any time, since the outcome does not rest on them."""
FREE_FEDERATION = {"eval_every"}
"""Keys of [federation] that may."""
SHOWN = 4
"""Settings that a message names; who has changed more has another run in mind."""


def dump_fixed(config: Config) -> str:
    """The settings that a run is held to as long as it lasts, as one text: without the free ones and num_rounds."""
    without: dict[str, bool | set[str]] = {**FREE, "federation": {*FREE_FEDERATION, "num_rounds"}}
    return json.dumps(config.model_dump(mode="json", exclude_none=True, exclude=without), sort_keys=True)


def find_differences(held: Config, given: Config) -> dict[str, tuple[object, object]]:
    """Dotted key → (value in the run, value given) of all settings that differ and that the outcome rests on.

    A run that is judged on its validation split ends by its evaluations: how often they come is held there.
    """
    judged = held.federation.validates or given.federation.validates
    without: dict[str, bool | set[str]] = {**FREE, "federation": set() if judged else FREE_FEDERATION}
    before, now = (dict(_flatten(config.model_dump(exclude=without))) for config in (held, given))
    keys = dict.fromkeys([*before, *now])
    return {key: (before.get(key), now.get(key)) for key in keys if before.get(key) != now.get(key)}


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
