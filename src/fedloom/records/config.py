"""Every setting of a run: one tree of records, whose field names are the keys of the TOML file.

Keys follow PEFT, transformers and Flower. What a key means, its default and its limits stand here and
nowhere else: `fedloom init`, `--set` and every error message read them from these records
(`fedloom.records.configfile`). The settings of a method are its builder's keyword arguments and are checked there.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedloom.records.quantities import (
    MOST_CLIENTS,
    MOST_COUNT,
    MOST_STEPS,
    Alpha,
    Alphas,
    BudgetText,
    Examples,
    Name,
    Probability,
    Rank,
    Ranks,
    Scalar,
    TargetModules,
    Text,
)

_NEEDED = {
    "iid": (("federation", "num_clients"),),
    "dirichlet": (("federation", "num_clients"), ("data", "label_column")),
    "shards": (("federation", "num_clients"), ("data", "label_column")),
    "natural": (("data", "id_column"),),
}
"""Partitioner → the settings that it cannot do without."""


class Section(BaseModel):
    """A table of the TOML file: no unknown keys, no silent conversions, nothing changed after it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSettings(Section):
    """The frozen base model."""

    path: Text = Field("./model", description="Base model: a Hugging Face folder with a causal LM, or a Hub name.")
    adapter: Text | None = Field(
        None, description="PEFT adapter folder to go on from, instead of a fresh adapter.", examples=["./adapter"]
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Type of the base weights.")
    quantization: Literal["none", "8bit", "4bit"] = Field("none", description="Base weights in 8 or 4 bits (GPU).")
    threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="CPU threads of torch; a small model is fastest with 1. Sites of a federation have their own.",
        examples=[1],
    )
    device: Name = Field("auto", description='"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1" …')


class LoraSettings(Section):
    """The adapter, with the names of peft.LoraConfig."""

    r: Rank = Field(16, description="Rank of the adapter.")
    lora_alpha: Alpha = Field(32.0, description="Scale of the adapter: ΔW = (lora_alpha / r) B A.")
    target_modules: TargetModules = Field(
        "all-linear", description='Modules to adapt: "all-linear", or a list such as ["q_proj", "v_proj"].'
    )
    lora_dropout: Probability = Field(0.0, description="Dropout before A, while training.")
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead of lora_alpha / r.")
    rank_pattern: Ranks = Field({}, description="Module name (or its end) → rank, where it is not r.")
    alpha_pattern: Alphas = Field({}, description="Module name (or its end) → alpha, where it is not lora_alpha.")


class ClientSettings(Section):
    """What one client has otherwise than [lora] says."""

    r: Rank | None = None
    lora_alpha: Alpha | None = None
    target_modules: TargetModules | None = None
    lora_dropout: Probability | None = None
    use_rslora: bool | None = None
    rank_pattern: Ranks | None = None
    alpha_pattern: Alphas | None = None


class DataSettings(Section):
    """Where the examples are and who holds which."""

    source: Text = Field(
        "./data/{client}",
        description="Folder, JSONL or Parquet file, or Hub name. {client} stands for each client's name. A path that "
        "begins with ./ or ../ counts from the folder of this file.",
    )
    template: Name = Field("alpaca", description="How an example becomes a prompt and a completion.")
    max_length: int = Field(512, ge=8, le=2**20, description="Tokens of an example, at most; longer ones are cut.")
    partitioner: Literal["files", "iid", "dirichlet", "shards", "natural"] = Field(
        "files",
        description="Who holds which examples: one file or folder a client, or one source that is shuffled and split: "
        "evenly (iid), skewed by label (dirichlet), few labels each (shards), or by id (natural).",
    )
    dirichlet_alpha: float = Field(0.5, gt=0, description="Skew of the dirichlet partitioner; smaller is more skewed.")
    label_column: Text | None = Field(
        None, description="Column that dirichlet and shards split by.", examples=["topic"]
    )
    id_column: Text | None = Field(None, description="Column whose values are the natural clients.", examples=["site"])
    heldout: Text | None = Field(
        None,
        description="Split that scores are taken on, such as heldout for heldout.jsonl in each client's folder.",
        examples=["heldout"],
    )
    validation: Text | None = Field(
        None, description="Split for choosing settings, never for scores.", examples=["validation"]
    )


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
    seed: int = Field(
        0, ge=0, lt=2**63, description="Fixes everything random: split, sampling, masks, order of examples."
    )
    eval_every: int = Field(
        1, ge=0, le=MOST_COUNT, description="Rounds between evaluations; 0 evaluates at the start and end only."
    )

    def clients_per_round(self, clients: int) -> int:
        """How many of so many clients are asked in a round."""
        return max(1, int(self.fraction_train * clients + 0.5))


class TrainingSettings(Section):
    """One client's local training in one round, with the names of transformers.TrainingArguments."""

    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    max_steps: int = Field(10, ge=1, le=MOST_STEPS, description="Optimiser steps of a client in a round.")
    per_device_train_batch_size: int = Field(8, ge=1, le=2**16, description="Examples in a forward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, le=2**16, description="Forward passes in an optimiser step.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course of the learning rate over all rounds of the run."
    )
    warmup_ratio: Probability = Field(0.0, description="Share of all steps in which the learning rate rises.")
    warmup_steps: int = Field(0, ge=0, le=MOST_COUNT, description="The same as a number of steps; give one of the two.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 leaves them.")
    bf16: bool = Field(False, description="Compute in bfloat16.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    optim: Name = Field("adamw_torch", description="Optimiser; a fresh one in every round.")


class MethodSettings(BaseModel):
    """The federated method. Keys beyond these two are the method's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    __pydantic_extra__: dict[str, Scalar] = Field(init=False)

    name: Name = Field(
        "fedsrd",
        description="Method; `fedloom methods` lists them with their settings. One of another package is called "
        '"package.module:builder".',
    )
    preset: Name | None = Field(None, description="Named group of its settings.", examples=["paper"])

    @property
    def settings(self) -> dict[str, Scalar]:
        """What `build` takes beside the name: the method's own keys, and the preset if one is named."""
        named: dict[str, Scalar] = {} if self.preset is None else {"preset": self.preset}
        return named | (self.__pydantic_extra__ or {})


Values = Literal["auto", "fp32", "bf16", "fp16", "int8", "int4", "sign", "int8-stochastic", "int4-stochastic"]


class WireSettings(Section):
    """How values travel."""

    values: Values = Field(
        "auto",
        description="Form of values in payloads: fp32 loses nothing; auto is the smallest that costs the method less "
        "than a point (docs/benchmarks/methods.md).",
    )
    budget: BudgetText | None = Field(
        None,
        description="What one client's payload of a round may take, for methods that choose how much they send: bytes, "
        'or a share of the dense fp32 update such as "1%". loom keeps to it on the mean of both ways.',
        examples=["8MiB"],
    )


class FlowerSettings(Section):
    """A federation on Flower (`fedloom run --engine flower` or `flower-sim`). Every time is in seconds."""

    superlink: str = Field("127.0.0.1:8000", description="Address of the SuperLink.")
    root_certificates: str | None = Field(
        None, description="Certificate of the CA that signed the SuperLink's own.", examples=["./ca.crt"]
    )
    insecure: bool = Field(False, description="Connect without TLS; for trials on one machine only.")
    min_replies: int = Field(2, ge=1, description="Updates that a round needs.")
    deadline: float = Field(3600.0, gt=0, description="How long a round, or one try of it, waits for updates.")
    grace: float | None = Field(
        None,
        ge=0,
        description="How long it waits for the rest once min_replies are in; otherwise until the deadline.",
        examples=[60.0],
    )
    retries: int = Field(2, ge=0, description="How often the missing are asked again before a run stops.")
    sim_cpus: int | None = Field(
        None,
        ge=1,
        description="flower-sim: processes that play sites, each on one CPU with a base model of its own; otherwise "
        "as many as there are CPUs.",
        examples=[4],
    )
    sim_gpus: float | None = Field(
        None,
        ge=0,
        le=1,
        description="flower-sim: share of a GPU that each of these processes gets, 0 to train on the CPU; otherwise 1 "
        "where model.device means a GPU.",
        examples=[0.25],
    )


class OutputSettings(Section):
    """What a run leaves behind."""

    dir: str | None = Field(
        None, description="Run folder; otherwise runs/<name of this file>.", examples=["runs/first-try"]
    )
    keep_payloads: bool = Field(False, description="Keep every payload, for `fedloom inspect`.")
    max_rank: int | None = Field(
        None, ge=1, description="Rank of the exported adapter, at most; the energy lost is reported.", examples=[64]
    )


class Config(Section):
    """All settings of one run."""

    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    federation: FederationSettings = FederationSettings()
    training: TrainingSettings = TrainingSettings()
    method: MethodSettings = MethodSettings()
    wire: WireSettings = WireSettings()
    flower: FlowerSettings = FlowerSettings()
    output: OutputSettings = OutputSettings()
    clients: Annotated[dict[Name, ClientSettings], Field(max_length=MOST_CLIENTS)] = {}

    def lora_of(self, client: str) -> LoraSettings:
        """The adapter settings of one client: [lora] with what [clients.<name>] sets over it."""
        own = self.clients.get(client, ClientSettings())
        return self.lora.model_copy(update=own.model_dump(exclude_none=True))

    @model_validator(mode="after")
    def _keys_agree(self) -> Config:
        """Keys that need or exclude one another."""
        for section, key in _NEEDED.get(self.data.partitioner, ()):
            if getattr(getattr(self, section), key) is None:
                raise ValueError(f"{section}.{key} is missing: data.partitioner = {self.data.partitioner!r} needs it")
        if self.training.warmup_ratio and self.training.warmup_steps:
            raise ValueError("training.warmup_ratio and training.warmup_steps are both set; give one of them")
        return self
