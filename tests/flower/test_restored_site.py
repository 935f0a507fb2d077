"""A site that was lost and put back from a copy, in the middle of a run, goes on with the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tomli_w
from desks import site

from fedloom.deploy.backup import back_up, restore
from fedloom.lora.pair import digest
from fedloom.site.audit import AuditTrail
from fedloom.site.config import load_site_config
from fedloom.site.desk import Desk

pytestmark = pytest.mark.flower


def lose_and_restore(node, folder: Path) -> None:
    """Copy the site, remove all of it, put it back into another folder, and open it there."""
    node.desk.close()
    own = folder / "own"
    own.mkdir()
    told = {**site("lab", folder).model_dump(exclude_none=True), "state": "./state"}
    told["policy"] = {"order": "run"}
    (own / "SITE.toml").write_text(tomli_w.dumps(told))
    shutil.move(folder / "lab", own / "state")
    back_up(own, folder / "copy.tar")
    shutil.rmtree(own)
    restore(folder / "new", folder / "copy.tar")
    node.desk = Desk(load_site_config(folder / "new" / "SITE.toml"))


@pytest.mark.parametrize("method", ["fedsrd"])
def test_a_restored_site_goes_on_with_the_same_bits(toy_federation, tmp_path: Path, method: str):
    """After round 1, so that residuals and the ledger of two rounds are at stake."""
    name = f"method.name={method}"
    whole, _ = toy_federation(name, out="whole")
    shutil.rmtree(tmp_path / "lab")
    for other in ("bank", "depot"):
        shutil.rmtree(tmp_path / other)
    lost = []

    def disturb(node, ask, round, reply):
        if (node.desk.site.name, ask, round) == ("lab", "turn", 2) and not lost:
            lost.append(reply)
            lose_and_restore(node, tmp_path)
        return reply

    again, grid = toy_federation(name, disturb=disturb, out="again")
    assert lost and grid.node("lab").desk.site.state == str(tmp_path / "new" / "state")
    assert digest(again.server.adapter) == digest(whole.server.adapter) and again.server.digest == whole.server.digest
    lines, _, _ = AuditTrail(tmp_path / "new" / "state" / "audit").verify()
    assert [line.round for line in lines if line.payload] == [1, 2, 3]


def test_a_site_with_a_new_key_goes_on_in_the_run_with_the_same_bits(toy_federation, tmp_path: Path):
    """Flower gives a node with another key another number; the name that it is registered under stays."""
    whole, _ = toy_federation(out="whole")
    for site_name in ("bank", "depot", "lab"):
        shutil.rmtree(tmp_path / site_name)

    def disturb(node, ask, round, reply):
        if (node.desk.site.name, ask, round) == ("lab", "turn", 1):
            node.node_id, node.last_activated_at = 999, "second start"
        return reply

    again, grid = toy_federation(disturb=disturb, out="again")
    asked = [(ask, round) for name, ask, round in grid.log if name == "lab"]
    assert grid.node("lab").node_id == 999 and [round for ask, round in asked if ask == "turn"] == [1, 2, 3]
    assert digest(again.server.adapter) == digest(whole.server.adapter)
