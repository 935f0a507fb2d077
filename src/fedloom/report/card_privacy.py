"""What a model card says of privacy: every ε with what it protects and who vouches for it, or that there is none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedloom.records.config import Config


def describe_privacy(config: Config) -> str:
    """The section on privacy, from the settings of a run: what the sites do beside them is their own, and not known."""
    said = [
        *(
            _examples(config)
            or ["- **No differential privacy is claimed.** The run asked for no noise: there is no ε."]
        ),
        *(_sums(config) or ["- **Each update was seen.** The server had the update of every site by itself."]),
        "- A site may have added noise of its own by its policy. Its own record says what that is worth. The "
        "server is not told; so nothing is claimed from it here.",
    ]
    return "## Privacy\n\n" + "\n".join(said) + "\n"


def _examples(config: Config) -> list[str]:
    """DP-SGD: [training.dp]."""
    dp = _table(config, "training").get("dp")
    if not dp:
        return []
    delta = f"δ = {dp['delta']:g}" if dp.get("delta") else "δ = 1 over the number of a site's examples"
    amount = (
        f"ε = {dp['epsilon']:g} at {delta}, for all rounds together"
        if dp.get("epsilon")
        else f"noise of {dp['noise_multiplier']:g} times the clipping norm in every step; ε at {delta} follows from a "
        "site's number of examples and steps, and stands in its own record"
    )
    return [
        f"- **Differential privacy of single examples** (DP-SGD, add or remove one example of a site): {amount}. It "
        "covers one example, not all examples of a person or of a site. Each site adds the noise itself and "
        "vouches for it."
    ]


def _sums(config: Config) -> list[str]:
    """[privacy]: secure aggregation."""
    privacy = _table(config, "privacy")
    if not privacy.get("secure_aggregation"):
        return []
    return [
        "- **Secure aggregation.** The server learnt sums of the sites' updates, and no single one. That is no "
        "differential privacy: what a sum and the adapter say of the data is not bounded by it."
    ]


def _table(config: Config, name: str) -> Mapping[str, Any]:
    """A table of the settings; empty where this run's settings have none of the name."""
    found: Mapping[str, Any] = config.model_dump().get(name, {})
    return found
