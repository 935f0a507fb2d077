"""What the worker tells systemd, and which GPU it takes."""

import os
import socket
import threading

import pytest

from fedloom.errors import ConfigError
from fedloom.site.config import SiteConfig
from fedloom.site.gpu import VISIBLE, claim_gpu
from fedloom.site.systemd import as_service, notify, pause_seconds


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    """systemd's end of the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listener


def test_a_service_says_that_it_is_ready_alive_and_ending(systemd, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "40000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    with as_service("site lab"):
        assert systemd.recv(100) == b"READY=1\nSTATUS=site lab"
        assert [systemd.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    told = systemd.recv(100)
    while told == b"WATCHDOG=1":
        told = systemd.recv(100)
    assert told == b"STOPPING=1"


def test_an_abstract_socket_is_understood(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0fedloom-{os.getpid()}")
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@fedloom-{os.getpid()}")
        notify("READY=1")
        assert listener.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    ("asked", "pid", "pause"), [("60000000", "", 15.0), ("", "", None), ("x", "", None), ("8", "1", None)]
)
def test_signs_of_life_come_four_times_in_systemds_patience(monkeypatch, asked, pid, pause):
    monkeypatch.setenv("WATCHDOG_USEC", asked)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    assert pause_seconds() == pause


def test_without_systemd_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    with as_service("site lab"):
        assert not [thread for thread in threading.enumerate() if thread.name == "watchdog"]
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    notify("READY=1")


def site(device):
    return SiteConfig(name="lab", model="./model", data="./data", device=device)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_a_device_without_a_number_stays(monkeypatch, device):
    monkeypatch.delenv(VISIBLE, raising=False)
    assert claim_gpu(site(device)).device == device and VISIBLE not in os.environ


@pytest.mark.parametrize(
    ("shown", "number", "left"), [(None, 0, "0"), (None, 3, "3"), ("2,5", 1, "5"), ("GPU-a, GPU-b", 0, "GPU-a")]
)
def test_one_of_several_gpus_is_the_only_one_that_the_worker_sees(monkeypatch, shown, number, left):
    """SITE.toml says "cuda:1"; transformers' Trainer takes the first GPU that it sees."""
    monkeypatch.setenv(VISIBLE, "")
    monkeypatch.delenv(VISIBLE)
    if shown is not None:
        monkeypatch.setenv(VISIBLE, shown)
    assert claim_gpu(site(f"cuda:{number}")).device == "cuda" and os.environ[VISIBLE] == left


def test_a_gpu_that_is_not_shown_is_refused(monkeypatch):
    monkeypatch.setenv(VISIBLE, "4")
    with pytest.raises(ConfigError, match="shows 1 GPUs"):
        claim_gpu(site("cuda:1"))
    assert os.environ[VISIBLE] == "4"
