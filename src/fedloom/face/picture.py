"""A picture that a notebook shows and a script saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, eq=False, slots=True)
class Picture:
    """A PNG image."""

    png: bytes

    def save(self, path: str | Path) -> Path:
        """Write the image to a file."""
        Path(path).write_bytes(self.png)
        return Path(path)

    def _repr_png_(self) -> bytes:
        return self.png
