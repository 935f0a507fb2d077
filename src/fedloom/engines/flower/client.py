"""The ClientApp: a relay between Flower's messages and the site's worker. Flower starts it anew for every message.

The SuperNode names the worker: --node-config 'worker-socket="…/worker.sock" worker-token="…/worker.token"'.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloom.engines.flower.payload import pack, unpack
from fedloom.errors import FedloomError, SiteError
from fedloom.site.protocol import Parcel, exchange

WORKER_SECONDS = 120.0
"""How long a worker that was stopped may take to come back."""
PAUSE_SECONDS = 0.25


Ask = Callable[[Parcel, Context], Parcel]


def relay(message: Message, context: Context, ask: Ask | None = None) -> Message:
    """Hand the request to the worker and its reply back. An error becomes a reply that says so."""
    began = time.perf_counter()
    try:
        parcel = unpack(message.content)
        facts = {**parcel.facts, "settings": str(context.run_config["settings"])}
        reply = (ask or ask_worker)(Parcel(facts, parcel.payloads), context)
    except (FedloomError, OSError, KeyError) as error:
        reply = Parcel({"error": f"the site's relay: {error}"})
    facts = {**reply.facts, "relay": time.perf_counter() - began}
    return Message(pack(Parcel(facts, reply.payloads)), reply_to=message)


def ask_worker(parcel: Parcel, context: Context) -> Parcel:
    """The reply of the worker that the SuperNode names."""
    return call(parcel, *worker(context))


def worker(context: Context) -> tuple[Path, Path]:
    """Socket and token file of the site's worker. Raises SiteError where the SuperNode does not name them."""
    try:
        return Path(str(context.node_config["worker-socket"])), Path(str(context.node_config["worker-token"]))
    except KeyError as error:
        raise SiteError(f"start the SuperNode with --node-config that sets {error}; docs/deploy.md shows how") from None


def call(parcel: Parcel, path: Path, token: Path, patience: float = WORKER_SECONDS) -> Parcel:
    """The worker's reply. A worker that is away or dies meanwhile is asked again until `patience` seconds are over.

    Raises SiteError if it does not come back. Asking again is harmless: the worker repeats what it has answered.
    """
    until = time.monotonic() + patience
    while True:
        try:
            shown = token.read_text(encoding="utf-8").strip()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(str(path))
                return exchange(connection, shown, parcel)
        except OSError as error:
            if time.monotonic() > until:
                raise SiteError(f"the worker is away ({error}): start it with `fedloom worker SITE.toml`") from None
            time.sleep(PAUSE_SECONDS)


app = ClientApp()


@app.train()
@app.query()
def main(message: Message, context: Context) -> Message:
    """What Flower calls."""
    return relay(message, context)
