"""A base model in 8 or 4 bits, on the CPU: it trains as in fp32, and its adapter is right on the whole base too."""

from __future__ import annotations

import logging
from pathlib import Path

import peft
import pytest
import torch
from test_training import SETTINGS as STEPS
from test_training import changed, update
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom import testbeds
from fedloom.adapters.folder import AdapterFolder
from fedloom.adapters.merge.base import open_base
from fedloom.adapters.merge.model import merge_into
from fedloom.adapters.settings import save_adapter
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState, initial_state
from fedloom.model import peft_bridge, quantized
from fedloom.model.base import load_base
from fedloom.model.evaluate import exact_match_and_loss
from fedloom.model.placement import Adapter
from fedloom.model.quantized import keep_differentiable
from fedloom.model.shared_base import copy_modules
from fedloom.model.sources import load_examples
from fedloom.model.tokens import TokenizedExamples, tokenize
from tiny_models import placed

SETTINGS = changed(STEPS, max_steps=12, learning_rate=5e-3, per_device_train_batch_size=16)
TESTBED = testbeds.testbed_folder()
BASE = TESTBED / "model"


@pytest.fixture(scope="module")
def examples() -> TokenizedExamples:
    rows = load_examples(TESTBED / "data" / "lab" / "train.jsonl")[:48]
    return tokenize(rows, AutoTokenizer.from_pretrained(BASE), "plain", 128)


def trained(quantization: str, data: TokenizedExamples) -> tuple[float, float, LoraState, Adapter]:
    """Loss before, loss after, and the adapter; scored before it is trained, as a run does."""
    model, _ = load_base(BASE, quantization=quantization, device="cpu")
    adapter = placed(model, r=8, lora_alpha=16)
    wrapped, state = peft_bridge.attach(model, adapter), initial_state(adapter.shapes, adapter.ranks, 0)
    peft_bridge.write_adapter(wrapped, state)
    before = exact_match_and_loss(wrapped, data).loss
    after, _ = update(wrapped, state, data, SETTINGS)
    peft_bridge.write_adapter(wrapped, after)
    return before, exact_match_and_loss(wrapped, data).loss, after, adapter


@pytest.fixture(scope="module")
def whole(examples: TokenizedExamples) -> tuple[float, float, LoraState, Adapter]:
    return trained("none", examples)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # its own
def test_a_quantised_base_trains_and_leaves_an_adapter_for_the_whole_one(
    tmp_path: Path,
    quantization: str,
    examples: TokenizedExamples,
    whole: tuple[float, float, LoraState, Adapter],
):
    few = trained(quantization, examples)
    assert few[0] == pytest.approx(whole[0], rel=0.02) and few[1] == pytest.approx(whole[1], rel=0.15)
    assert few[1] < 0.7 * few[0]
    save_adapter(few[2], BASE, few[3].settings, tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "adapter").eval()
    loss = exact_match_and_loss(plain, examples).loss
    assert loss == pytest.approx(few[1], rel=0.15)
    (tmp_path / "merged").mkdir()
    merge_into(open_base(BASE), AdapterFolder(tmp_path / "adapter"), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert exact_match_and_loss(merged, examples).loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # its own
def test_several_jobs_share_quantised_weights(quantization: str):
    """A module in 8 bits takes its codes out of the parameter at its first use: a second one found none there."""
    model, _ = load_base(BASE, quantization=quantization, device="cpu")
    ids = torch.arange(5).unsqueeze(0)
    with torch.no_grad():
        first, second = (peft_bridge.attach(copy_modules(model), placed(model, r=rank)) for rank in (2, 4))
        found = [wrapped(input_ids=ids).logits for wrapped in (first, second, first)]
        alone = peft_bridge.attach(load_base(BASE, quantization=quantization, device="cpu")[0], placed(model, r=2))
        assert all(torch.equal(logits, alone(input_ids=ids).logits) for logits in found)
    held = {parameter.data_ptr() for parameter in first.parameters() if parameter.numel() > 10_000}
    assert held <= {parameter.data_ptr() for parameter in second.parameters()}


def test_a_kernel_that_is_never_called_is_not_missed_in_every_run():
    """bitsandbytes says so as it is imported, which PEFT does wherever it is installed."""
    from bitsandbytes.backends.cpu import ops

    assert not ops.logger.isEnabledFor(logging.WARNING) and ops.logger.isEnabledFor(logging.ERROR)


def test_weights_in_four_bits_are_never_packed_for_inference():
    """What bitsandbytes' layers look at before they pack: packed weights have no gradient, and say nothing."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].support_avx512bf16_for_cpu = True
    keep_differentiable(model)
    assert model[0].support_avx512bf16_for_cpu is False and not hasattr(model[1], "support_avx512bf16_for_cpu")


def test_without_bitsandbytes_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model.quantization = '4bit' needs .* pip install 'fedloom\[quantized\]'"):
        quantized.quantization_options("4bit", torch.float32, torch.device("cpu"))
