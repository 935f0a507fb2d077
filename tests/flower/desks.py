"""A federation without processes: the ServerApp's rounds against real desks, over a grid that tests can disturb.

Model and training are made up (tests/toy.py), so that a round takes milliseconds; everything else is the real thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import toy
from fedloom.flower import relay as client
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.flower.settings import shared_settings
from fedloom.lora.pair import LoraPair
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.model.examples import Example
from fedloom.model.placement import Adapter, Placement
from fedloom.model.tokens import TokenizedExamples
from fedloom.noise.stream import SecretStream
from fedloom.records.config import Config, LoraSettings
from fedloom.records.configfile import load_config
from fedloom.rounds.step import Train, Trained
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy
from fedloom.workspace.assemble import LocalClient, Setup
from fedloom.workspace.plan import caps_of, robust_of
from fedloom.workspace.privacy import plan_sums

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
SITES = ("bank", "depot", "lab")
SHORT = (
    "federation.num_rounds=3",
    f"federation.participants={list(SITES)}",
    "flower.deadline=1.5",
    "flower.retries=1",
    "data.heldout=null",
)
LOST = Error(5, "the node is unavailable")
LATE = object()


def settings(*overrides: str) -> Config:
    return load_config(TESTBED / "demo.toml", [*SHORT, *overrides])


def site(name: str, folder: Path, policy: Policy | None = None) -> SiteConfig:
    """order = "run", so that bytes can be compared with the local engine's."""
    return SiteConfig(
        name=name,
        model=str(TESTBED / "model"),
        data=str(examples(folder)),
        device="cpu",
        state=str(folder / name),
        socket=str(folder / f"{name}.sock"),
        token_file=str(folder / f"{name}.token"),
        policy=policy or Policy(order="run"),
    )


def examples(folder: Path) -> Path:
    """A file of data that is quick to read; the made-up step does not look at it."""
    path = folder / "examples.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' * 3)
    return path


class ToySetup(Setup):
    """A setup whose training step is a seeded random change, with noise from the site's key where a run asks for it."""

    def train(self, client: str, interrupt: Callable[[], None] | None = None) -> Train:
        step = toy.trainer(self.job.method)

        def train(state: State, round: int, seed: int) -> Trained:
            if interrupt:
                interrupt()
            trained, private = step(state, round, seed), self.private_round(client, state, round, seed)
            if private is None:
                return trained
            stream = SecretStream(private.key)

            def hide(tensor: torch.Tensor) -> torch.Tensor:
                return tensor + 0.01 * torch.from_numpy(stream.normal(tensor.numel())).view(tensor.shape).float()

            hidden = trained.adapter.map(lambda pair: LoraPair(hide(pair.A), hide(pair.B)))
            return replace(trained, adapter=hidden, loss=float("nan"))

        return train

    def evaluate(self, state: object) -> dict:
        return {}

    def public_error(self, state: State, bend: float) -> float:
        size = sum(float(tensor.double().square().sum()) for tensor in state.total.tensors().values())
        return size / (1.0 + size)


def assemble(config: Config, texts: Mapping[str, list[Example]], heldout: object, load: object = None) -> ToySetup:
    """Stands for assemble.build_setup; loads nothing."""
    job = toy.job(build(config.method.name, config.method.settings), seed=config.federation.seed)
    placed = {name: Placement(shape, toy.RANK, 32.0) for name, shape in toy.SHAPES.items()}
    adapter = Adapter(LoraSettings(r=toy.RANK), placed)
    sites = {name: LocalClient(adapter, TokenizedExamples(tuple(held), 0)) for name, held in texts.items()}
    ranks = {name: held.ranks for name, held in sites.items()}
    job = replace(
        job,
        caps=caps_of(config.federation, sites),
        robust=robust_of(config, sites),
        ranks=ranks,
        secure=plan_sums(config, job.method, ranks),
    )
    return ToySetup(config, job, None, adapter, toy.initial(), sites, None, "toy")


@dataclass
class FakeNode:
    node_id: int
    desk: Desk
    status: str = "online"
    name: str = ""
    last_activated_at: str = "first start"


Disturb = Callable[[FakeNode, str, int, Parcel], object]


@dataclass
class DeskGrid:
    """What Flower would carry is handed over here.

    disturb(node, ask, round, reply) says what becomes of a reply: the same or another parcel, an Error, None (it is
    lost), LATE (it arrives in the next round) or anything else (it arrives as it is).
    """

    config: Config
    folder: Path
    disturb: Disturb | None = None
    policies: Mapping[str, Policy] = field(default_factory=dict)
    nodes: list[FakeNode] = field(default_factory=list)
    arriving: list[tuple[int, str, Message]] = field(default_factory=list)
    round: int = 0
    log: list[tuple[str, str, int]] = field(default_factory=list)
    carried: list[tuple[str, str, int]] = field(default_factory=list)  # (site, "up" or "down", bytes)

    def __post_init__(self) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # what Flower's runtime sets
        for number, name in enumerate(SITES, start=101):
            self.nodes.append(FakeNode(number, Desk(site(name, self.folder, self.policies.get(name)))))

    def node(self, name: str) -> FakeNode:
        return next(node for node in self.nodes if node.desk.site.name == name)

    def get_nodes(self) -> list[FakeNode]:
        return [FakeNode(**vars(node)) for node in self.nodes]

    def push_messages(self, messages: list[Message]) -> list[str]:
        return [self.handed(message) for message in messages]

    def handed(self, message: Message) -> str:
        identifier = message.object_id
        message.metadata.__dict__.update(_message_id=identifier, _run_id=1, _src_node_id=1)
        node = next(node for node in self.nodes if node.node_id == message.metadata.dst_node_id)
        parcel = unpack_parcel(message.content)
        self.carried.append((node.desk.site.name, "down", sum(map(len, parcel.payloads))))
        facts = parcel.facts
        asked = (str(facts["ask"]), int(facts["round"]))
        self.log.append((node.desk.site.name, *asked))
        context = Context(1, node.node_id, {}, RecordDict(), {"settings": shared_settings(self.config)})
        reply = client.relay(message, context, lambda parcel, _: node.desk.answer(parcel))
        outcome = self.disturb(node, *asked, unpack_parcel(reply.content)) if self.disturb else "as it is"
        if isinstance(outcome, Parcel | Error):
            reply = Message(pack_parcel(outcome) if isinstance(outcome, Parcel) else outcome, reply_to=message)
        if outcome is not None:
            self.arriving.append((asked[1] + (outcome is LATE), identifier, reply))
        self.round = asked[1]
        return identifier

    def pull_messages(self, message_ids: list[str]) -> list[Message]:
        due = [item for item in self.arriving if item[0] <= self.round and item[1] in message_ids]
        self.arriving = [item for item in self.arriving if item not in due]
        return [reply for _, _, reply in due]

    def close(self) -> None:
        for node in self.nodes:
            for place in node.desk.places:
                place.store.close()  # release() would also collect the garbage of a whole test session
