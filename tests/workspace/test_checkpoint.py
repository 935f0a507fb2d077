"""Checkpoint files: tensors are found again by what they hold, and what was altered in a file is noticed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedloom.errors import CheckpointError
from fedloom.lora.pair import LoraPair, LoraState
from fedloom.methods.method import State
from fedloom.workspace import checkpoint, keys
from fedloom.workspace.checkpoint import Contents, load_blob, load_contents, save_contents
from fedloom.workspace.keys import fits_key, payload_key, tensor_key


def state() -> State:
    generator = torch.Generator().manual_seed(3)
    pair = LoraPair(torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator))
    return State(LoraState({"q": pair}), memory={"rest": torch.randn(4, generator=generator)}, digest="d")


def save(folder: Path) -> Path:
    return save_contents(folder, 1, Contents({"server": state()}, {"payload": b"sent" * 100}, {"ledger_rows": 0}))


def look(path: Path) -> None:
    """What was saved is what is read."""
    held = load_contents(path)
    assert held.blobs == {"payload": b"sent" * 100} and load_blob(path, "payload") == b"sent" * 100
    for name, tensor in state().adapter.tensors().items():
        assert torch.equal(held.states["server"].adapter.tensors()[name], tensor)
    assert torch.equal(held.states["server"].memory["rest"], state().memory["rest"])


@pytest.mark.parametrize("number", [4, 5])
def test_checkpoints_of_the_formats_before_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """They have no curvature, and in 4 all keys are blake2b's; a run begun by an earlier fedloom goes on."""
    with monkeypatch.context() as patch:
        if number == 4:
            patch.setattr(checkpoint, "tensor_key", payload_key)
        patch.setattr(State, "shared", property(lambda state: (state.adapter, state.frozen, state.tail)))
        patch.setattr(checkpoint, "_FORMAT", f"fedloom-checkpoint-{number}")
        path = save(tmp_path)
    assert f"checkpoint-{number}".encode() in path.read_bytes()
    look(path)
    assert not load_contents(path).states["server"].curvature
    look(save(tmp_path / "new"))
    assert b"checkpoint-6" in (tmp_path / "new" / "round-00001.safetensors").read_bytes()


def test_a_curvature_is_kept(tmp_path: Path):
    curved = replace(state(), curvature=state().adapter.map(lambda pair: LoraPair(pair.A + 9, pair.B + 9)))
    held = load_contents(save_contents(tmp_path, 1, Contents({"server": curved}))).states["server"]
    assert all(torch.equal(t, held.curvature.tensors()[name]) for name, t in curved.curvature.tensors().items())
    assert all(torch.equal(t, held.adapter.tensors()[name]) for name, t in curved.adapter.tensors().items())


def test_a_file_of_any_other_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", "fedloom-checkpoint-7")
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match="expected format fedloom-checkpoint-7"):
        monkeypatch.setattr(checkpoint, "_READ", ("fedloom-checkpoint-6",))
        load_contents(path)


@pytest.mark.parametrize("what", ["state", "payload"])
def test_an_altered_bit_is_noticed(tmp_path: Path, what: str):
    path = save(tmp_path)
    content = bytearray(path.read_bytes())
    own = state().memory["rest"].numpy().tobytes() if what == "state" else b"sentsent"
    content[content.index(own) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"round-00001\.safetensors has been altered"):
        load_contents(path)


def test_keys_tell_content_shape_and_type_apart():
    whole = torch.arange(12, dtype=torch.bfloat16)
    odd = (whole[1:6], whole.view(3, 4), whole.view(3, 4).T, torch.tensor([]), torch.tensor(3.0), torch.arange(5) > 2)
    for key_of in (tensor_key, payload_key):
        assert len({key_of(tensor) for tensor in (whole, *odd)}) == 7
        for tensor in (whole, *odd):
            key = key_of(tensor)
            assert key == key_of(tensor.clone()) and fits_key(tensor, key)
            assert not fits_key(torch.cat([tensor.flatten(), torch.ones(1).to(tensor.dtype)]), key)


def test_a_tensor_that_was_written_into_has_another_key():
    tensor = torch.arange(7, dtype=torch.float32)
    first = tensor_key(tensor)
    tensor.numpy()[3] = 9.0
    assert tensor_key(tensor) != first


def test_payloads_are_not_named_by_a_hash_that_their_sender_could_outwit():
    assert not payload_key(torch.zeros(3, dtype=torch.uint8)).startswith(keys._QUICK)
    assert tensor_key(torch.zeros(3)).startswith(keys._QUICK)
