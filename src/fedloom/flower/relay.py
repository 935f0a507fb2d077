"""The ClientApp: a relay between Flower's messages and the site's worker. Flower starts it anew for every message.

The SuperNode names the worker: --node-config 'worker-socket="…/worker.sock" worker-token="…/worker.token"'.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloom.errors import FedloomError, SiteError
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.site.calling import call_worker
from fedloom.site.protocol import Parcel, error_parcel

log = logging.getLogger("fedloom.relay")

Ask = Callable[[Parcel, Context], Parcel]


def relay(message: Message, context: Context, ask: Ask | None = None) -> Message:
    """Hand the request to the worker and its reply back. An error becomes a reply that says so.

    The server is told in words of our own; what Python says of an error may hold paths, and stays in the site's log.
    """
    began = time.perf_counter()
    try:
        parcel = unpack_parcel(message.content)
        facts = {**parcel.facts, "settings": str(context.run_config["settings"])}
        reply = (ask or ask_worker)(Parcel(facts, parcel.payloads), context)
    except FedloomError as error:
        reply = error_parcel(f"the site's relay: {error}")
    except Exception:  # Flower would send the server whatever the exception says
        log.exception("a request could not be handed to the worker")
        reply = error_parcel("the site's relay failed; the SuperNode's log says why")
    facts = {**reply.facts, "relay": time.perf_counter() - began}
    return Message(pack_parcel(Parcel(facts, reply.payloads)), reply_to=message)


def ask_worker(parcel: Parcel, context: Context) -> Parcel:
    """The reply of the worker that the SuperNode names."""
    return call_worker(parcel, *worker_files(context))


def worker_files(context: Context) -> tuple[Path, Path]:
    """Socket and token file of the site's worker. Raises SiteError where the SuperNode does not name them."""
    try:
        return Path(str(context.node_config["worker-socket"])), Path(str(context.node_config["worker-token"]))
    except KeyError as error:
        raise SiteError(f"start the SuperNode with --node-config that sets {error}; docs/deploy.md shows how") from None


app = ClientApp()


@app.train()
@app.query()
def main(message: Message, context: Context) -> Message:
    """What Flower calls."""
    return relay(message, context)
