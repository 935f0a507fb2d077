"""`fedloom preview`: what the model would see of the data, before anything is loaded or trained."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fedloom.cli.options import AsJson, Set
from fedloom.records.text import cell, escape_json, to_printable

if TYPE_CHECKING:
    from fedloom.model.examples import Example
    from fedloom.model.sources import Tell
    from fedloom.records.config import Config
    from fedloom.workspace.preview import ClientPreview, Preview, ShownExample

screen = Console()
GIVEN, LEARNT = "dim", "bold green"
BAR = "│"
MARKS = "⟦", "⟧"
"""Around what is learnt, where there are no colours; rare in data."""
LONGEST_TEXT = 4000
"""Characters of an example that are shown; of a longer one its two ends."""
MOST_TOKENS = 96
"""Tokens of an example in the table; of a longer one its two ends. --json has all."""
LONGEST_TOKEN = 14
"""Characters of a token in the table."""


def preview(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="Settings of a run, or a SITE.toml.")],
    sets: Set = None,
    client: Annotated[list[str] | None, typer.Option(help="Only this client; repeatable.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples shown of every client.")] = 2,
    as_json: AsJson = False,
) -> None:
    """Show examples as the model sees them: text, tokens, and which of them are learnt."""
    notes: list[str] = []
    settings, texts = read_texts(config, sets or [], notes.append)
    from fedloom.workspace.participants import check_clients_exist
    from fedloom.workspace.preview import preview_examples

    check_clients_exist(client or (), texts, "--client {name} asks")
    chosen = {name: held for name, held in texts.items() if not client or name in client}
    found = preview_examples(settings, chosen, examples, notes)
    if as_json:
        print(escape_json(json.dumps(asdict(found), indent=2, ensure_ascii=False)))
        return
    for part in render_preview(found, colours=screen.color_system is not None, width=screen.width):
        screen.print(part, highlight=False)


def read_texts(path: Path, sets: Sequence[str], tell: Tell) -> tuple[Config, dict[str, list[Example]]]:
    """The settings, and the examples of every client that takes part; of a SITE.toml its own, under its name."""
    if _is_site(path):
        return _read_site(path, sets, tell)
    from fedloom.records.configfile import load_config
    from fedloom.workspace.data import client_examples
    from fedloom.workspace.participants import check_clients_exist, select_participants

    config = load_config(path, sets)
    texts, _ = client_examples(config, tell)
    check_clients_exist(config.clients, texts)
    return config, select_participants(texts, config.federation.participants)


def _is_site(path: Path) -> bool:
    """Whether it is a SITE.toml: there `model` is a path, in the settings of a run a table."""
    try:
        return isinstance(tomllib.loads(path.read_text(encoding="utf-8")).get("model"), str)
    except (OSError, ValueError):
        return False  # whoever reads it as settings says what is wrong


def _read_site(path: Path, sets: Sequence[str], tell: Tell) -> tuple[Config, dict[str, list[Example]]]:
    from fedloom.model.sources import load_examples
    from fedloom.records.configfile import merge_trees, override, parse
    from fedloom.site.config import load_site_config

    site = load_site_config(path)
    tree: dict[str, Any] = {}
    for text in sets:
        merge_trees(tree, override(text))
    config = parse(tree, "--set")
    own = config.model.model_copy(update={"path": site.model})
    return config.model_copy(update={"model": own}), {
        site.name: load_examples(site.data, settings=site.reading(), tell=tell)
    }


def render_preview(found: Preview, colours: bool, width: int) -> Iterator[RenderableType]:
    """For a screen of `width` columns: the clients in numbers, the notes, then the examples of each."""
    yield _head(found)
    for note in found.notes:
        yield cell(f"note: {note}", "yellow", 2000)
    if any(held.shown for held in found.clients.values()):
        yield _legend(colours)
    for name, held in found.clients.items():
        for number, example in enumerate(held.shown, start=1):
            yield from _example(name, number, example, colours, width)


def _head(found: Preview) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("client", overflow="fold")
    names = ["examples", "tokens", "longest", "learnt", "cut", "dropped", *(["rows"] if found.packing else [])]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("template", overflow="fold")
    for name, held in found.clients.items():
        table.add_row(cell(name), *_numbers(held, found.packing), ", ".join(held.templates))
    table.caption = f"tokens and learnt: means of an example; data.max_length = {found.max_length}"
    table.caption_justify = "left"
    return table


def _numbers(held: ClientPreview, packing: bool) -> list[str]:
    counts = [held.cut, held.dropped, *([held.rows] if packing else [])]
    tokens = [f"{held.mean_tokens:.1f}", f"{held.max_tokens:,}", f"{held.mean_learnt:.1f}"]
    return [f"{held.examples:,}", *tokens, *(f"{number:,}" for number in counts)]


def _legend(colours: bool) -> Text:
    if colours:
        return Text.assemble("given, ", ("learnt", LEARNT), "; a dot stands for a space in a token")
    return Text(f"{MARKS[0]}learnt{MARKS[1]}, all else is given; a dot stands for a space in a token")


def _example(client: str, number: int, example: ShownExample, colours: bool, width: int) -> Iterator[RenderableType]:
    learnt = sum(label >= 0 for label in example.labels)
    cut = ", cut at data.max_length" if example.cut else ""
    yield Text()
    facts = f"{len(example.ids):,} tokens, {learnt:,} learnt{cut}, template {example.template}"
    yield Text.assemble(cell(client, "bold"), f", example {number}: {facts}")
    yield _text(example, colours, width)
    yield _tokens(example, colours, width)


def _text(example: ShownExample, colours: bool, width: int) -> Text:
    """The text in its own lines, each with a bar before it, so that it cannot be taken for the command's own words."""
    whole = Text()
    for piece in example.text:
        style = LEARNT if piece.learnt and colours else ""
        opening, closing = MARKS if piece.learnt and not colours else ("", "")
        whole.append(f"{opening}{_shortened(piece.text)}{closing}", style)
    lines = whole.wrap(screen, max(width - 2, 8))
    return Text("\n").join([Text.assemble((BAR, GIVEN), " ", line) for line in lines])


def _shortened(text: str) -> str:
    """Printable lines; the middle of a long text left out."""
    if len(text) > LONGEST_TEXT:
        half, left_out = LONGEST_TEXT // 2, len(text) - LONGEST_TEXT
        text = f"{text[:half]} … {left_out:,} characters left out … {text[-half:]}"
    return "\n".join(to_printable(line, 2 * LONGEST_TEXT) for line in text.split("\n"))


def _tokens(example: ShownExample, colours: bool, width: int) -> Table:
    """Ids with their texts, in as many columns as there is room for, read line by line."""
    digits = len(str(max(example.ids)))
    cells = [
        _token(f"{token:>{digits}}", text, label >= 0, colours)
        for token, text, label in zip(example.ids, example.tokens, example.labels, strict=True)
    ]
    if len(cells) > MOST_TOKENS:
        half = MOST_TOKENS // 2
        cells = [*cells[:half], Text(f"… {len(cells) - MOST_TOKENS:,} more …"), *cells[-half:]]
    widest = max(each.cell_len for each in cells)
    columns = max(1, (width - 2) // (widest + 2))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column()
    for _ in range(columns):
        table.add_column(width=widest, no_wrap=True)
    for start in range(0, len(cells), columns):
        table.add_row(Text(BAR, GIVEN), *cells[start : start + columns])
    return table


def _token(token: str, text: str, learnt: bool, colours: bool) -> Text:
    shown = to_printable(text.replace(" ", "·").replace("\n", "\\n"), LONGEST_TOKEN)
    opening, closing = MARKS if learnt and not colours else ("", "")
    return Text.assemble((f"{token} ", GIVEN), (f"{opening}{shown}{closing}", LEARNT if learnt and colours else ""))
