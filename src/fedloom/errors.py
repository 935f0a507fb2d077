"""Every error that fedloom raises on purpose.

    FedloomError                     caught once, at the command line, and printed as one line
    ├── ConfigError                  a setting is missing, unknown, of the wrong type or out of range
    ├── DataError                    a data file is missing, empty or not what the settings say
    ├── ModelError                   a base model or adapter folder cannot be used
    ├── ShapeError                   tensors that do not fit together
    ├── NumericError                 NaN, infinity, or a result that cannot be trusted
    ├── WireError                    bytes that are not a valid payload
    │   └── StaleError               a valid payload, computed from another base than the receiver's
    ├── CheckpointError              a run folder that cannot be resumed
    └── RoundError                   a round that cannot be completed (nobody answered, say)

A message names the file, key, module or client, says what was expected, and what to do.
"""

from __future__ import annotations


class FedloomError(Exception):
    """Root of the hierarchy."""


class ConfigError(FedloomError):
    """A setting is missing, unknown, of the wrong type or out of range."""


class DataError(FedloomError):
    """A data file is missing, empty or not what the settings say."""


class ModelError(FedloomError):
    """A base model or adapter folder cannot be used."""


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


class RoundError(FedloomError):
    """A round that cannot be completed."""
