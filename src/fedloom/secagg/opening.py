"""Secrets from the shares that sites opened, where some of the shares may be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations, islice

from fedloom.errors import SecureSumError
from fedloom.secagg.session import Session
from fedloom.secagg.shamir import SHARE_BYTES, interpolate, join, weights

_TRIES = 4000
"""Choices of shares that are tried for one secret: two liars of twenty sites are found within them."""


class Opening:
    """Joins shares of one session. liars: the sites whose shares were found wrong; no later secret counts on them."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.liars: set[int] = set()
        self._weights: dict[tuple[int, ...], list[int]] = {}

    def secret(self, owner: int, shares: Mapping[int, bytes], is_right: Callable[[bytes], bool]) -> bytes:
        """The secret of a site from helper → share, as `is_right` confirms it.

        Raises SecureSumError where no choice of shares gives it: its owner or too many of the helpers lie.
        """
        for chosen in islice(self._choices(shares), _TRIES):
            found = join({place: shares[place] for place in chosen}, self._factors(chosen))
            if found is not None and is_right(found):
                self._find_liars(chosen, shares)
                return found
        raise SecureSumError(
            f"the shares of site {self.session.sites[owner]!r} do not give its secret: it gave out wrong ones, or more "
            f"than {max(len(shares) - self.session.threshold, 0)} of the sites that opened them lie. Begin the sum "
            "anew without it"
        )

    def _choices(self, shares: Mapping[int, bytes]) -> Iterator[tuple[int, ...]]:
        trusted = [place for place in sorted(shares) if place not in self.liars]
        return combinations(trusted, self.session.threshold)

    def _factors(self, chosen: tuple[int, ...]) -> list[int]:
        if chosen not in self._weights:
            self._weights[chosen] = weights(chosen)
        return self._weights[chosen]

    def _find_liars(self, right: tuple[int, ...], shares: Mapping[int, bytes]) -> None:
        """Judge the shares that were not needed, where the first choice was not the right one."""
        first = next(self._choices(shares))
        if right == first:
            return
        held = {place: shares[place] for place in right}
        for place in set(first) - set(right):
            value = interpolate(held, weights(right, place))
            if value.to_bytes(SHARE_BYTES, "big") != shares[place]:
                self.liars.add(place)
