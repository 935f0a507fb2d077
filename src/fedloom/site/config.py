"""SITE.toml: what one site lends to federations, and on which conditions."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from fedloom.errors import ConfigError
from fedloom.records.config import DataSettings, Section
from fedloom.records.configfile import explain
from fedloom.records.quantities import MOST_CLIENTS, Bytes, Name
from fedloom.records.sections.data import Columns
from fedloom.site.rules import Policy

PATHS = ("model", "data", "state", "socket", "token_file")
NODE_PATHS = ("root_certificates", "key", "state")
"""Keys that are paths; those that are not absolute count from the folder of the file."""


Peers = Annotated[dict[Name, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]], Field(max_length=MOST_CLIENTS)]


class NodeSettings(Section):
    """How `fedloom node` reaches the SuperLink. A proxy on the way is named by HTTPS_PROXY in its environment."""

    superlink: str = Field(description="host:port of the SuperLink.", examples=["fed.example.org:9443"])
    root_certificates: str = Field("./ca.pem", description="Certificate of the CA that the SuperLink's is from.")
    key: str = Field("./node.key", description="Private key of this site, whose public part the operator registered.")
    state: str = Field("./flwr", description="Folder in which the node may write.")

    @field_validator("superlink")
    @classmethod
    def _is_endpoint(cls, superlink: str) -> str:
        if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}", superlink):
            raise ValueError(f"{superlink!r} is no address; expected host:port, such as fed.example.org:9443")
        return superlink


class SiteConfig(Section):
    """One site. The server learns its name, its number of examples and the digest of its base model."""

    name: str = Field(description="Name of the site, as the server's operator registered it.", examples=["bank"])
    model: str = Field(description="Base model: a Hugging Face folder; every site and the server hold the same one.")
    data: str = Field(
        description="Training examples: a file (JSONL, CSV, Parquet …), or a folder with train.jsonl; docs/data.md "
        "lists what is read."
    )
    columns: Columns = Field(
        {}, description="This site's names for the columns that are read; what a run says in data.columns is not used."
    )
    skip_bad_rows: bool = Field(
        False, description="Leave out rows that cannot be read, and log how many, where and why, in place of an error."
    )
    device: str = Field("auto", description='"auto" (a GPU where there is one), "cpu", "cuda", "cuda:1" …')
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of torch; a small model is fastest with 1.", examples=[1]
    )
    state: str = Field("./state", description="Folder for adapter, residuals, ledger and audit record of every job.")
    socket: str = Field("./worker.sock", description="Unix socket on which the worker takes requests.")
    token_file: str = Field(
        "./worker.token", description="File with the secret that a request must show; made on first start, mode 0600."
    )
    socket_group: str | None = Field(
        None,
        description="Group that may use the socket and read the token, where the SuperNode runs as another user.",
        examples=["fedloom-node"],
    )
    max_bytes_request: Bytes = Field(
        "1GiB",
        description="Payload bytes that a request may bring; the worker takes as much memory for it.",
    )
    idle_minutes: float = Field(15.0, gt=0, description="Minutes without work after which the model is dropped.")
    peers: Peers = Field(
        {},
        description="Other sites' public keys, by name, as `fedloom site key` shows them at each of them. Secure sums "
        "are then made with these alone; otherwise with the keys that the server told first.",
    )
    node: NodeSettings | None = None
    policy: Policy = Policy()

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise ValueError(f"{name!r} is not a name; expected up to 64 letters, digits, dots, dashes or underscores")
        return name

    def reading(self) -> DataSettings:
        """How the site's data are read. A run has no say in it: it could have another column learnt."""
        return DataSettings(columns=self.columns, skip_bad_rows=self.skip_bad_rows)


def load_site_config(path: Path) -> SiteConfig:
    """The site that a file describes, its paths made absolute. Raises ConfigError about the first key that is wrong."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `fedloom federation init` writes one for every site") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    _make_absolute(tree, SiteConfig, PATHS, path)
    if isinstance(tree.get("node"), dict):
        _make_absolute(tree["node"], NodeSettings, NODE_PATHS, path)
    try:
        return SiteConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{explain(error)} ({path})") from None


def _make_absolute(tree: dict[str, Any], section: type[Section], keys: Sequence[str], path: Path) -> None:
    """Have paths count from the folder of the file."""
    for key in keys:
        value = tree.get(key, section.model_fields[key].default)
        if isinstance(value, str):
            tree[key] = os.path.normpath(path.absolute().parent / Path(value).expanduser())
