"""What the server app holds on to: no payload longer than it is needed, and of the first adapter its shapes alone."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from types import SimpleNamespace

import desks
import pytest

from fedloom.flower import fleet as fleets
from fedloom.flower import sites as server
from fedloom.flower.fleet import LARGE
from fedloom.flower.messages import Reply, SentRequest
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.records.events import Silent
from fedloom.rounds import decoded
from fedloom.rounds import turns as rounds
from fedloom.site.protocol import Parcel
from fedloom.wire import decode
from fedloom.workspace.folder import RunFolder

pytestmark = pytest.mark.flower


def test_a_message_that_was_read_is_gone_without_the_garbage_collector():
    content = pack_parcel(Parcel({"round": 1}, (b"a", b"bc")))
    gone = weakref.ref(content)
    gc.disable()
    try:
        assert unpack_parcel(content) == Parcel({"round": 1}, (b"a", b"bc"))
        del content
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("expects", "size", "pulls"), [(0, 10, [3, 3]), (LARGE, 10, [1, 1, 1, 3]), (0, LARGE, [3, 1, 1, 1])]
)
def test_large_answers_are_fetched_one_after_the_other(monkeypatch, expects, size, pulls):
    """Flower hands over at once what has come of all that it is asked for: ten sites' payloads together."""
    payload, asked = bytes(size), []

    def pull(identifiers):
        asked.append(len(identifiers))
        return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=one)) for one in identifiers]

    def read(request, message):
        return Reply(request, Parcel({}, (payload,)))

    monkeypatch.setattr(fleets, "read_reply", read)
    fleet = fleets.Fleet(SimpleNamespace(pull_messages=pull), {}, desks.SITES, expects=expects)
    for _ in range(2):
        fleet.outstanding = {
            f"m{number}": SentRequest(number, site, "turn", 1, "", 0.0) for number, site in enumerate(desks.SITES)
        }
        assert [reply.asked.site for reply in fleet.collect()] == list(desks.SITES) and not fleet.outstanding
    assert asked == pulls and list(fleet.collect()) == []


@pytest.mark.parametrize("method", ["fedit", "fedsrd"])
def test_a_round_decodes_every_update_once_and_its_own_broadcast_never(toy_federation, monkeypatch, method):
    updates: Counter[bytes] = Counter()
    broadcasts: Counter[bytes] = Counter()

    def counted(found):
        def read(payload, *rest):
            found[payload] += 1
            return decode(payload, *rest)

        return read

    monkeypatch.setattr(decoded, "decode", counted(updates))
    monkeypatch.setattr(rounds, "decode", counted(broadcasts))
    federation, _ = toy_federation(f"method.name={method}", "federation.num_rounds=3")
    assert federation.server.version == 3
    assert len(updates) == 3 * len(desks.SITES) and set(updates.values()) == {1}
    # The start, where a site is sent it, and three broadcasts: each of them by every site, and by nobody else.
    assert set(broadcasts.values()) == {len(desks.SITES)} and len(broadcasts) in (3, 4)


def test_the_first_adapter_is_let_go_of_after_the_first_round(tmp_path, monkeypatch):
    config = desks.settings("method.name=fedit", "federation.num_rounds=2")
    first: list[weakref.ref] = []

    def assembled(*given, **options):
        setup = desks.assemble(config, dict.fromkeys(desks.SITES, []), {})
        first.append(weakref.ref(setup.initial))
        return setup

    monkeypatch.setattr(server, "build_setup", assembled)
    grid = SimpleNamespace()
    with RunFolder.open(tmp_path / "run", config) as folder:
        federation = server.prepare_rounds(grid, folder, False, Silent(), (), None)
        assert federation.server.adapter is first[0]() is not None
        assert federation.setup.initial.ranks() == federation.server.adapter.ranks()
        federation.server = federation.server.__class__(federation.setup.initial)
        gc.collect()
        assert first[0]() is None, "somebody keeps the first adapter's values"
