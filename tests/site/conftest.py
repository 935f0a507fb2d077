"""What the tests of a site share."""

from __future__ import annotations

from pathlib import Path

import pytest

import tiny_models
from fedloom.model.base import quiet_transformers


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a tiny model and two examples."""
    folder = tmp_path_factory.mktemp("site")
    with quiet_transformers():
        tiny_models.llama().save_pretrained(folder / "model")
        tiny_models.tokenizer().save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text('{"instruction": "a?", "output": "b"}\n{"instruction": "1+1", "output": "2"}\n')
    return folder
