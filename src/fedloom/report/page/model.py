"""What a page shows, as plain data: sections of charts, tables and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedloom.report.page.charts import Chart

PageState: TypeAlias = Literal["running", "over"]


@dataclass(frozen=True, slots=True)
class Table:
    """id: its name in links and files. total: the last row sums the others up. words: its cells are texts, not numbers.

    folded: shown only where somebody asks for it.
    """

    id: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    total: bool = False
    words: bool = False
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """A paragraph, or a text in its own lines (`code`). alarm: something went wrong. folded: as of `Table`."""

    id: str
    text: str
    title: str = ""
    code: bool = False
    alarm: bool = False
    folded: bool = False


Block: TypeAlias = Chart | Table | Words


@dataclass(frozen=True, slots=True)
class Section:
    """Blocks under one heading. id: its anchor."""

    id: str
    title: str
    blocks: Sequence[Block]
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Headline:
    """One of the few numbers at the top: what it is, the number with its unit, and what belongs to it."""

    what: str
    value: str
    more: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """title: of the window. state: "running" while rows may still come. version: changes with what is shown.

    heading, subtitle: the first lines; status: how the run stands, in a word or two.
    """

    title: str
    state: PageState
    version: str
    sections: Sequence[Section]
    heading: str = ""
    subtitle: str = ""
    status: str = ""
    headlines: Sequence[Headline] = ()

    @property
    def charts(self) -> list[Chart]:
        """Every chart, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Chart)]
