"""Checkpoint files: tensors are found again by what they hold, and what was altered in a file is noticed."""

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


def test_checkpoints_of_the_format_before_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """There all keys are blake2b's; a run begun by an earlier fedloom goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "tensor_key", payload_key)
        patch.setattr(checkpoint, "_FORMAT", "fedloom-checkpoint-4")
        look(save(tmp_path))
    look(tmp_path / "round-00001.safetensors")
    assert b"checkpoint-4" in (tmp_path / "round-00001.safetensors").read_bytes()
    look(save(tmp_path / "new"))
    assert b"checkpoint-5" in (tmp_path / "new" / "round-00001.safetensors").read_bytes()


def test_a_file_of_any_other_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", "fedloom-checkpoint-6")
    path = save(tmp_path)
    with pytest.raises(CheckpointError, match="expected format fedloom-checkpoint-6"):
        monkeypatch.setattr(checkpoint, "_READ", ("fedloom-checkpoint-5",))
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
