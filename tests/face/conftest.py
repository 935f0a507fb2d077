"""The testbed made small, in place of the demo's, and a package with a method in it."""

import sys

import pytest

import fedloom
from small_testbed import small_testbed

HALVES = """
import fedloom

def halves(*, keep: float = 0.5) -> fedloom.Method:
    plain = fedloom.build("fedit")

    def compress(state, after, context):
        memory, entries = plain.compress(state, after, context)
        return memory, {name: half(entry, keep) for name, entry in entries.items()}

    return fedloom.replace(plain, name="halves", compress=compress)

def half(entry, keep):
    kept = fedloom.to_dense(entry).clone()
    kept[round(keep * len(kept)):] = 0
    return fedloom.Dense(entry.shape, kept.flatten())
"""


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    return small_testbed(tmp_path_factory.mktemp("testbed"))


@pytest.fixture
def bed(small, monkeypatch, no_picture):
    """Four sites with six examples each, one step of training, two rounds; nothing is evaluated."""
    monkeypatch.setattr("fedloom.face.settings.testbed_folder", lambda: small)
    return fedloom.testbed(settings={"federation.num_rounds": 2, "data.heldout": None, "lora.r": 2})


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """The builder of a package that is on sys.path, called "outside.methods:halves"."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "__init__.py").touch()
    (tmp_path / "outside" / "methods.py").write_text(HALVES)
    monkeypatch.syspath_prepend(tmp_path)
    from outside.methods import halves

    yield halves
    for name in [name for name in sys.modules if name.partition(".")[0] == "outside"]:
        del sys.modules[name]
