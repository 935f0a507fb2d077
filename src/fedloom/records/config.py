"""Every setting of a run: one tree of records, whose field names are the keys of the TOML file.

Keys follow PEFT, transformers and Flower. What a key means, its default and its limits stand here and
nowhere else: `fedloom init`, `--set` and every error message read them from these records
(`fedloom.records.configfile`). The settings of a method are its builder's keyword arguments and are checked there.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from fedloom.records.quantities import MOST_CLIENTS, Name
from fedloom.records.sections.data import DataSettings, Source
from fedloom.records.sections.evaluation import EvaluationSettings
from fedloom.records.sections.federation import FederationSettings
from fedloom.records.sections.flower import FlowerSettings
from fedloom.records.sections.local import LocalSettings
from fedloom.records.sections.method import MethodSettings, Values, WireSettings
from fedloom.records.sections.model import ClientSettings, LoraSettings, ModelSettings
from fedloom.records.sections.output import OutputSettings
from fedloom.records.sections.privacy import PrivacySettings
from fedloom.records.sections.section import Section
from fedloom.records.sections.training import TrainingSettings

__all__ = [
    "ClientSettings",
    "Config",
    "DataSettings",
    "EvaluationSettings",
    "FederationSettings",
    "FlowerSettings",
    "LocalSettings",
    "LoraSettings",
    "MethodSettings",
    "ModelSettings",
    "OutputSettings",
    "PrivacySettings",
    "Section",
    "Source",
    "TrainingSettings",
    "Values",
    "WireSettings",
]

_NEEDED = {
    "iid": (("federation", "num_clients"),),
    "dirichlet": (("federation", "num_clients"), ("data", "label_column")),
    "shards": (("federation", "num_clients"), ("data", "label_column")),
    "natural": (("data", "id_column"),),
}
"""Partitioner → the settings that it cannot do without."""
_STEPS = ("max_steps", "num_train_epochs")
"""Settings of which one says how long a client trains in a round."""


def _check_steps(config: Config) -> None:
    """Raises ValueError where both of the two are set, or none."""
    tables: dict[str, TrainingSettings | ClientSettings] = {"training": config.training}
    for place, table in (tables | {f"clients.{name}": own for name, own in config.clients.items()}).items():
        steps, epochs = (f"{place}.{key}" for key in _STEPS)
        if table.max_steps is not None and table.num_train_epochs is not None:
            raise ValueError(f"{steps} and {epochs} are both set; give one of them (--set {steps}=null unsets a key)")
    if config.training.max_steps is None and config.training.num_train_epochs is None:
        raise ValueError("training.max_steps is missing: give it, or training.num_train_epochs")


def _check_validation(config: Config) -> None:
    """Raises ValueError where a run shall be judged on a validation split that there is not, or that is not scored."""
    federation = config.federation
    if not federation.validates:
        return
    early = federation.early_stopping_patience is not None
    asking = f"federation.{'early_stopping_patience' if early else 'load_best_model_at_end'}"
    if config.data.validation is None:
        raise ValueError(f"data.validation is missing: {asking} needs a split to choose on that no score is taken on")
    if not federation.eval_every:
        raise ValueError(f"federation.eval_every is 0: {asking} needs evaluations on the way; set it to 1 or more")


def _check_mode(config: Config) -> None:
    """Raises ValueError where settings of asynchronous rounds are set and the rounds are synchronous."""
    federation = config.federation
    for key in ("buffer_size", "pace"):
        if getattr(federation, key) and federation.mode != "buffered":
            raise ValueError(f"federation.{key} does nothing in synchronous rounds: set federation.mode = 'buffered'")


def _check_sum_noise(config: Config) -> None:
    """Raises ValueError where noise would be added to a sum that there is not, or that tells more than it hides."""
    if config.privacy.noise_multiplier is None:
        return
    if not config.privacy.secure_aggregation:
        raise ValueError(
            "privacy.noise_multiplier is of the noise in a secure sum: set privacy.secure_aggregation to true; noise "
            "of a site's own is set at the site (policy.privacy)"
        )
    if config.federation.weighting != "uniform":
        raise ValueError(
            "privacy.noise_multiplier needs federation.weighting = 'uniform': the sum would tell how many examples the "
            "sites hold together, and no noise is on that"
        )


def _check_dp(config: Config) -> None:
    """Raises ValueError where settings take away what noise on single examples promises."""
    if config.training.dp is None:
        return
    if config.data.packing:
        raise ValueError(
            "training.dp and data.packing = true exclude each other: the gradient of a packed row is that of several "
            "examples; set data.packing to false"
        )
    if config.training.dp.epsilon is not None and config.federation.mode == "buffered":
        raise ValueError(
            "training.dp.epsilon needs synchronous rounds: in asynchronous ones nobody knows how often a site will "
            "train; give training.dp.noise_multiplier, and limit ε at the sites (policy.example_privacy)"
        )
    if config.training.dp.rounds is not None and config.federation.mode == "buffered":
        raise ValueError(
            "training.dp.rounds needs synchronous rounds: in asynchronous ones every site trains all the time. Leave "
            "it out, and limit ε at the sites (policy.example_privacy)"
        )


class Config(Section):
    """All settings of one run."""

    model: ModelSettings = ModelSettings()
    lora: LoraSettings = LoraSettings()
    data: DataSettings = DataSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    federation: FederationSettings = FederationSettings()
    training: TrainingSettings = TrainingSettings()
    privacy: PrivacySettings = PrivacySettings()
    method: MethodSettings = MethodSettings()
    wire: WireSettings = WireSettings()
    local: LocalSettings = LocalSettings()
    flower: FlowerSettings = FlowerSettings()
    output: OutputSettings = OutputSettings()
    clients: Annotated[dict[Name, ClientSettings], Field(max_length=MOST_CLIENTS)] = {}

    def lora_of(self, client: str) -> LoraSettings:
        """The adapter settings of one client: [lora] with what [clients.<name>] sets over it."""
        return self.lora.model_copy(update=self._own(client, LoraSettings))

    def training_of(self, client: str) -> TrainingSettings:
        """The training settings of one client: [training] with what [clients.<name>] sets over it."""
        own = self._own(client, TrainingSettings)
        # One of the two in place of the other, whichever [training] has.
        unset = dict.fromkeys(_STEPS) if own.keys() & set(_STEPS) else {}
        return self.training.model_copy(update={**unset, **own})

    @property
    def turns_of_client(self) -> int:
        """In how many rounds of the run a client trains at most: fewer than all where training.dp says so."""
        rounds = self.federation.num_rounds
        return rounds if self.training.dp is None else self.training.dp.turns_of(rounds)

    def _own(self, client: str, section: type[Section]) -> dict[str, Any]:
        """What [clients.<name>] says of the keys of a section."""
        own = self.clients.get(client, ClientSettings()).model_dump(exclude_none=True)
        return {key: value for key, value in own.items() if key in section.model_fields}

    @model_validator(mode="after")
    def _keys_agree(self) -> Config:
        """Keys that need or exclude one another."""
        for section, key in _NEEDED.get(self.data.partitioner, ()):
            if getattr(getattr(self, section), key) is None:
                raise ValueError(f"{section}.{key} is missing: data.partitioner = {self.data.partitioner!r} needs it")
        if self.data.source and self.data.sources is not None:
            raise ValueError(
                "data.source and data.sources are both set; give one of them (--set data.sources=null unsets a key)"
            )
        if self.data.partitioner == "natural" and self.federation.num_clients is not None:
            raise ValueError(
                "federation.num_clients and data.partitioner = 'natural' exclude each other: there are as many clients "
                "as data.id_column has values; leave num_clients out, or choose some with federation.participants"
            )
        decided = self.evaluation.metric
        if decided not in ("auto", "exact_match", "loss", *self.evaluation.metrics):
            raise ValueError(
                f"evaluation.metric is {decided!r}, which is not measured: expected auto, exact_match, loss, or one of "
                f"evaluation.metrics ({', '.join(self.evaluation.metrics) or 'none'})"
            )
        if not self.lora.target_modules and not self.lora.target_parameters:
            raise ValueError(
                "lora.target_modules is []; expected 'all-linear' or at least 1, where lora.target_parameters is unset"
            )
        if self.training.warmup_ratio and self.training.warmup_steps:
            raise ValueError("training.warmup_ratio and training.warmup_steps are both set; give one of them")
        if self.wire.budget and self.wire.client_budget:
            raise ValueError(
                "wire.budget and wire.client_budget are both set: one is of a payload, the other of the whole run; "
                "give one of them (--set wire.budget=null unsets a key)"
            )
        _check_steps(self)
        _check_validation(self)
        _check_mode(self)
        _check_dp(self)
        _check_sum_noise(self)
        return self
