"""The demo's model, data and settings; docs and scripts say how they were made."""

from pathlib import Path


def testbed_folder() -> Path:
    """The folder that holds them."""
    return Path(__file__).parent
