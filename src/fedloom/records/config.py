"""Every setting of a run: one tree of records, whose field names are the keys of the TOML file.

Keys follow PEFT, transformers and Flower. What a key means, its default and its limits stand here and
nowhere else: `fedloom init`, `--set` and every error message read them from these records
(`fedloom.records.configfile`). The settings of a method are its builder's keyword arguments and are checked there.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from fedloom.records.quantities import MOST_CLIENTS, Name
from fedloom.records.sections.data import DataSettings
from fedloom.records.sections.federation import FederationSettings
from fedloom.records.sections.flower import FlowerSettings
from fedloom.records.sections.method import MethodSettings, Values, WireSettings
from fedloom.records.sections.model import ClientSettings, LoraSettings, ModelSettings
from fedloom.records.sections.output import OutputSettings
from fedloom.records.sections.section import Section
from fedloom.records.sections.training import TrainingSettings

__all__ = [
    "ClientSettings",
    "Config",
    "DataSettings",
    "FederationSettings",
    "FlowerSettings",
    "LoraSettings",
    "MethodSettings",
    "ModelSettings",
    "OutputSettings",
    "Section",
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
        if not self.lora.target_modules and not self.lora.target_parameters:
            raise ValueError(
                "lora.target_modules is []; expected 'all-linear' or at least 1, where lora.target_parameters is unset"
            )
        if self.training.warmup_ratio and self.training.warmup_steps:
            raise ValueError("training.warmup_ratio and training.warmup_steps are both set; give one of them")
        return self
