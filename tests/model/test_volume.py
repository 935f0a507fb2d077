"""What clients' data weigh: the texts that training reads, compressed once, by a compressor that is named."""

import json
import lzma
import random

import pytest
import zstandard

from fedloom.model.examples import to_example
from fedloom.model.volume import weigh_examples


def examples(count, seed=0):
    words = random.Random(seed)
    return [
        to_example({"instruction": f"é {words.random()}", "output": "yes", "id": f"{words.random()}"})
        for _ in range(count)
    ]


def lines(held):
    rows = [[e.instruction, "", "yes", []] for e in held]
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()


@pytest.mark.parametrize("count", [0, 1, 500])
def test_small_data_are_weighed_by_xz(count):
    held = examples(count)
    volume = weigh_examples({"ada": held, "bob": held[:1]})
    assert volume.coding == "xz" and list(volume.by_client) == ["ada", "bob"]
    # xz itself is within the few bytes that its default check and the name of the dictionary's size take
    assert volume.by_client["ada"] == pytest.approx(len(lzma.compress(lines(held), preset=6)), abs=8)


def test_large_data_are_weighed_by_something_faster():
    held = examples(200)
    volume = weigh_examples({"ada": held, "bob": held}, limit=2 * len(lines(held)) - 1)
    assert volume.coding == "zstd -9"
    assert volume.by_client["bob"] == len(zstandard.ZstdCompressor(level=9).compress(lines(held)))
    assert weigh_examples({"ada": held, "bob": held}, limit=2 * len(lines(held))).coding == "xz"


def test_half_of_a_surrogate_pair_has_a_weight():
    held = [to_example({"prompt": "\ud800", "completion": "x"})]
    assert weigh_examples({"ada": held}).by_client["ada"] > 0
