"""For those who write their own ServerApp: fedloom's methods as a Flower strategy, and a client's turn beside it.

    strategy = FedLoomStrategy(adapter, "fedsrd")                        in the ServerApp
    strategy.start(grid, strategy.arrays(), num_rounds=10)

    @app.train()                                                         in the ClientApp
    def train(message, context):
        return take_turn(message, context, agree("fedsrd"), adapter, step)

Both sides begin with the same adapter. A client's state is kept in Flower's context, which a SuperNode holds in memory:
one that was started anew is sent the full state, and its residual is lost. `fedloom run --engine flower` keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load, save
from torch import Tensor

from fedloom.adapters.settings import PREFIX
from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.errors import FedloomError, RoundError
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.lora.pair import LoraState, from_tensors
from fedloom.methods.method import SHARED, Method, State
from fedloom.methods.table import build
from fedloom.records.text import to_printable
from fedloom.rounds.caps import USUAL, Caps
from fedloom.rounds.catchup import Archive
from fedloom.rounds.job import Job
from fedloom.rounds.step import Train
from fedloom.rounds.turns import accept, client_turn, server_turn, start
from fedloom.site.protocol import Parcel
from fedloom.wire import read_header

Scalar = bool | int | float | str
STATE = "fedloom.state"
UNKNOWN = -1


def agree(
    method: str | Method = "fedsrd",
    settings: Mapping[str, Scalar] | None = None,
    *,
    seed: int = 0,
    values: str = "auto",
    weighting: str = "examples",
    budget: Budget | None = None,
    caps: Caps = USUAL,
) -> Job:
    """What server and clients must agree on: [method], federation.seed, wire.values, weighting and wire.budget.

    caps is the server's alone: what one client may count for, as [federation] has it.
    """
    built = build(method, settings or {})
    form = quantize(built.form(budget) if values == "auto" else values)
    return Job(built, seed, form, weighting, budget, caps=caps)


@final
class FedLoomStrategy(Strategy):
    """Any method of fedloom's, for `Strategy.start`. Nodes that miss rounds are sent what they missed.

    Bad updates are refused and the round goes on; one with fewer than `min_replies` good ones changes nothing.
    """

    def __init__(self, adapter: LoraState, job: Job | str = "fedsrd", *, min_replies: int = 2) -> None:
        self.job = replace(agree(job) if isinstance(job, str) else job, start=adapter)
        self.min_replies = min_replies
        self.server = start(self.job, adapter)
        self.archive = Archive()
        self.versions: dict[int, int] = {}
        self.refused: dict[str, str] = {}

    def summary(self) -> None:
        """Nothing: the settings are the caller's own."""

    def arrays(self) -> ArrayRecord:
        """The server's whole change of weight as PEFT would name it, with the scale folded into B."""
        return ArrayRecord(
            {
                f"{PREFIX}{name.replace('/', '.lora_')}.weight": Array(np.asarray(tensor))
                for name, tensor in self.server.total.tensors().items()
            }
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for every node, with what it has missed. `arrays` says nothing new: the strategy has the state."""
        ranks = self.server.adapter.ranks()
        for node in grid.get_node_ids():
            version = self.versions.get(node, 0)
            payloads = self.archive.payloads_for(self.job, self.server, version, ranks, server_round)
            content = pack_parcel(Parcel({"round": server_round}, tuple(payloads)))
            content["config"] = config
            yield Message(content, node, "train", group_id=str(server_round))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new arrays and the method's numbers; (None, None) if too few good updates came."""
        payloads: dict[str, bytes] = {}
        self.refused = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                payloads[str(node)] = self._update(node, reply)
            except Exception as error:  # whatever a reply is, the others' round goes on
                self.refused[str(node)] = str(error)
        if len(payloads) < self.min_replies:
            return None, None
        try:
            turn = server_turn(self.job, self.server, payloads, server_round, least=self.min_replies)
        except RoundError as error:
            self.refused |= error.refused
            return None, None
        self.refused |= turn.refused
        self.archive.add(self.server.version, turn.payload, limit=4 * turn.state.numel())
        self.server = turn.state
        sizes = {"bytes_up": sum(map(len, payloads.values())), "bytes_down": len(turn.payload)}
        return self.arrays(), MetricRecord({**turn.stats, **sizes, "refused": len(self.refused)})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: evaluate on the server, with `evaluate_fn`."""
        return ()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None

    def _update(self, node: int, reply: Message) -> bytes:
        """The node's update; where it gives none, its state counts as unknown from now on."""
        self.versions[node] = UNKNOWN
        if reply.has_error():
            raise FedloomError(f"Flower's error {reply.error.code}: {to_printable(str(reply.error.reason))}")
        parcel = unpack_parcel(reply.content)
        if "error" in parcel.facts or len(parcel.payloads) != 1:
            raise FedloomError(to_printable(str(parcel.facts.get("error", "the reply holds no update"))))
        self.versions[node] = read_header(parcel.payloads[0]).base_version
        return parcel.payloads[0]


def take_turn(message: Message, context: Context, job: Job, adapter: LoraState, train: Train) -> Message:
    """A client's answer to the strategy's message; its state is kept in `context`.

    adapter: the one that the server began with; train: (state, round, seed) → Trained, as in `fedloom.rounds.turns`. An
    error of fedloom's own becomes a reply that says so.
    """
    parcel = unpack_parcel(message.content)
    round, node = int(parcel.facts["round"] or 0), str(context.node_id)
    job = replace(job, start=adapter)
    state = _loaded(context.state) or start(job, adapter)
    try:
        for payload in parcel.payloads:
            state = accept(job, state, payload)
        turn = client_turn(job, node, state, (), train, round)
    except FedloomError as error:
        return Message(pack_parcel(Parcel({"error": str(error)})), reply_to=message)
    _keep(context.state, turn.state)
    return Message(pack_parcel(Parcel({"loss": turn.trained.loss}, (turn.payload,))), reply_to=message)


def _keep(records: RecordDict, state: State) -> None:
    parts: dict[str, Mapping[str, Tensor]] = {part: getattr(state, part).tensors() for part in SHARED}
    parts["memory"] = state.memory
    tensors = {f"{part}:{name}": t.clone() for part, held in parts.items() for name, t in held.items()}
    content = save(tensors)
    records[STATE] = ArrayRecord({"state": Array("uint8", (len(content),), STATE, content)})
    records[f"{STATE}.facts"] = ConfigRecord({"version": state.version, "digest": state.digest})


def _loaded(records: RecordDict) -> State | None:
    if STATE not in records:
        return None
    facts = records.config_records[f"{STATE}.facts"]
    tensors = {name: t.clone() for name, t in load(records.array_records[STATE]["state"].data).items()}

    def part(wanted: str) -> dict[str, Tensor]:
        return {name.partition(":")[2]: t for name, t in tensors.items() if name.startswith(f"{wanted}:")}

    shared = {name: from_tensors(part(name)) for name in SHARED}
    return State(**shared, memory=part("memory"), version=int(str(facts["version"])), digest=str(facts["digest"]))
