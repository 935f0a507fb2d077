"""An adapter on the Hugging Face Hub: the files of its own and no others, in a repository that is private by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fedloom.adapters.merge.companions import TOKENIZER
from fedloom.adapters.settings import CONFIG_FILE, WEIGHTS_FILE
from fedloom.errors import ConfigError, FedloomError, HubError, ModelError
from fedloom.records.text import to_printable
from fedloom.report.card_header import HUB, hub_name

CARD = "README.md"
OWN = (CONFIG_FILE, WEIGHTS_FILE, "adapter_model-*.safetensors", "adapter_model.safetensors.index.json", CARD)
MORE = (*TOKENIZER, "LICENSE*", "NOTICE*", "adapter*.gguf")
"""What else belongs to an adapter. State, data, ledgers and payloads do not, whatever they are called."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a push would do. files: in order of name; left_out: names of what lies there and is not pushed.

    config: adapter_config.json as it is pushed, without a path of this machine. warnings: what to know before.
    """

    folder: Path
    repo: str
    files: tuple[Path, ...]
    left_out: tuple[str, ...]
    config: bytes
    card: str
    warnings: tuple[str, ...]


def plan_push(path: Path, repo: str) -> Plan:
    """What would be pushed of a run's adapter/ or of an adapter's folder; no network is used.

    Raises ConfigError for a name that is none of a repository, ModelError where there is no adapter.
    """
    if not HUB.fullmatch(repo):
        raise ConfigError(f"{repo}: expected a repository as OWNER/NAME")
    run = path / "ledger.jsonl"
    folder = path / "adapter" if run.is_file() else path
    if not (folder / CONFIG_FILE).is_file() or not any(folder.glob("adapter_model*.safetensors")):
        raise ModelError(
            f"{folder} holds no adapter ({CONFIG_FILE} and {WEIGHTS_FILE})"
            + ("; the run has not ended with one" if run.is_file() else "")
        )
    held = sorted(folder.iterdir())
    files = tuple(file for file in held if _belongs(file))
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""
    config, warnings = _read_config(folder / CONFIG_FILE)
    if not card:
        warnings.append("there is no README.md: the Hub will show no model card")
    elif "ε =" not in card:
        warnings.append("the card states no ε: what the adapter remembers of the data is not bounded")
    left_out = tuple(file.name + "/" * file.is_dir() for file in held if file not in files)
    return Plan(folder, repo, files, left_out, config, card, tuple(warnings))


def _belongs(file: Path) -> bool:
    """Whether a file is the adapter's own; a link is not, since it may lead anywhere."""
    known = any(fnmatchcase(file.name, name) for name in (*OWN, *MORE))
    return known and file.is_file() and not file.is_symlink()


def _read_config(path: Path) -> tuple[bytes, list[str]]:
    """(adapter_config.json as it is pushed, what to know of it): a path becomes a name."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        base = str(held.get("base_model_name_or_path") or "")
    except (OSError, UnicodeDecodeError, ValueError, AttributeError):
        raise ModelError(f"{path} cannot be read as JSON") from None
    name = hub_name(base)
    if name == base:
        return path.read_bytes(), []
    told = name or re.split(r"[\\/]", base.rstrip("\\/"))[-1]
    text = json.dumps({**held, "base_model_name_or_path": told}, indent=2, sort_keys=True)
    note = f"its base model is a folder of this machine, and is called {told!r} there: readers must know which it is"
    return text.encode(), [] if name else [note]


def push_adapter(
    plan: Plan,
    *,
    public: bool = False,
    message: str = "Upload a LoRA adapter",
    branch: str = "main",
    endpoint: str = "",
) -> str:
    """Make the repository if need be and commit the files; the address of the commit.

    endpoint: of another Hub than the usual one. Raises HubError where there is no token or no network, where the Hub
    refuses, and for a repository that is public already unless that is asked for.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if not get_token():
        raise HubError("the Hub needs a token that may write: log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=endpoint or None)
    with _explained(plan.repo):
        api.create_repo(plan.repo, private=not public, exist_ok=True)
        if not public and not api.model_info(plan.repo).private:
            raise HubError(f"{plan.repo} is public already: add --public if that is meant, or choose another name")
        if branch != "main":
            api.create_branch(plan.repo, branch=branch, exist_ok=True)
        operations = [
            CommitOperationAdd(file.name, plan.config if file.name == CONFIG_FILE else file) for file in plan.files
        ]
        done = api.create_commit(plan.repo, operations, commit_message=message, revision=branch)
    return str(done.commit_url)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn what the Hub's library raises into one line."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {401: "the token is not valid", 403: "the token may not write there", 404: "there is no such place"}
        raise HubError(f"the Hub refuses {repo}: {reasons.get(status) or str(error)}") from None
    except FedloomError:
        raise
    except Exception as error:  # its releases rest on different network libraries, each with errors of its own
        words = to_printable(str(error) or type(error).__name__)
        raise HubError(f"the Hub cannot be reached ({words}): nothing was pushed to {repo}") from None
