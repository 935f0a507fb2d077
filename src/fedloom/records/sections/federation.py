"""[federation]: rounds, attendance, weights, and what is refused."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from fedloom.records.quantities import MOST_CLIENTS, MOST_COUNT, MOST_STEPS, Examples, Name, Probability, Text
from fedloom.records.sections.section import Section

MOST_EXPONENT = 100.0
"""Of the weight of a stale update: beyond it one that is a single version old counts for nothing."""
Pace: TypeAlias = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class FederationSettings(Section):
    """Rounds and attendance, with the names of Flower."""

    num_rounds: int = Field(20, ge=1, le=MOST_STEPS, description="Rounds of the run.")
    num_clients: int | None = Field(
        None,
        ge=1,
        le=MOST_CLIENTS,
        description="Clients; needed to split one source, otherwise as many as are found.",
        examples=[4],
    )
    participants: Annotated[tuple[Name, ...], Field(strict=False, min_length=1, max_length=MOST_CLIENTS)] | None = (
        Field(
            None,
            description="Clients that take part, by name; otherwise all that are found.",
            examples=[["bank", "lab"]],
        )
    )
    regions: (
        Annotated[int, Field(ge=1, le=MOST_CLIENTS)]
        | Annotated[
            dict[Name, Annotated[tuple[Name, ...], Field(strict=False, min_length=1, max_length=MOST_CLIENTS)]],
            Field(min_length=1, max_length=MOST_CLIENTS),
        ]
        | None
    ) = Field(
        None,
        description="Regional servers between the clients and the root, each of which sums its clients' updates: how "
        "many, of neighbours by name, or each region's clients. Otherwise one server has all clients. For methods "
        "whose updates add; simulations only.",
        examples=[{"north": ["bank", "lab"], "south": ["clinic"]}],
    )
    fraction_train: float = Field(1.0, gt=0, le=1, description="Share of the clients sampled in a round.")
    drop_out: Probability = Field(0.0, description="Probability that a sampled client does not answer.")
    weighting: Literal["examples", "uniform"] = Field("examples", description="Weight of a client in the average.")
    module_weighting: Literal["holders", "all"] = Field(
        "holders",
        description="Average of a module that some clients do not train: over the clients that do, or over all, those "
        "that do not with the weights they have.",
    )
    consolidate_every: int = Field(
        0,
        ge=0,
        le=MOST_COUNT,
        description="Rounds between recompressions of the merged increments; everyone then receives the full state. "
        "Saves bytes where clients miss many rounds; 0 for never.",
    )
    consolidate_energy: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the squared singular values that a recompression keeps, module by module.",
    )
    max_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the average that one client may have, however many examples it says it has; the others "
        "get what is over. Of K clients each may have 1/K at least.",
    )
    client_examples: Examples = Field(
        {}, description="Client → its number of examples, where you know better than to take what it says."
    )
    max_norm: float = Field(1e6, gt=0, description="An update is refused whose norm is over this.")
    max_norm_ratio: float = Field(
        100.0,
        gt=1,
        description="An update is refused whose norm is over so many times the round's median, in a round of three "
        "updates or more.",
    )
    max_examples: int | None = Field(
        None,
        ge=1,
        le=MOST_COUNT,
        description="Examples that a client counts for at most, however many it says it has; otherwise any number.",
        examples=[5000],
    )
    robust: Literal["none", "clip", "geometric_median", "trimmed", "multi_krum"] = Field(
        "none",
        description="How the shares of a round are bent so that a liar moves the model little: clip cuts the share of "
        "an update that is too large, geometric_median counts those less that lie far from the rest as well, trimmed "
        "and multi_krum leave the farthest out (docs/robust.md).",
    )
    num_malicious_clients: int | None = Field(
        None,
        ge=1,
        le=MOST_CLIENTS,
        description="Robust: liars in a round that are reckoned with; otherwise one of every four clients.",
        examples=[1],
    )
    clip_ratio: float = Field(
        1.5,
        ge=1,
        le=1e6,
        description="Robust: an update whose norm is over so many times the round's median loses the square of that of "
        "its share, so that nobody has more say for sending more.",
    )
    public: Text | None = Field(
        None,
        description="File of examples that the server holds, such as ./public.jsonl: the base model is scored on them "
        "with each client's update left out, and a client that makes it worse is refused for the round.",
        examples=["./public.jsonl"],
    )
    public_tolerance: float = Field(
        0.02,
        ge=0,
        le=1e6,
        description="Public: share of the error on these examples that a client may do harm before it is refused.",
    )
    mode: Literal["synchronous", "buffered"] = Field(
        "synchronous",
        description="What a round is: a turn of everybody who is asked, or, buffered, a step that the server takes "
        "once buffer_size updates have come in, while everybody trains on: no site waits for a slower one.",
    )
    buffer_size: int | None = Field(
        None,
        ge=1,
        le=MOST_CLIENTS,
        description="Buffered: updates that make a step, one of each client; otherwise half as many as clients train "
        "at once.",
        examples=[2],
    )
    staleness_exponent: float = Field(
        0.5,
        ge=0,
        le=MOST_EXPONENT,
        description="Buffered: an update that was begun t versions ago counts (1 + t)^-this; 0 counts all alike.",
    )
    max_staleness: int = Field(
        100, ge=0, le=MOST_COUNT, description="Buffered: an update that was begun more versions ago is refused."
    )
    pace: Annotated[dict[Name, Pace], Field(max_length=MOST_CLIENTS)] = Field(
        {},
        description="Buffered, in a simulation: client → how long its turn takes, where that of the others takes 1.",
        examples=[{"bank": 10.0}],
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Fixes everything random: split, sampling, masks, order of examples."
    )
    eval_every: int = Field(
        1, ge=0, le=MOST_COUNT, description="Rounds between evaluations; 0 evaluates at the start and end only."
    )
    early_stopping_patience: int | None = Field(
        None,
        ge=1,
        le=MOST_COUNT,
        description="Evaluations in a row without a better score on data.validation after which the run ends; "
        "otherwise it plays all rounds.",
        examples=[3],
    )
    early_stopping_threshold: float = Field(0.0, ge=0, description="A score is better by more than this only.")
    metric_for_best_model: Literal["loss", "exact_match"] = Field(
        "loss", description="Score on data.validation that stops a run and finds its best round; mean over domains."
    )
    load_best_model_at_end: bool = Field(
        False,
        description="End with the model of the round with the best score on data.validation: all clients receive it, "
        "and adapter/ is it.",
    )

    @property
    def validates(self) -> bool:
        """Whether the validation split is scored at all: that takes time."""
        return self.early_stopping_patience is not None or self.load_best_model_at_end

    def clients_per_round(self, clients: int) -> int:
        """How many of so many clients are asked in a round."""
        return max(1, int(self.fraction_train * clients + 0.5))

    def updates_per_step(self, clients: int) -> int:
        """How many updates make a step of the server, in asynchronous rounds of so many clients."""
        return self.buffer_size or max(1, self.clients_per_round(clients) // 2)
