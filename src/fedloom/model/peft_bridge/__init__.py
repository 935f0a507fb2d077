"""PEFT models ⇄ LoraState. The only folder that imports peft.

survey.py  what of a base model takes an adapter, and by which name
layers.py  PEFT's layers on a model: a linear module's, or a parameter's of many matrices
attach.py  wrapping a model, once, and a slot for merged increments beside the trained one
slots.py   tensors in and out of the slots
weighted.py PEFT's own merge, to compare with

A model is wrapped once (`attach`); after that tensors are only swapped. It has two slots: the adapter that is trained,
and, on demand, a frozen one for merged increments; the model in use is W0 + frozen + trained. A model that somebody
else has wrapped may have another name for the trained slot (`slot`).
"""

from fedloom.model.peft_bridge.attach import active_slot as active_slot
from fedloom.model.peft_bridge.attach import add_layers as add_layers
from fedloom.model.peft_bridge.attach import attach as attach
from fedloom.model.peft_bridge.attach import configure as configure
from fedloom.model.peft_bridge.layers import FROZEN as FROZEN
from fedloom.model.peft_bridge.layers import TRAINED as TRAINED
from fedloom.model.peft_bridge.layers import lora_layers as lora_layers
from fedloom.model.peft_bridge.slots import factor_maps as factor_maps
from fedloom.model.peft_bridge.slots import live_adapter as live_adapter
from fedloom.model.peft_bridge.slots import placements as placements
from fedloom.model.peft_bridge.slots import read_adapter as read_adapter
from fedloom.model.peft_bridge.slots import set_frozen as set_frozen
from fedloom.model.peft_bridge.slots import set_trainable as set_trainable
from fedloom.model.peft_bridge.slots import training_core as training_core
from fedloom.model.peft_bridge.slots import uses_rslora as uses_rslora
from fedloom.model.peft_bridge.slots import widen_factors as widen_factors
from fedloom.model.peft_bridge.slots import write_adapter as write_adapter
from fedloom.model.peft_bridge.survey import linear_beneath as linear_beneath
from fedloom.model.peft_bridge.survey import linear_modules as linear_modules
from fedloom.model.peft_bridge.weighted import add_weighted as add_weighted
