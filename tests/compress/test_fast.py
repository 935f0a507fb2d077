"""When loops are compiled: for one large pass, or once many small ones have been done without."""

from types import SimpleNamespace

import pytest

from fedloom.compress import fast
from fedloom.compress.fast import ENOUGH, MANY, compiling_pays, torch_only


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which numba is installed and not loaded."""
    monkeypatch.setattr(fast, "_without", 0)
    monkeypatch.setattr(fast, "_installed", lambda: True)
    monkeypatch.setattr(fast, "sys", SimpleNamespace(modules={}))


def test_a_large_pass_is_worth_it_by_itself():
    assert not compiling_pays(MANY - 1)
    assert compiling_pays(MANY)


def test_many_small_ones_are_together():
    few = MANY // 4
    before = [compiling_pays(few) for _ in range(ENOUGH // few)]
    assert before == [False] * (ENOUGH // few - 1) + [True] and compiling_pays(1)


def test_what_is_loaded_is_used(monkeypatch: pytest.MonkeyPatch):
    fast.sys.modules["numba"] = object()
    assert compiling_pays(1)
    with torch_only():
        assert not compiling_pays(ENOUGH)


def test_where_it_is_not_installed_nothing_is_worth_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fast, "_installed", lambda: False)
    assert not any(compiling_pays(MANY) for _ in range(40))
