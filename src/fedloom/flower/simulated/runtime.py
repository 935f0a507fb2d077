"""Flower's Simulation Runtime in a process of its own, which loads no torch and can be killed with all that it started.

    simulation.Runtime ─pipe→ Flower's grid ─→ Ray ─→ Ray's processes: Cast.answer ─→ actors.ask

The rounds are played at the other end of the pipe; the ServerApp here only hands its grid's functions over.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fedloom.flower.relay import relay
from fedloom.site.protocol import Parcel


@dataclass(frozen=True, slots=True)
class Cast:
    """Whom Ray's processes play: `names` in the order of Flower's partitions.

    settings: what a run tells its sites; model, device: what every site has; folder: where their states are.
    """

    names: tuple[str, ...]
    settings: str
    model: str
    device: str
    folder: str

    def app(self) -> ClientApp:
        """The ClientApp of all sites."""
        app = ClientApp()
        app.train()(self.answer)
        app.query()(self.answer)
        return app

    def answer(self, message: Message, context: Context) -> Message:
        """The answer of the site whose node was asked."""
        run_config: Any = {"settings": self.settings}
        return relay(
            message, Context(context.run_id, context.node_id, context.node_config, context.state, run_config), self.ask
        )

    def ask(self, parcel: Parcel, context: Context) -> Parcel:
        """The same, from the site's desk."""
        from fedloom.flower.simulated import actors

        return actors.ask(self, self.names[int(context.node_config["partition-id"])], parcel)


def main(descriptor: int) -> None:
    """Play what is read from the pipe until its other end says so or is gone.

    What goes wrong is told there, in the place of an answer.
    """
    from flwr.simulation import run_simulation

    pipe = Connection(descriptor)
    cast, backend = pipe.recv()
    server = ServerApp()

    @server.main()
    def hand_over(grid: Grid, context: Context) -> None:
        _serve(pipe, grid, backend["init_args"].get("_temp_dir", ""))

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    try:
        run_simulation(server, cast.app(), len(cast.names), backend_config=backend)
    except BaseException as error:  # Flower ends the process where it gives up
        pipe.send(RuntimeError(_root(error)))


def _serve(pipe: Connection, grid: Grid, folder: str) -> None:
    pipe.send((TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id))
    while True:
        try:
            asked = pipe.recv()
        except EOFError:  # the other end was killed
            shutil.rmtree(folder, ignore_errors=True)
            os.killpg(0, signal.SIGKILL)  # with all that Ray started
        if asked is None:
            return
        name, arguments = asked
        pipe.send(list(getattr(grid, name)(*arguments)))


def _root(error: BaseException) -> str:
    """The first line of what an error began with."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]
