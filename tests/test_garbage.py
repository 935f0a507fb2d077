"""Programs of fedloom's own collect garbage rarely; a library that is imported leaves that to its program."""

import gc
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedloom.flower.node import service
from fedloom.garbage import collect_rarely
from fedloom.site import worker
from fedloom.web import serving


def said(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_a_command_collects_rarely_and_an_import_does_not():
    plain = int(said("import gc; print(gc.get_threshold()[0])"))
    imported = int(said("import fedloom.rounds.turns, gc; print(gc.get_threshold()[0])"))
    assert imported == plain
    command = (
        "import atexit, gc, sys; atexit.register(lambda: print('at the end', gc.get_threshold()[0])); "
        "sys.argv = ['fedloom', '--version']; from fedloom.cli.main import main; main()"
    )
    assert int(said(command).rpartition(" ")[2]) > 10 * plain


class Begun(Exception):
    """A service has come to its work."""


@pytest.mark.parametrize("begin", ["worker", "node", "pages"])
def test_services_collect_as_usual(begin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker, a node and a server of pages stay for days, and large payloads pass through them."""

    def work(*given: object, **named: object) -> None:
        raise Begun

    before = gc.get_threshold()
    monkeypatch.setattr(worker, "_serve", work)
    monkeypatch.setattr(service, "Link", work)
    pages = SimpleNamespace(_server=SimpleNamespace(run=work), _socket=None, close=lambda: None)
    site = SimpleNamespace(state=str(tmp_path), socket=str(tmp_path / "socket"), node="anything")
    call = {
        "worker": partial(worker.serve_site, site),
        "node": partial(service.serve_node, site),
        "pages": partial(serving.Service.serve, pages),
    }[begin]
    try:
        collect_rarely()
        assert gc.get_threshold()[0] > 10 * before[0]
        with pytest.raises(Begun):
            call()
        assert gc.get_threshold() == before
    finally:
        gc.set_threshold(*before)


def test_most_of_what_importing_costs_the_collector_is_spared():
    """Full collections are counted, not seconds."""
    count = (
        "import gc; full = []; gc.callbacks.append(lambda phase, info: info['generation'] == 2 and full.append(1)); "
        "{}import torch, transformers.trainer; print(len(full))"
    )
    assert int(said(count.format("from fedloom.garbage import collect_rarely; collect_rarely(); "))) == 0
    assert int(said(count.format(""))) > 0
