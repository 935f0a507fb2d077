"""What all sites of a secure sum agree on by signing it."""

from __future__ import annotations

import hashlib

from fedloom.lora.pair import digest
from fedloom.methods.method import State


def name_sum(job: str, settings: str, state: State) -> str:
    """What a sum rests on, as every site signs it: run, settings, and the very bits that training began with.

    A server that had some sites train from another adapter or by other settings could have nothing but one site's
    change be left in the sum (Pasquini et al., CCS 2022). Sites that are told different things sign different sums.
    """
    held = hashlib.sha256(settings.encode(errors="surrogatepass")).hexdigest()
    return " ".join((job, held, digest(state.adapter), digest(state.frozen)))
