"""Fixtures of the Flower tests; without the extra `flower` they are skipped, and say so."""

from __future__ import annotations

import pytest

flwr = pytest.importorskip("flwr", reason="the extra `flower` is not installed: pip install 'fedloom[flower]'")


@pytest.fixture
def toy_federation(tmp_path, monkeypatch):
    """play(grid's settings …) → the finished server and the grid, on made-up models."""
    import desks

    from fedloom.flower import delivery, exchange, filling, gathering, muster
    from fedloom.flower import sites as server
    from fedloom.flower.fleet import Fleet
    from fedloom.records.events import Silent
    from fedloom.server.loop import Rounds
    from fedloom.workspace.folder import RunFolder

    monkeypatch.setattr("fedloom.site.setups.build_setup", desks.assemble)
    monkeypatch.setattr("fedloom.server.loop.finish_run", lambda *arguments: None)
    for module, name, value in (
        (gathering, "POLL_SECONDS", 0.002),
        (muster, "POLL_SECONDS", 0.002),
        (gathering, "LOOK_SECONDS", 0.01),
        (filling, "POLL_SECONDS", 0.002),
        (filling, "LOOK_SECONDS", 0.01),
        (delivery, "POLL_SECONDS", 0.002),
        (exchange, "POLL_SECONDS", 0.002),
        (exchange, "LOOK_SECONDS", 0.01),
        (delivery, "LOOK_SECONDS", 0.01),
    ):
        monkeypatch.setattr(module, name, value)
    grids = []

    def play(*overrides, disturb=None, policies=None, grid=None, resume=False, out="run"):
        config = desks.settings(*overrides)
        if grid is None:
            grid = desks.DeskGrid(config, tmp_path, disturb, policies or {})
        grids.append(grid)
        with RunFolder.open(tmp_path / out, config, resume=resume) as folder:
            setup = desks.assemble(config, {name: [] for name in desks.SITES}, {})
            base = server.base_digest(config.model.path)
            facts = {"job": server.job_id(folder.path / "job", resume), "base": base}
            federation = Rounds(setup, folder, Silent(), server.FlowerSites(setup, Fleet(grid, facts, desks.SITES)))
            federation.play(resume)
        return federation, grid

    yield play
    for grid in grids:
        grid.close()
