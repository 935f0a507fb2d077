"""Every architecture that transformers loads as a causal language model: does fedloom train, export and merge it?

Each gets a tiny model of random weights. Two steps of fedloom's training are held to two in plain PEFT, by a loop of
its own; the exported adapter, opened by PEFT, to the model that was trained; and the merged folder to PEFT's merge.
A mixture is trained a second time on its experts alone, by target_parameters.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import peft
import torch
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from benchmarks.tiny_configs import VOCABULARY, families, tiny_config
from fedloom.adapters.merge.base import open_base
from fedloom.adapters.merge.combine import Recipe
from fedloom.adapters.merge.folders import open_folders
from fedloom.adapters.merge.save import save_merge
from fedloom.adapters.parameters import bundle_of
from fedloom.adapters.settings import save_adapter
from fedloom.errors import ConfigError, FedloomError
from fedloom.lora.pair import LoraState, initial_state
from fedloom.model import peft_bridge
from fedloom.model.base import load_base, quiet_transformers
from fedloom.model.foreign import error_reason
from fedloom.model.kinds import refusal
from fedloom.model.placement import LinearModule, parameter_ends, place_adapter
from fedloom.model.tokens import TokenizedExamples, Tokens
from fedloom.model.training import local_update
from fedloom.records.config import LoraSettings, TrainingSettings

STEPS = 2
RATE = 1e-2
LENGTH = 12
CLOSE = 1e-4
"""Errors of losses and logits that are rounding, relative to the loss and to what the adapter changes."""
LARGEST = 25_000_000
"""Parameters of a model that is still tiny."""
SHOWN = 110
"""Characters of a remark."""


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a family: "yes", "no", "refused", or "" where it was not tried. remark: why, in one line."""

    family: str
    runs: str = ""
    plain: str = ""
    merge: str = ""
    experts: str = ""
    remark: str = ""


def run(only: Sequence[str] | None = None) -> dict[str, Any]:
    """{"rows": one for each family, "total": how many there are of each outcome}. `only`: names of families.

    Raises ConfigError for a name that transformers does not load as a causal language model.
    """
    known = families()
    for family in only or ():
        if family not in known:
            near = get_close_matches(family, known, n=3)
            raise ConfigError(f"family {family!r} is unknown: expected one such as {', '.join(near or known[:3])}")
    torch.set_num_threads(1)  # models so small are fastest so
    with warnings.catch_warnings(), quiet_transformers():
        warnings.simplefilter("ignore")  # libraries' advice about sizes that nobody would choose
        rows = [try_family(family) for family in only or known]
    outcomes = ("runs", "plain", "merge", "experts")
    total = {
        key: {word: sum(asdict(row)[key] == word for row in rows) for word in ("yes", "no", "refused", "")}
        for key in outcomes
    }
    return {"rows": [asdict(row) for row in rows], "total": total}


def try_family(family: str) -> Row:
    """One row of the table; nothing is raised."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        try:
            config = tiny_config(family)
            reason = refusal(config)
            if reason:
                return Row(family, runs="refused", remark=_short(reason))
            write_base(config, folder)
        except Exception as error:  # of every kind: a configuration that is not one of a tiny model
            return Row(family, remark=_short(f"no tiny model: {error_reason(error)}"))
        row = Row(family)
        try:
            linear = peft_bridge.linear_modules(load_base(folder, device="cpu")[0])
            row = compare(folder, Path(scratch) / "modules", row, LoraSettings(r=2, lora_alpha=4))
            if any(bundle_of(name, module.parameter) for name, module in linear.items()):
                row = replace(row, **_with_experts(folder, Path(scratch) / "experts", linear))
        except FedloomError as error:
            return replace(row, runs="refused", remark=_short(str(error).replace(str(folder), "it")))
        except Exception as error:  # what a user would see as a traceback
            return replace(row, runs="no", remark=_short(f"fails: {type(error).__name__}: {error_reason(error)}"))
        return row


def _with_experts(folder: Path, scratch: Path, linear: Mapping[str, LinearModule]) -> dict[str, str]:
    """The column of experts, and a remark where they are not trained as they should be."""
    stacked = {name: module for name, module in linear.items() if bundle_of(name, module.parameter)}
    lora = LoraSettings(r=2, lora_alpha=4, target_modules=(), target_parameters=tuple(parameter_ends(stacked)))
    try:
        row = compare(folder, scratch, Row(""), lora)
    except Exception as error:  # as above
        return {"experts": "no", "remark": _short(f"experts: {error_reason(error).replace(str(folder), 'it')}")}
    right = (row.runs, row.plain, row.merge) == ("yes", "yes", "yes")
    return {"experts": "yes" if right else "no", **({} if right else {"remark": f"experts: {row.remark}"})}


def write_base(config: PretrainedConfig, folder: Path) -> None:
    """A model of random weights, the same each time, and a tokenizer with a token for each number."""
    loader: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(tensor.numel() for tensor in loader.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"its smallest has {size:,} parameters")
    torch.manual_seed(0)
    model = loader.from_config(config)
    logits(model, examples().collate(list(examples().examples)))  # sizes that fit each other nowhere fail here
    model.save_pretrained(folder)
    if type(model.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and loader is AutoModelForCausalLM:
        config.save_pretrained(folder)  # the text part of a model of several parts, which is loaded by the whole's type
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {str(number): number for number in range(3, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    made.save_pretrained(folder)


def examples() -> TokenizedExamples:
    """Four of equal length, so that their order in a batch changes nothing but rounding."""
    drawn = torch.randint(3, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(1)).int()
    return TokenizedExamples(tuple(Tokens(ids, 4, True) for ids in drawn), 0)


def compare(folder: Path, scratch: Path, row: Row, lora: LoraSettings) -> Row:
    """The row with what came out of training, exporting and merging one adapter."""
    base, _ = load_base(folder, device="cpu")
    batch = examples().collate(list(examples().examples))
    before = logits(base, batch)
    adapter = place_adapter(peft_bridge.linear_modules(base), lora)
    start = initial_state(adapter.shapes, adapter.ranks, 0)
    save_adapter(start, folder, adapter.settings, scratch / "start")
    model = peft_bridge.attach(base, adapter)
    settings = TrainingSettings(learning_rate=RATE, max_steps=STEPS, per_device_train_batch_size=4)
    after, stats = local_update(model, start, LoraState(), examples(), settings, round=1, num_rounds=1, seed=0)
    peft_bridge.write_adapter(model, after)
    trained = logits(model, batch)
    change = float((trained - before).abs().max())
    save_adapter(after, folder, adapter.settings, scratch / "after")
    faults = []
    if not change > 100 * CLOSE * float(before.abs().max()) * 1e-2:
        faults.append(f"training changed the logits by {change:.0e}")
    plain = train_plainly(folder, scratch / "start", batch)
    if abs(plain - stats.loss) > CLOSE * plain:
        faults.append(f"loss {stats.loss:.5f}, in plain PEFT {plain:.5f}")
    opened = open_plainly(folder, scratch / "after")
    off = float((logits(opened, batch) - trained).abs().max()) / change
    if not off < CLOSE:
        faults.append(f"opened in PEFT it is off by {off:.0e} of the change")
    wanted = logits(opened.merge_and_unload(), batch)
    return replace(
        row,
        runs="yes",
        plain="no" if faults else "yes",
        **_merged(folder, scratch, lambda merged: float((logits(merged, batch) - wanted).abs().max()) / change, faults),
    )


def _merged(
    folder: Path, scratch: Path, error: Callable[[PreTrainedModel], float], faults: list[str]
) -> dict[str, str]:
    """The columns of merging and of remarks."""
    try:
        recipe = Recipe(method="florist", energy=1.0)
        save_merge(open_folders([scratch / "after"]), recipe, open_base(folder), scratch / "merged")
        off = error(load_base(scratch / "merged", device="cpu")[0])
    except FedloomError as refusal:
        return {"merge": "no", "remark": _short("; ".join([*faults, str(refusal).replace(str(folder), "it")]))}
    if not off < CLOSE:
        faults = [*faults, f"merged it is off by {off:.0e} of the change"]
    return {"merge": "yes" if off < CLOSE else "no", "remark": _short("; ".join(faults))}


@torch.no_grad()
def logits(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of every place, in float64."""
    model.eval()
    told = {name: tensor for name, tensor in batch.items() if name != "labels"}
    answer: Tensor = model(**told, use_cache=False).logits
    return answer.double()


def open_plainly(folder: Path, adapter: Path, trainable: bool = False) -> peft.PeftModel:
    """The base as transformers loads it, and the adapter as PEFT opens it."""
    base, _ = load_base(folder, device="cpu")
    return peft.PeftModel.from_pretrained(base, adapter, is_trainable=trainable)


def train_plainly(folder: Path, adapter: Path, batch: Mapping[str, Tensor]) -> float:
    """The mean loss of two steps of AdamW in PEFT alone, from the same start."""
    model = open_plainly(folder, adapter, trainable=True).train()
    factors = [tensor for tensor in model.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=RATE, weight_decay=0.0)
    total = 0.0
    for _ in range(STEPS):
        told = {name: tensor for name, tensor in batch.items() if name != "labels"}
        answer = model(**told, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(answer.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += float(loss.detach())
    return total / STEPS


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…"


COLUMNS = {"family": "family", "runs": "runs", "plain": "equals plain PEFT", "merge": "merge equal"} | {
    key: key for key in ("experts", "remark")
}
"""Key of a row → head of its column."""


def tables(result: Mapping[str, Any]) -> Iterable[Table]:
    """The rows for a terminal."""
    table = Table(title="families of causal language models, tiny and with random weights")
    for head in COLUMNS.values():
        table.add_column(head, overflow="fold")
    for row in result["rows"]:
        table.add_row(*(row[key] for key in COLUMNS))
    yield table


NOTHING_MISSING = {
    "## All hold": ("yes", "yes", "yes", ""),
    "## All hold, for experts too": ("yes", "yes", "yes", "yes"),
}
"""Heading of the page → the outcomes of all families that are named below it, with no row of their own."""
REST = {
    "## Something does not hold": "",
    "## Refused": "Each with its reason",
    "## Not tried": "No tiny model was made of them",
}
"""Heading → what the line says that a reader opens to see the rows; open where it is empty."""


def to_markdown(result: Mapping[str, Any]) -> str:
    """The part of docs/benchmarks/families.md that follows the introduction: counts, names, rows of the rest."""
    rows = result["rows"]
    outcomes = {row["family"]: tuple(row[key] for key in ("runs", "plain", "merge", "experts")) for row in rows}
    lines = [count_line(outcomes)]
    for heading, wanted in NOTHING_MISSING.items():
        names = [name for name, found in outcomes.items() if found == wanted]
        lines += ["", heading, "", " ".join(f"`{name}`" for name in names) or "None."]
    for heading, opener in REST.items():
        those = [row for row in rows if _section(outcomes[row["family"]]) == heading]
        table = [f"| {' | '.join(COLUMNS.values())} |", "|---" * len(COLUMNS) + "|"]
        table += [f"| {' | '.join(str(row[key]).replace('|', '/') for key in COLUMNS)} |" for row in those]
        if opener:
            table = [f'<details markdown="1"><summary>{opener} ({len(those)})</summary>', "", *table, "", "</details>"]
        lines += ["", heading, "", *table]
    return "\n".join(lines)


def count_line(outcomes: Mapping[str, tuple[str, ...]]) -> str:
    """How many families there are of each outcome. outcomes: family → runs, equals plain PEFT, merge, experts."""
    heads = [head for key, head in COLUMNS.items() if key not in ("family", "remark")]
    columns = dict(zip(heads, zip(*outcomes.values(), strict=True), strict=True))
    told = ", ".join(f"{head}: {column.count('yes')} yes, {column.count('no')} no" for head, column in columns.items())
    return f"{len(outcomes)} families; {told}; refused: {columns['runs'].count('refused')}."


def _section(found: tuple[str, ...]) -> str:
    """The heading that a family's row stands below; "" if it needs no row."""
    if found in NOTHING_MISSING.values():
        return ""
    wrong, refused, untried = REST
    return {"refused": refused, "": untried}.get(found[0], wrong)


def parse_page(text: str) -> dict[str, tuple[str, ...]]:
    """Family → its outcomes, from the page."""
    found: dict[str, tuple[str, ...]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if heading in NOTHING_MISSING:
            found.update(dict.fromkeys(re.findall("`([^`]+)`", line), NOTHING_MISSING[heading]))
        elif line.startswith("| ") and len(cells) == len(COLUMNS) and cells[0] != "family":
            found[cells[0]] = tuple(cells[1:5])
    return found
