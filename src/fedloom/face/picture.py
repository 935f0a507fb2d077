"""A picture that a notebook shows and a script saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Picture:
    """A PNG image."""

    png: bytes

    def save(self, path: str | Path) -> Path:
        """Write the image to a file."""
        Path(path).write_bytes(self.png)
        return Path(path)

    def __repr__(self) -> str:
        # The size stands in the header that every PNG begins with, after its signature of 16 bytes.
        width, height = (int.from_bytes(self.png[start : start + 4], "big") for start in (16, 20))
        return f"Picture({width} × {height} pixels, {len(self.png):,} bytes)"

    def _repr_png_(self) -> bytes:
        return self.png
