"""The picture of a method: two rounds of two clients, played for real on one small module, drawn element by element.

Nothing is drawn by hand: clients and server take their turns with fedloom's own functions, the payloads are decoded,
and what is in them is what is shown. Only the training step is made up, and two things are fitted to so small a module:
values are not rounded (but loom's, which travel as signs), and sparse methods keep more than they would of a large one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import torch

import fedloom
from fedloom.compress.budget import Budget
from fedloom.compress.entries import Dense, Entry, Quantized, Sparse, to_dense
from fedloom.lora.pair import LoraPair, LoraState, initial_state
from fedloom.methods.method import CORE
from fedloom.rounds.joint import ONCE

MODULE, SHAPE, RANK = "module", (10, 14), 3
CLIENTS = {"ada": 200, "bob": 100}
"""Client → examples, so that their shares are two thirds and one third."""
TOY: Mapping[str, Mapping[str, float | bool | str]] = {
    "florist": {"tau": 1.0},
    "fed-dare": {"sparsity": 0.7},
    "fedsrd": {"base_sparsity": 0.75, "sparsity_upper": 0.0, "download_sparsity": 0.7},
    "fedsrd-e": {"base_sparsity": 0.75, "sparsity_upper": 0.0, "download_sparsity": 0.7},
    "lora-xs": {"factors": "random", "coded": False},
    "sparseloco": {"chunk_size": 15, "topk": 4},
    "ferret": {"share": 0.3},
    "fedkseed": {"seeds": 16, "perturbations": 4},
    "decomfl": {"seeds": 16, "perturbations": 8},
    "hiso": {"seeds": 16, "perturbations": 8, "smoothing": 0.5},
    "loom": {"max_density": 0.3},
}
"""Settings that leave something to see on 72 values and need no base model; other methods have their defaults."""

CELL, GAP, LEFT, TOP, COLUMN = 7, 14, 14, 49, 182
LEVELS = (0.25, 0.5, 0.75, 1.0)
COLOURS = {1: "#e0803c", -1: "#4a86cf"}


@dataclass(frozen=True)
class Played:
    """One round: what each client sent, what the server broadcast, what everyone holds afterwards."""

    uploads: Mapping[str, bytes]
    broadcast: bytes
    after: fedloom.State


def as_signs(values: torch.Tensor, seed: int) -> Quantized:
    """One bit a value, all of one magnitude."""
    values = values.reshape(-1)
    mean = values.abs().mean().reshape(1) if values.numel() else torch.zeros(0)
    codes = torch.where(values < 0, -1, 1).to(torch.int8)
    return Quantized(codes, mean.to(torch.bfloat16).float(), max(values.numel(), 1), 1)


def play(name: str, rounds: int = 2) -> list[Played]:
    """Some rounds of a method, every payload through the wire."""
    method = fedloom.build(name, TOY.get(name))
    coded = as_signs if name == "loom" else lambda values, seed: values.reshape(-1).clone()
    job = fedloom.Job(method, 7, coded, budget=Budget(share=0.6) if name == "loom" else None)
    adapter = initial_state({MODULE: SHAPE}, {MODULE: RANK}, 3)
    server = fedloom.start(job, adapter)
    clients = {client: fedloom.start(job, adapter, {MODULE: RANK}) for client in CLIENTS}
    played: list[Played] = []
    for number in range(1, rounds + 1):
        missed = [played[-1].broadcast] if played else []
        turns = {
            client: fedloom.client_turn(job, client, state, missed, step(method, CLIENTS[client]), number)
            for client, state in clients.items()
        }
        clients = {client: turn.state for client, turn in turns.items()}
        uploads = {client: turn.payload for client, turn in turns.items()}
        turn = fedloom.server_turn(job, server, uploads, number)
        server = turn.state
        played.append(Played(uploads, turn.payload, server))
    return played


def step(method: fedloom.Method, examples: int):
    """A made-up training step: a few elements change much, most change little."""

    def train(state: fedloom.State, round: int, seed: int) -> fedloom.Trained:
        generator = torch.Generator().manual_seed(seed % 2**63)
        if method.forward:
            moved = torch.zeros(method.forward.seeds)
            tried = method.forward.numbers(0, seed)
            moved[tried] = 0.1 * torch.randn(len(tried), generator=generator)
            return fedloom.Trained(state.adapter, num_examples=examples, loss=1.0, steps=1, moved=moved)
        core, parts, pairs = method.core(state), method.trainable(round), {}
        for module, pair in state.adapter.items():
            if core:
                change = torch.randn(pair.rank, pair.rank, generator=generator) ** 3
                pairs[module] = LoraPair(pair.A + 0.1 * change @ core[module].A, pair.B)
            else:
                moved = {
                    part: pair.part(part)
                    + 0.1 * torch.randn(pair.part(part).shape, generator=generator) ** 3 * (part in parts)
                    for part in ("A", "B")
                }
                pairs[module] = LoraPair(moved["A"], moved["B"])
        return fedloom.Trained(LoraState(pairs), num_examples=examples, loss=1.0, steps=1)

    return train


def matrix(x: int, y: int, tensor: torch.Tensor | None, shape: tuple[int, int], sent: torch.Tensor | None) -> str:
    """The elements of a matrix as squares; where `sent` is false, or nothing travels, the grid alone."""
    rows, columns = shape
    frame = f'<rect x="{x}" y="{y}" width="{columns * CELL}" height="{rows * CELL}" '
    if tensor is None:
        return frame + 'class="n"/>'
    paths: dict[str, list[str]] = {}
    largest = float(tensor.abs().max()) or 1.0
    for row in range(rows):
        for column in range(columns):
            if sent is not None and not bool(sent[row, column]):
                continue
            value = float(tensor[row, column])
            level = next(i for i, most in enumerate(LEVELS) if abs(value) / largest <= most + 1e-9)
            kind = "z" if value == 0 else f"{'p' if value > 0 else 'm'}{level}"
            paths.setdefault(kind, []).append(f"M{x + column * CELL} {y + row * CELL}h6v6h-6z")
    drawn = "".join(f'<path class="{kind}" d="{"".join(path)}"/>' for kind, path in sorted(paths.items()))
    return frame + 'class="g"/>' + drawn


def form(entry: Entry | None) -> str:
    """How a tensor travels, in words."""
    if entry is None:
        return "not sent"
    total = to_dense(entry).numel()
    if isinstance(entry, Dense):
        return f"all {total}"
    kept = entry.positions.numel() if isinstance(entry, Sparse) else int((to_dense(entry) != 0).sum())
    return f"{kept} of {total}" + ("" if isinstance(entry, Sparse) else ", by seed")


def words(x: int, y: int, text: str, kind: str = "") -> str:
    """A line of text."""
    marked = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{marked}>{escape(text)}</text>'


def present(entry: Entry) -> torch.Tensor:
    """Which elements travel."""
    if isinstance(entry, Dense):
        return torch.ones(entry.shape, dtype=torch.bool)
    if isinstance(entry, Sparse):
        mask = torch.zeros(entry.shape, dtype=torch.bool).flatten()
        mask[entry.positions] = True
        return mask.view(entry.shape)
    return to_dense(entry) != 0


def pair(x: int, y: int, entries: Mapping[str, Entry], prefix: str, title: str) -> str:
    """B, and beside it A, as they travel."""
    b, a = entries.get(f"{MODULE}/{prefix}B"), entries.get(f"{MODULE}/{prefix}A")
    rank = b.shape[1] if b is not None else a.shape[0] if a is not None else RANK
    out, at = [], x
    for part, entry, shape in (("B", b, (SHAPE[0], rank)), ("A", a, (rank, SHAPE[1]))):
        tensor = None if entry is None else to_dense(entry)
        out.append(words(at, y - 4, f"{title}{part}", "b"))
        out.append(matrix(at, y, tensor, shape, None if entry is None else present(entry)))
        below = y + shape[0] * CELL + 10
        out.append(words(at, below, form(entry)))
        at += max(shape[1] * CELL, 49 if title else 35) + GAP
    return "".join(out)


def payload(x: int, y: int, title: str, data: bytes) -> str:
    """One message: its heading, its bytes, its tensors."""
    entries = {name: entry for name, entry in fedloom.decode(data).entries.items() if math.prod(entry.shape)}
    out = [words(x, y, title, "h"), words(x, y + 12, f"{len(data)} bytes")]
    if ONCE in entries:
        scalars = entries[ONCE]
        shape = (1, math.prod(scalars.shape))
        out.append(words(x, y + 30, "s", "b"))
        out.append(matrix(x, y + 35, to_dense(scalars).view(shape), shape, present(scalars).view(shape)))
        out.append(words(x, y + 52, form(scalars)))
    core = entries.get(f"{MODULE}/{CORE}")
    if core is not None:
        out.append(words(x, y + 30, "R", "b") + matrix(x, y + 35, to_dense(core), (RANK, RANK), present(core)))
        out.append(words(x, y + 35 + RANK * CELL + 10, form(core)))
    top, prefixes = y + 35 + (56 if core is not None else 0), ("", "frozen_")
    for prefix in prefixes:
        if any(entries.get(f"{MODULE}/{prefix}{part}") is not None for part in "AB"):
            out.append(pair(x, top, entries, prefix, "merge " if prefix else ""))
            top += SHAPE[0] * CELL + 35
    return "".join(out)


def held(x: int, y: int, state: fedloom.State) -> str:
    """What everyone holds: the pair that is trained on and, where the method merges, what was merged."""
    out, top = [words(x, y, "everyone then holds", "h")], y + 35
    for title, adapter in (("", state.adapter), ("merged ", state.frozen)):
        for whole in (found for found in adapter.values() if found.rank):
            at = x
            for part, tensor in (("B", whole.B), ("A", whole.A)):
                out.append(words(at, top - 4, f"{title}{part}", "b"))
                out.append(matrix(at, top, tensor, tuple(tensor.shape), None))
                at += max(tensor.shape[1] * CELL, 49 if title else 35) + GAP
            top += SHAPE[0] * CELL + 35
    return "".join(out)


STYLE = (
    "text{font:10px system-ui,sans-serif;fill:#7d8590}.h{font-size:11px;font-weight:600}.b{font-weight:600}"
    ".g{fill:url(#g);stroke:#7d8590;stroke-opacity:.45}"
    ".n{fill:none;stroke:#7d8590;stroke-opacity:.6;stroke-dasharray:3 3}"
    ".z{fill:#7d8590;fill-opacity:.25}"
    + "".join(
        f".{'p' if sign > 0 else 'm'}{level}{{fill:{colour};fill-opacity:{opacity}}}"
        for sign, colour in COLOURS.items()
        for level, opacity in enumerate((0.3, 0.55, 0.8, 1))
    )
)
GRID = (
    f'<pattern id="g" width="{CELL}" height="{CELL}" patternUnits="userSpaceOnUse">'
    f'<path d="M0 0h{CELL}M0 0v{CELL}" stroke="#7d8590" stroke-opacity=".22" fill="none"/></pattern>'
)


def height_of(played: Played) -> int:
    """What a round needs: one or two pairs under its headings."""
    merges = any(pair.rank for pair in played.after.frozen.values())
    return 56 + (SHAPE[0] * CELL + 35) * (2 if merges else 1)


def picture(name: str) -> str:
    """The SVG of a method."""
    rounds = play(name)
    columns = [LEFT + COLUMN * column for column in range(4)]
    out, y = [], TOP
    for number, played in enumerate(rounds, 1):
        out.append(words(LEFT, y - 22, f"Round {number}", "h"))
        for x, (client, data) in zip(columns, played.uploads.items(), strict=False):
            out.append(payload(x, y, f"{client} sends", data))
        out.append(payload(columns[2], y, "the server broadcasts", played.broadcast))
        out.append(held(columns[3], y, played.after))
        y += height_of(played)
    out.append(
        words(LEFT, y - 24, "Orange: positive, blue: negative; the stronger, the larger. Grid alone: not sent.")
        + words(LEFT, y - 10, "Dashed: the factor stays where it is.")
    )
    size = f"{LEFT * 2 + COLUMN * 4} {y}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{size.split()[0]}" role="img">'
        f"<title>Two rounds of {escape(name)}, element by element</title><style>{STYLE}</style><defs>{GRID}</defs>"
        + "".join(out)
        + "</svg>\n"
    )
