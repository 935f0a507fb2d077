"""`fedloom push` against a Hub on this machine: what arrives there, that it is private, and what is said otherwise."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedloom.adapters.hub import plan_push, push_adapter
from fedloom.adapters.settings import AdapterSettings, save_adapter
from fedloom.cli.main import app
from fedloom.errors import ConfigError, HubError, ModelError
from fedloom.lora.pair import LoraPair, LoraState

REPO = "clinics/adapter"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as a commit of small files takes. It keeps what it is sent."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub: dict = self.server.held
        hub["paths"].append(self.path)
        if self.headers.get("Authorization") != "Bearer right":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            hub["created"] = json.loads(body)
            hub.setdefault("private", hub["created"].get("visibility") == "private")
            self.answer(200, {"url": f"{hub['url']}/{REPO}", "id": REPO})
        elif self.path == "/api/validate-yaml":
            hub["validated"] = json.loads(body)["content"]
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            self.answer(200, {"files": told})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            hub["files"] |= {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            self.answer(200, {"commitUrl": f"{hub['url']}/{REPO}/commit/abc", "commitOid": "abc", "success": True})
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self.server.held["paths"].append(self.path)
        if self.headers.get("Authorization") != "Bearer right":
            self.answer(401, {"error": "Invalid credentials"})
        else:
            self.answer(200, {"id": REPO, "private": self.server.held["private"], "siblings": []})

    def answer(self, status: int, told: dict) -> None:
        content = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *words: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict]:
    monkeypatch.setenv("HF_TOKEN", "right")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.held = {"files": {}, "paths": [], "url": f"http://127.0.0.1:{server.server_port}"}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.held
        server.shutdown()
        thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, with the things beside and within adapter/ that stay at home."""
    folder = tmp_path / "run"
    pair = LoraPair(torch.ones(2, 4), torch.ones(3, 2))
    save_adapter(LoraState({"q_proj": pair}), "/home/me/secret/base", AdapterSettings(2, 4), folder / "adapter")
    (folder / "ledger.jsonl").write_text("{}\n")
    (folder / "adapter" / "README.md").write_text("---\nlibrary_name: peft\n---\n# a card\n")
    (folder / "adapter" / "tokenizer.json").write_text("{}")
    for name in ("examples.jsonl", "state.safetensors", "notes.txt", ".env"):
        (folder / "adapter" / name).write_text("secret")
    (folder / "adapter" / "LICENSE").symlink_to(folder / "ledger.jsonl")
    return folder


def test_the_adapters_own_files_arrive_and_nothing_else(run: Path, hub: dict):
    plan = plan_push(run, REPO)
    assert plan.left_out == (".env", "LICENSE", "examples.jsonl", "notes.txt", "state.safetensors")
    assert push_adapter(plan, endpoint=hub["url"]).endswith(f"{REPO}/commit/abc")
    assert sorted(hub["files"]) == ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert hub["created"]["visibility"] == "private" and hub["created"]["name"] == "adapter"
    assert "# a card" in hub["validated"], "the Hub's own validator sees the card first"
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    assert hub["files"]["adapter_model.safetensors"] == weights
    assert not any(b"secret" in content for content in hub["files"].values()), "nor the path of the base model"
    assert json.loads(hub["files"]["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert (run / "adapter" / "adapter_config.json").read_text().count("/home/me/secret/base") == 1, "here it stays"


def test_a_public_repository_is_pushed_to_only_if_asked(run: Path, hub: dict):
    hub["private"] = False
    with pytest.raises(HubError, match=f"{REPO} is public already: add --public"):
        push_adapter(plan_push(run, REPO), endpoint=hub["url"])
    assert not hub["files"]
    push_adapter(plan_push(run, REPO), public=True, endpoint=hub["url"])
    assert hub["files"] and hub["created"]["visibility"] == "public"


def test_what_goes_wrong_is_one_line(run: Path, hub: dict, monkeypatch: pytest.MonkeyPatch):
    plan = plan_push(run, REPO)
    with pytest.raises(HubError, match="the Hub cannot be reached .*nothing was pushed"):
        push_adapter(plan, endpoint="http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(HubError, match="the token is not valid"):
        push_adapter(plan, endpoint=hub["url"])
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(HubError, match="hf auth login"):
        push_adapter(plan, endpoint=hub["url"])
    with pytest.raises(ConfigError, match="expected a repository as OWNER/NAME"):
        plan_push(run, "adapter")
    (run / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="the run has not ended with one"):
        plan_push(run, REPO)


def test_a_dry_run_shows_files_sizes_and_card_and_asks_nobody(run: Path, hub: dict):
    done = CliRunner().invoke(app, ["push", str(run), REPO, "--dry-run"])
    assert done.exit_code == 0, done.output
    for told in ("private:", "adapter_model.safetensors  ", "stays here: .env", "# a card", "states no ε", "'base'"):
        assert told in done.output, told
    assert not hub["paths"], "no network"


def test_nobody_to_ask_means_no(run: Path, hub: dict):
    done = CliRunner().invoke(app, ["push", str(run), REPO])
    assert isinstance(done.exception, ConfigError | SystemExit) and done.exit_code != 0
    assert not hub["paths"]
