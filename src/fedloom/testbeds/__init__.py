"""The demo's model, data and settings; docs and scripts say how they were made."""

from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path


def testbed() -> AbstractContextManager[Path]:
    """The folder that holds them."""
    return resources.as_file(resources.files(__name__))
