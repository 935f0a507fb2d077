"""Flower's Simulation Runtime in a process of its own, which loads no torch and can be killed with all that it started.

    simulation.Runtime ─pipe→ Flower's grid ─→ Ray ─→ Ray's processes: build_app's answer ─→ actors.ask

The rounds are played at the other end of the pipe; the ServerApp here only hands its grid's functions over.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fedloom.flower.relay import relay
from fedloom.flower.simulated.cast import Cast
from fedloom.site.protocol import Parcel


def build_app(cast: Cast) -> ClientApp:
    """The ClientApp of all sites: any of Ray's processes may answer for any of them."""

    def ask(parcel: Parcel, context: Context) -> Parcel:
        from fedloom.flower.simulated import actors  # loads torch, which this process does not need

        return actors.ask_site(cast, cast.names[int(context.node_config["partition-id"])], parcel)

    def answer(message: Message, context: Context) -> Message:
        run_config: Any = {"settings": cast.settings}
        site = Context(context.run_id, context.node_id, context.node_config, context.state, run_config)
        return relay(message, site, ask)

    app = ClientApp()
    app.train()(answer)
    app.query()(answer)
    return app


def play_sites(descriptor: int) -> None:
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
        run_simulation(server, build_app(cast), len(cast.names), backend_config=backend)
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
