"""The Flower engine on this machine: Flower's Simulation Runtime, with Ray's processes as the sites.

    serve (this process) ─→ Runtime ─pipe→ a process with Flower's runtime ─→ Ray's processes ─→ desks

The rounds are played here, so that errors and Ctrl-C arrive where the user is, and so that a training that goes on at
a site can be given up: Ray's own waiting cannot be interrupted, its process can be killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from pydantic import ValidationError

from fedloom.errors import ConfigError, RoundError
from fedloom.flower.launch import QUIET
from fedloom.flower.messages import Node
from fedloom.flower.settings import check_flower_settings, shared_settings
from fedloom.flower.simulated import actors
from fedloom.flower.simulated.cast import Cast
from fedloom.flower.sites import run_federation
from fedloom.model.sources import Tell, ignore
from fedloom.records.config import Config
from fedloom.records.configfile import explain
from fedloom.records.events import Observer, RunSummary
from fedloom.workspace.data import check_unseen, client_examples, describe_examples
from fedloom.workspace.participants import check_clients_exist, select_participants

STORE_BYTES = 256 * 2**20
"""Memory through which Ray hands messages over; what does not fit goes over files."""
PATIENCE = 10.0
"""Seconds that Flower's runtime may take to end by itself."""
RAY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or it takes an address that the network reaches in place of 127.0.0.1
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or it prints a tip
    "RAY_worker_niceness": "0",  # it would give its processes the lowest priority
}


def run_simulated(
    config: Config, out: Path, *, resume: bool = False, force: bool = False, observer: Observer | None = None
) -> RunSummary:
    """Play the run with processes of this machine as its sites; what a site holds is in `out`/sites/NAME.

    Without federation.participants all clients that there are data for take part. Raises ConfigError, DataError or
    ModelError for what the user can mend, RoundError where Ray fails.
    """
    if config.privacy.secure_aggregation:
        raise ConfigError(
            "privacy.secure_aggregation does not work with engine flower-sim: Ray gives a site's messages to processes "
            "in turn, and what a site keeps secret in a sum stays in one. Use the local engine, or flower"
        )
    notes: list[str] = []
    config = with_participants(config, notes.append)
    share = gpu_share(config)
    everybody = build_cast(config, out, share)
    with Runtime(everybody, ray_backend(config, len(everybody.names), share)) as runtime:
        return run_federation(runtime, config, out, resume=resume, force=force, observer=observer, notes=notes)


def with_participants(config: Config, tell: Tell = ignore) -> Config:
    """The settings with the name of everybody who takes part, checked like those of a real federation.

    tell: called with what is worth knowing of their data.
    """
    check_unseen(config.data)
    texts, _ = client_examples(config, tell)
    check_clients_exist(config.clients, texts)
    texts = select_participants(texts, config.federation.participants)
    for note in describe_examples(texts, {}):
        tell(note)
    names = tuple(texts)
    federation = config.federation.model_copy(update={"participants": config.federation.participants or names})
    config = config.model_copy(update={"federation": federation})
    check_flower_settings(config)
    return config


def gpu_share(config: Config) -> float:
    """The share of a GPU for each process; 0 for none. Raises ConfigError where one is wanted that is not there."""
    there = torch.cuda.is_available()
    share = config.flower.sim_gpus
    if share and not there:
        raise ConfigError(f"flower.sim_gpus is {share:g}, but torch finds no GPU here: unset it, or set it to 0")
    return float(there and config.model.device != "cpu") if share is None else share


def build_cast(config: Config, out: Path, share: float) -> Cast:
    """All sites, for the processes that play them. Raises ConfigError where a client's name is none for a site."""
    names = tuple(sorted(config.federation.participants or ()))
    device = "cuda" if share else "cpu"
    cast = Cast(names, shared_settings(config), config.model.path, device, str(out.absolute() / "sites"))
    try:
        for name in names:
            actors.site_config(cast, name)
    except ValidationError as error:
        raise ConfigError(f"engine flower-sim: {explain(error)}") from None
    return cast


def ray_backend(config: Config, sites: int, share: float) -> dict[str, Any]:
    """How Flower is to start Ray: on this machine, reachable from nowhere else, silent."""
    cpus = config.flower.sim_cpus or os.cpu_count() or 1
    init = {
        "address": "local",  # and never a cluster that the environment names
        "_node_ip_address": "127.0.0.1",
        "num_cpus": min(cpus, sites),
        "num_gpus": torch.cuda.device_count() if share else 0,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "CRITICAL",
    }
    # Flower gives these to Ray as the options of its actors; one that is killed is started anew.
    return {"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": share, "max_restarts": -1}}


class Runtime:
    """Flower's grid, from the process that has it: started when the grid is first looked at, ended with the context."""

    def __init__(self, cast: Cast, backend: dict[str, Any]) -> None:
        self.cast = cast
        self.backend = backend
        self._folder = tempfile.TemporaryDirectory(prefix="fedloom-", ignore_cleanup_errors=True)
        self._pipe, self._far = Pipe()
        self._process: subprocess.Popen[bytes] | None = None

    def get_nodes(self) -> Iterable[Node]:
        """The sites' nodes."""
        if self._process is None:
            self._start()
        nodes: list[Node] = self._asked("get_nodes")
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; the identifiers come back."""
        identifiers: list[str] = self._asked("push_messages", list(messages))
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there."""
        replies: list[Message] = self._asked("pull_messages", list(message_ids))
        return replies

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._end(self._process, 0.0 if kind else PATIENCE)
        self._pipe.close()
        self._folder.cleanup()

    def _start(self) -> None:
        code = f"from fedloom.flower.simulated.runtime import play_sites; play_sites({self._far.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[self._far.fileno()],
            env={**os.environ, **QUIET, **RAY},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C on the terminal is for the caller, who ends this group as a whole
        )
        self._far.close()
        init = {**self.backend["init_args"], "_temp_dir": self._folder.name}
        self._pipe.send((self.cast, {**self.backend, "init_args": init}))
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = self._received()

    def _asked(self, name: str, *arguments: object) -> Any:  # noqa: ANN401 (Flower's own kinds)
        self._pipe.send((name, arguments))
        return self._received()

    def _received(self) -> Any:  # noqa: ANN401 (Flower's own kinds)
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = RuntimeError("its process was killed")
        if isinstance(answer, Exception):
            raise RoundError(f"Flower's Simulation Runtime has ended: {answer}")
        return answer

    def _end(self, process: subprocess.Popen[bytes], patience: float) -> None:
        """End the process; what a site is still doing after `patience` seconds is given up."""
        try:
            if patience:
                self._pipe.send(None)
            process.wait(patience)
        except (OSError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)  # with all that Ray started there
            process.wait()
