"""SparseLoCo: the largest of every chunk, two bits a value, and what was not sent waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.compress.entries import Quantized, Sparse, floats, to_dense
from fedloom.errors import ConfigError
from fedloom.methods.sparseloco import chunk_top, in_two_bits
from fedloom.methods.table import build
from fedloom.wire import decode
from toy import Federation, client_seed, job, step


def twin(flat: np.ndarray, chunk: int, keep: int) -> list[int]:
    """The positions, one chunk after the other, by sorting all of its magnitudes."""
    found = []
    for start in range(0, len(flat), chunk):
        part = np.abs(flat[start : start + chunk])
        wanted = keep if len(part) == chunk else max(len(part) * keep // chunk, 1)
        found += sorted(start + place for place in np.argsort(-part, kind="stable")[:wanted])
    return found


@settings(max_examples=40)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**20))
def test_positions_are_the_largest_of_every_chunk(numel: int, chunk: int, keep: int, seed: int):
    flat = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    chunk = min(chunk, numel)
    keep = min(keep, chunk)
    assert chunk_top(flat, chunk, keep).tolist() == twin(flat.numpy(), chunk, keep)


def test_a_tensor_of_zeros_has_no_positions_and_a_chunk_of_zeros_is_named_in_vain():
    assert chunk_top(torch.zeros(9), 4, 2).numel() == 0
    flat = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, -2.0, 0.0])
    positions = chunk_top(flat, 4, 2)
    assert positions[2:].tolist() == [4, 6]
    coded = in_two_bits(flat[positions], 2)
    assert coded.codes.tolist() == [0, 0, 2, -3] and torch.isfinite(coded.dequantize()).all()


@settings(max_examples=40)
@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 2**20))
def test_two_bits_are_the_nearest_of_their_kind(numel: int, block: int, seed: int):
    """A slow twin: of each block a sign, one of two sizes by the mean, and the scale of the least squares."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    coded = in_two_bits(values, block)
    assert isinstance(coded, Quantized) and set(coded.codes.abs().tolist()) <= {2, 3}
    assert torch.equal(coded.codes.sign().float(), values.sign())
    for start in range(0, numel, block):
        part = values[start : start + block].double().numpy()
        codes = np.where(np.abs(part) > np.abs(part).mean() + 1e-7, 3, 2) * np.sign(part)
        near = np.abs(np.abs(part) - np.abs(part).mean()) < 1e-6  # either size will do
        own = coded.codes[start : start + block].numpy()
        assert ((codes == own) | near).all()
        scale = (part * own).sum() / (own.astype(float) ** 2).sum()
        assert coded.scales[start // block].item() == pytest.approx(scale, rel=2**-8)


def test_nothing_is_lost_of_what_a_client_does_not_send():
    """With β = 1: all that a client has sent and what it keeps are the sum of its changes."""
    run = Federation(job(build("sparseloco", {"chunk_size": 8, "topk": 2, "error_decay": 1.0})))
    total = {name: torch.zeros_like(t) for name, t in run.server.adapter.tensors().items()}
    sent = {name: torch.zeros_like(t) for name, t in total.items()}
    for round in range(1, 4):
        before = run.server.adapter.tensors()
        after = run.train(run.server, round, client_seed(run.job, "ada", round)).adapter.tensors()
        run.play()
        entries = decode(run.uploads["ada"]).entries
        for name in total:
            total[name] += after[name] - before[name]
            sent[name] += to_dense(entries[name])
    for name, kept in run.clients["ada"].memory.items():
        assert torch.allclose(sent[name] + kept, total[name], atol=1e-5), name
        assert kept.abs().sum() > 0


def test_what_waits_fades():
    run = Federation(job(build("sparseloco", {"chunk_size": 8, "topk": 1, "error_decay": 0.5})))
    run.play()
    first = dict(run.clients["ada"].memory)
    run.train = lambda state, round, seed: step(state, round, seed, size=0.0)
    run.play()
    entries, kept = decode(run.uploads["ada"]).entries, run.clients["ada"].memory
    for name, waiting in first.items():
        assert torch.allclose(to_dense(entries[name]) + kept[name], 0.5 * waiting, atol=1e-6)


def test_the_server_goes_its_rate_along_the_mean():
    runs = {rate: Federation(job(build("sparseloco", {"server_learning_rate": rate}))) for rate in (1.0, 0.5)}
    begun = runs[1.0].server.adapter.tensors()
    for run in runs.values():
        run.play()
    one, half = (run.server.adapter.tensors() for run in runs.values())
    for name in begun:
        assert torch.allclose(half[name] - begun[name], 0.5 * (one[name] - begun[name]), atol=1e-6)


def test_values_go_up_in_two_bits_with_a_scale_a_chunk():
    run = Federation(job(build("sparseloco", {"chunk_size": 16, "topk": 4})))
    run.play()
    entry = decode(run.uploads["ada"]).entries["layers.1.down/A"]
    assert isinstance(entry, Sparse) and isinstance(entry.values, Quantized)
    assert entry.values.block == 4 and entry.values.scales.numel() == -(-entry.positions.numel() // 4)
    assert len(floats(entry.values).abs().unique()) <= 2 * entry.values.scales.numel()


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"chunk_size": 0}, "method.chunk_size is 0"),
        ({"topk": 5000}, "method.topk is 5000: expected 1 to 4096"),
        ({"error_decay": 1.5}, "method.error_decay is 1.5"),
        ({"server_learning_rate": 0.0}, "method.server_learning_rate is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float], match: str):
    with pytest.raises(ConfigError, match=match):
        build("sparseloco", wrong)
