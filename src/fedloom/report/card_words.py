"""What every model card of fedloom's says in the same words: how to load the adapter, and what is not promised."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

from fedloom.records.text import to_printable
from fedloom.report.card_header import HUB


def quote(text: str) -> str:
    """A name as Markdown shows it, whatever is in it: it must end neither its cell nor its quotes."""
    return f"`{to_printable(text, 200).replace('`', '´').replace('|', '¦')}`"


def table(rows: Mapping[str, str]) -> str:
    """Two columns without heads."""
    return "| | |\n| --- | --- |\n" + "".join(f"| {key} | {value} |\n" for key, value in rows.items())


def made_by() -> str:
    """The release that wrote the card."""
    return f"fedloom {version('fedloom')}"


def loading(base: str | None) -> str:
    """Code that loads the adapter with PEFT; its first line is for the reader to fill in."""
    shown = base if base and HUB.fullmatch(base) else "folder/of/the/base/model"
    return (
        "## How to use it\n\n"
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base, adapter = "{shown}", "this/folder"\n'
        "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n"
        'inputs = tokenizer("Your prompt", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))\n```\n\n"
        "The base model must be the one of this digest: on other weights an adapter gives other answers, without a "
        "word. Where the adapter's folder holds no tokenizer, take the base model's.\n"
    )


def license_note(license: str | None) -> str:
    """What the card says of a licence."""
    if license:
        return ""
    return (
        "- **Licence.** Nobody has said one for this adapter, so that it stands as unknown. What the base model's "
        "licence says of derived models holds here too.\n"
    )


LIMITS = (
    "- **The data.** An adapter remembers of its training data what training made it remember, and may repeat it. That "
    "examples stayed at their sites says where they lay, not what the weights hold.\n"
    "- **The sites.** Each said itself how many examples it holds, and nobody has seen them: what is wrong or biased "
    "in them is in the adapter.\n"
    "- **The scores.** They hold for held-out examples of the same federation. Elsewhere they may be lower.\n"
)
"""What a card does not promise."""
