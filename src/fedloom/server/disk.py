"""A run that its own full disk ends: said in words, with the way on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from fedloom.errors import CheckpointError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No space left, no more allowed to this user, and no larger file allowed to this process."""


def explain_full_disk(error: BaseException, folder: Path) -> CheckpointError | None:
    """The error to raise in place of one that says that the disk of a run's folder is full; None for another one."""
    if not any(_is_full(one) for one in _chain(error)):
        return None
    return CheckpointError(
        f"the disk that holds {folder} is full: make room, then go on with --resume; all rounds up to the last "
        "checkpoint are kept"
    )


def _is_full(error: BaseException) -> bool:
    """Libraries in Rust say it in the system's words, without its number. What a site says is about another disk."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    own = isinstance(error, SafetensorError | CheckpointError)
    return own and any(os.strerror(number) in str(error) for number in FULL)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
