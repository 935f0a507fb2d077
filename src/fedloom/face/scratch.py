"""A temporary folder that is gone when nothing holds it any more."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from tempfile import mkdtemp


class Scratch:
    """A new temporary folder. It is removed with this object, or at the end of the program."""

    def __init__(self) -> None:
        self.path = Path(mkdtemp(prefix="fedloom-"))
        # TemporaryDirectory would warn of a folder that is removed like this; here it is what is meant.
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
