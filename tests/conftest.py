"""One thread: the tests' matrices are small, and a second thread mostly waits for the first."""

import gc
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
# How long an example takes says what else the machine does, and what is compiled or imported in it.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: looking for garbage meanwhile would be a quarter of the time that importing takes."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="module", autouse=True)
def libraries_set_aside() -> Iterator[None]:
    """Garbage is looked for among the objects of a file's tests, not among the half million of the libraries."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose curve nobody looks at: drawing it takes longer than their rounds. tests/report looks at curves."""
    monkeypatch.setattr("fedloom.report.figure.draw_curve", lambda *arguments: None)
