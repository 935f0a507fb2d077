"""Submit a run to a SuperLink and wait for its end."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w

from fedloom.errors import RoundError
from fedloom.flower.proxies import exempt_loopback
from fedloom.flower.settings import server_settings, shared_settings
from fedloom.records.config import Config, FlowerSettings
from fedloom.records.session import End
from fedloom.records.text import LONG, to_printable

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Environment in which Flower calls nobody."""
POLL_SECONDS = 1.0
"""Between two looks at a run: a person hardly notices, and a SuperLink bears it."""
SILENT = "No heartbeat received from the task"
"""What Flower 1.41 says of an app that was killed."""
RAISED = "ServerApp failed with exception: "
"""How it begins what an app's own error says."""
AWAY_SECONDS = 60.0
"""How long a SuperLink may be out of reach before a submitted run is given up on here."""


@dataclass(frozen=True, slots=True)
class RunState:
    """What the SuperLink tells of a run. bytes_sent and bytes_received: its own count of the SuperNodes' traffic."""

    status: str
    ended: str
    details: str
    bytes_sent: int
    bytes_received: int


def run_on_superlink(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    force: bool = False,
    told: Callable[[int], None] | None = None,
) -> RunState:
    """Submit, wait until the run is over, return how it ended.

    `out` is a folder on the SuperLink's machine; told(run id) is called once the run is submitted. Raises RoundError
    where the SuperLink cannot be reached, refuses the run, or the run fails.
    """
    with open_control(config) as client:
        run_id = submit(client, config, out, resume, force)
        if told:
            told(run_id)
        state = wait_for_end(client, run_id)
    if state.ended != "completed":
        raise RoundError(f"run {run_id} ended as {state.ended or state.status}: {explain_end(state)}")
    return state


def explain_end(state: RunState, end: End | None = None) -> str:
    """Why a run is over that did not complete, in words. end: what its ledger says of it, where that is known."""
    if end is not None and end.reason:
        return end.reason
    if state.ended == "stopped":
        return "it was stopped by `fedloom stop` or `flwr stop`"
    if state.details == SILENT:
        return (
            "the SuperLink hears nothing of the server's app any more: the app or the SuperLink was killed, or the "
            "machine had no memory left for it (the SuperLink's log says more)"
        )
    return to_printable(state.details.removeprefix(RAISED), LONG) or "the SuperLink gives no reason"


def build_bundle(config: Config, out: Path, resume: bool, force: bool = False) -> bytes:
    """The Flower App Bundle: no code, only the names of fedloom's two apps and the settings for them."""
    from flwr.cli.build import build_fab_from_files

    settings = {
        "settings": shared_settings(config),
        "own": server_settings(config),
        "out": str(out.absolute()),
        "resume": resume,
        "force": force,
    }
    apps = {"serverapp": "fedloom.flower.sites:app", "clientapp": "fedloom.flower.relay:app"}
    project = {
        "project": {
            "name": "fedloom-run",
            "version": metadata.version("fedloom"),
            "description": "A fedloom run: settings only; the code is the fedloom that is installed at each site.",
            "license": "Apache-2.0",
        },
        "tool": {"flwr": {"app": {"publisher": "fedloom", "components": apps, "config": settings}}},
    }
    return build_fab_from_files({"pyproject.toml": tomli_w.dumps(project).encode()})[0]


def open_control(config: Config) -> AbstractContextManager[Any]:
    """A client of the Control API of the SuperLink that a run's settings name; as `connect_control`."""
    return connect_control(config.flower)


@contextmanager
def connect_control(rules: FlowerSettings) -> Iterator[Any]:
    """A client of the SuperLink's Control API. Raises RoundError in words where that cannot be reached."""
    os.environ.update(QUIET)
    exempt_loopback()
    import click
    import httpx
    from flwr.cli.typing import SuperLinkConnection
    from flwr.cli.utils import init_http_client_from_connection

    where = SuperLinkConnection("fedloom", rules.superlink, rules.root_certificates, rules.insecure)
    client = None
    try:
        with redirect_stdout(io.StringIO()):
            client = init_http_client_from_connection(where)
        yield client
    except httpx.HTTPStatusError as error:
        raise RoundError(f"the SuperLink at {rules.superlink} refused: {_refusal(error.response.text)}") from None
    except httpx.HTTPError as error:
        raise RoundError(
            f"the SuperLink at {rules.superlink} cannot be reached ({error}): check flower.superlink and "
            "flower.root_certificates, and that flower-superlink runs there"
        ) from None
    except click.ClickException as error:
        raise RoundError(f"the SuperLink at {rules.superlink}: {error.message}") from None
    finally:
        if client is not None:
            client.close()


def submit(client: Any, config: Config, out: Path, resume: bool, force: bool = False) -> int:  # noqa: ANN401 (Flower's)
    """Hand the run in; its number."""
    import hashlib

    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    content = build_bundle(config, out, resume, force)
    fab = fab_to_proto(Fab(hashlib.sha256(content).hexdigest(), content, {}))
    # Beside the bundle as well: there `fedloom node` reads them, which takes no bundle of code.
    told = user_config_to_proto({"settings": shared_settings(config)})
    response = client.StartRun(StartRunRequest(fab=fab, override_config=told))
    if not response.HasField("run_id"):
        raise RoundError(f"the SuperLink at {config.flower.superlink} took no run: {response.note}")
    return int(response.run_id)


def wait_for_end(
    client: Any,  # noqa: ANN401 (Flower's client is untyped)
    run_id: int,
    look: Callable[[RunState | None], None] | None = None,
) -> RunState:
    """Poll until the run is over. A SuperLink that is away for a while is waited for.

    look(the run's state, or None while the SuperLink does not answer) is called every second.
    """
    import httpx

    away: float | None = None
    while True:
        state: RunState | None = None
        try:
            state = read_state(client, run_id)
            away = None
        except httpx.TransportError:
            away = away or time.monotonic()
            if time.monotonic() - away > AWAY_SECONDS:
                raise
        if look:
            look(state)
        if state and state.status == "finished":
            return state
        time.sleep(POLL_SECONDS)


def stop(client: Any, run_id: int) -> None:  # noqa: ANN401 (Flower's client is untyped)
    """Have the SuperLink stop a run; its app ends with its next sign of life. Raises RoundError if it is over."""
    from flwr.proto.control_pb2 import StopRunRequest

    if not client.StopRun(StopRunRequest(run_id=run_id)).success:
        raise RoundError(f"the SuperLink did not stop run {run_id}: it may be over")


def read_state(client: Any, run_id: int) -> RunState:  # noqa: ANN401 (Flower's client is untyped)
    """How a run stands."""
    from flwr.proto.control_pb2 import ListRunsRequest

    found = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
    status = found.status
    return RunState(status.status, status.sub_status, status.details, found.bytes_sent, found.bytes_recv)


def _refusal(text: str) -> str:
    """What a SuperLink's refusal says, in one line."""
    from flwr.supercore.error import FlowerError

    error = FlowerError.from_json(text)
    words = text if error is None else " ".join(filter(None, (error.message, error.public_details)))
    return to_printable(" ".join(words.split()))
