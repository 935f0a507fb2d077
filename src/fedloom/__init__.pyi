# What `import fedloom` gives, for people and type checkers; `__init__.py` loads each name when it is first used.

# Run methods on a testbed or on your own data; merge adapters.
from .face.settings import testbed as testbed
from .face.settings import load as load
from .face.run import run as run
from .face.run import Run as Run
from .face.compare import compare as compare
from .face.compare import Comparison as Comparison
from .face.evaluate import evaluate as evaluate
from .studies.evaluation import Evaluated as Evaluated
from .face.merge import merge as merge
from .face.merge import Merge as Merge
from .face.picture import Picture as Picture
from .records.config import Config as Config

# Who has a training script keeps it: a transformers Trainer as a site's training step.
from .model.patch import patch as patch
from .face.site import serve_site as serve_site

# Payloads: what travelled, what its bytes are spent on, what it says.
from .wire import describe as describe
from .wire import Description as Description
from .wire import decode as decode
from .wire import encode as encode
from .wire import Message as Message
from .wire import Header as Header
from .compress.entries import Dense as Dense
from .compress.entries import Sparse as Sparse
from .compress.entries import Seeded as Seeded
from .compress.entries import to_dense as to_dense

# Methods: choose one, or write one.
from .methods.table import METHODS as METHODS
from .methods.table import build as build
from .methods.method import replace as replace
from .methods.method import Method as Method
from .methods.method import Facts as Facts
from .methods.method import Compress as Compress
from .methods.method import Reduce as Reduce
from .methods.method import Receive as Receive
from .methods.method import Adopt as Adopt
from .methods.method import Context as Context
from .methods.method import Entries as Entries
from .methods.method import State as State
from .methods.method import Update as Update
from .methods.method import Aggregate as Aggregate

# One round by hand.
from .rounds.job import Job as Job
from .rounds.federation import Federation as Federation
from .rounds.federation import RoundResult as RoundResult
from .rounds.turns import start as start
from .rounds.turns import client_turn as client_turn
from .rounds.turns import server_turn as server_turn
from .rounds.turns import accept as accept
from .rounds.step import Train as Train
from .rounds.step import Trained as Trained
from .lora.pair import LoraPair as LoraPair
from .lora.pair import LoraState as LoraState
from .lora.pair import initial_state as initial_state
from .compress.quantize import quantize as quantize

# What can go wrong.
from .errors import FedloomError as FedloomError
