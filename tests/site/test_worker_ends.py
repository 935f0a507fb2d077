"""A worker that is told to end leaves no socket behind, however far it had come, not even a killed predecessor's."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from fedloom.errors import SiteError
from fedloom.site import worker
from fedloom.site.config import SiteConfig


@pytest.fixture
def site(tmp_path) -> SiteConfig:
    """A site in which a worker was killed: its socket is still there."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(str(path))
    assert path.exists()
    return SiteConfig(
        name="bank",
        model="m",
        data="d",
        state=str(tmp_path / "state"),
        socket=str(path),
        token_file=str(tmp_path / "t"),
    )


@pytest.mark.parametrize("step", ["own_token", "_listening", "Door", "Desk", "_loop"])
def test_told_to_end_at_any_step_it_leaves_no_socket(site, monkeypatch, step):
    before = signal.getsignal(signal.SIGTERM)

    def told_to_end(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)

    class Impatient(worker.Door):
        def close(self):
            super().close()
            os.kill(os.getpid(), signal.SIGTERM)  # once more

    monkeypatch.setattr(worker, "Desk", lambda site, own=None: None)
    monkeypatch.setattr(worker, "Door", Impatient)
    monkeypatch.setattr(worker, step, told_to_end)
    worker.serve_site(site)
    assert not Path(site.socket).exists() and signal.getsignal(signal.SIGTERM) == before


def test_a_second_worker_leaves_the_first_one_s_socket_alone(site, monkeypatch):
    def look(*given):
        assert Path(site.socket).exists()
        with pytest.raises(SiteError, match="another worker"):
            worker.serve_site(site)
        assert Path(site.socket).exists()

    monkeypatch.setattr(worker, "Desk", lambda site, own=None: None)
    monkeypatch.setattr(worker, "_loop", look)
    worker.serve_site(site)
    assert not Path(site.socket).exists()
