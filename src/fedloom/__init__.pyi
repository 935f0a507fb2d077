# Run, compare and merge; results that can be held.
# What can go wrong.
from .errors import FedloomError as FedloomError
from .face.compare import Comparison as Comparison
from .face.compare import compare as compare
from .face.merge import Merge as Merge
from .face.merge import merge as merge
from .face.run import Run as Run
from .face.run import run as run

# Settings.
from .face.settings import load as load
from .face.settings import testbed as testbed
from .face.site import serve_site as serve_site

# One round by hand.
from .lora.pair import LoraPair as LoraPair
from .lora.pair import LoraState as LoraState

# Methods: choose one, or write one.
from .methods.method import Aggregate as Aggregate
from .methods.method import Context as Context
from .methods.method import Facts as Facts
from .methods.method import Method as Method
from .methods.method import State as State
from .methods.method import Update as Update
from .methods.method import replace as replace
from .methods.table import METHODS as METHODS
from .methods.table import build as build

# Who has a training script keeps it: a transformers Trainer as a site's training step.
from .model.patch import patch as patch
from .records.config import Config as Config
from .rounds.federation import Federation as Federation
from .rounds.federation import RoundResult as RoundResult
from .rounds.job import Job as Job
from .rounds.turns import Trained as Trained
from .rounds.turns import client_turn as client_turn
from .rounds.turns import server_turn as server_turn
from .rounds.turns import start as start

# Payloads: what travels, and what it says.
from .wire import Header as Header
from .wire import Message as Message
from .wire import decode as decode
from .wire import describe as describe
from .wire import encode as encode
