"""Every error that fedloom raises on purpose.

    FedloomError                     caught once, at the command line, and printed as one line
    ├── ConfigError                  a setting is missing, unknown, of the wrong type or out of range
    │   └── UnknownKeyError          a key that this version of fedloom does not have
    ├── DataError                    a data file is missing, empty or not what the settings say
    ├── ModelError                   a base model or adapter folder cannot be used
    ├── HubError                     the Hugging Face Hub cannot be reached, or refuses
    ├── ShapeError                   tensors that do not fit together
    ├── NumericError                 NaN, infinity, or a result that cannot be trusted
    ├── WireError                    bytes that are not a valid payload
    │   └── StaleError               a valid payload, computed from another base than the receiver's
    ├── CheckpointError              a run folder that cannot be resumed
    ├── PolicyRefusal                a job that the site's own rules do not allow
    ├── AuditError                   a site's record of what has left it was altered
    ├── SecureSumError               a secure sum that cannot be completed, or that somebody tampers with
    ├── RoundError                   a round that cannot be completed (nobody answered, say)
    └── SiteError                    a site's worker that cannot be reached, or a request that it cannot serve
        └── VersionError             server and site are of versions of fedloom that do not go together

A message names the file, key, module or client, says what was expected, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


def begin_small(text: str) -> str:
    """The text with a small first letter, to stand after a colon; what it says of values stays as it is."""
    return text[:1].lower() + text[1:]


class FedloomError(Exception):
    """Root of the hierarchy."""


class ConfigError(FedloomError):
    """A setting is missing, unknown, of the wrong type or out of range."""


class UnknownKeyError(ConfigError):
    """A key that this version of fedloom does not have. `key`: its dotted name."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


class DataError(FedloomError):
    """A data file is missing, empty or not what the settings say."""


class ModelError(FedloomError):
    """A base model or adapter folder cannot be used."""


class HubError(FedloomError):
    """The Hugging Face Hub cannot be reached, or refuses what is asked of it."""


class ShapeError(FedloomError):
    """Tensors that do not fit together."""


class NumericError(FedloomError):
    """NaN, infinity, or a result that cannot be trusted."""


class WireError(FedloomError):
    """Bytes that are not a valid payload."""


class StaleError(WireError):
    """A valid payload, computed from another base than the receiver's."""


class CheckpointError(FedloomError):
    """A run folder that cannot be resumed."""


class PolicyRefusal(FedloomError):
    """A job that the site's own rules do not allow.

    The message is the whole reason, for the site's own log; `public` is all that the server is told.
    """

    def __init__(self, reason: str, public: str = "refused by the site's policy") -> None:
        super().__init__(reason)
        self.public = public


class AuditError(FedloomError):
    """A site's record of what has left it was altered or cannot be kept."""


class SecureSumError(FedloomError):
    """A secure sum that cannot be completed, or that somebody tampers with."""


class RoundError(FedloomError):
    """A round that cannot be completed. `refused`: whose updates were refused, and why.

    can_skip: whether enough clients have answered, and none of them brought anything that is to be averaged.
    """

    def __init__(self, message: str, refused: Mapping[str, str] | None = None, *, can_skip: bool = False) -> None:
        super().__init__(message)
        self.refused = dict(refused or {})
        self.can_skip = can_skip


class SiteError(FedloomError):
    """A site's worker that cannot be reached, or a request that it cannot serve."""


class VersionError(SiteError):
    """Server and site are of versions of fedloom that do not go together.

    The text rests on the server's own words and on the site's version alone: the server is told all of it.
    """
