"""What an attacker finds out of training with noise on examples, against the ε that is stated: an audit in one training.

Canaries are examples of random tokens. A coin says for each whether it is trained on; one that is not stands there
without anything to learn, so that the number of examples is the same. Whoever sees the adapter guesses the coins, of
those canaries that he is surest of: what has become more likely was there. How many guesses are right bounds ε from
below (Steinke, Nasr & Jagielski, "Privacy auditing with one (1) training run", arXiv 2305.08846, theorem 5.2).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from fedloom.lora.pair import LoraState
from fedloom.model import peft_bridge
from fedloom.model.base import load_base
from fedloom.model.example_gradients import mean_losses
from fedloom.model.placement import place_adapter
from fedloom.model.private import PrivateRound
from fedloom.model.tokens import TokenizedExamples, Tokens
from fedloom.model.training import local_update
from fedloom.noise.accounting import example_epsilon
from fedloom.noise.secret import derive_key
from fedloom.records.config import LoraSettings, TrainingSettings
from fedloom.records.noise import plan_noise
from fedloom.records.sections.dp import DpSettings
from fedloom.testbeds import testbed_folder
from fedloom.workspace.plan import first_adapter

if TYPE_CHECKING:
    import peft

LENGTH = 8
"""Tokens of a canary."""
NO_NOISE = 1e-3
"""Noise multiplier of the training that shows that the audit would find something."""
CONFIDENCE = 0.95
