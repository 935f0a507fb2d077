"""TensorBoard: event files in the run's folder, tensorboard/; `tensorboard --logdir runs` shows all runs of a folder.

An event file can only be appended to, and its last record may be cut short where the process was killed. So the files
are written anew from the ledger whenever the run goes on: what they hold never rests on what they held.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.records.text import to_printable
from fedloom.trackers.points import Point
from fedloom.trackers.sinks import Ending, TrackedRun

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

FOLDER = "tensorboard"
"""Its name in a run's folder."""


class EventFiles:
    """A sink, whose folder is the run's alone."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder = run.folder / FOLDER
        for old in list_event_files(folder):
            old.unlink()
        self._writer = EventFileWriter(str(folder))
        self._sent = -1
        # A TensorBoard that watches the folder forgets what it has read of the files before.
        self._writer.add_event(Event(wall_time=run.began, step=0, session_log=SessionLog(status=SessionLog.START)))
        told = {"name": run.name, **run.facts, **run.settings}
        self._writer.add_event(_text_event("settings", _as_table(told), run.began))
        self._writer.flush()

    def send(self, points: Sequence[Point]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            if point.round <= self._sent:
                continue
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._writer.add_event(Event(wall_time=point.time, step=point.round, summary=Summary(value=values)))
            self._sent = point.round
        self._writer.flush()

    def end(self, ending: Ending) -> None:
        told = {"state": ending.status, "reason": ending.reason, **ending.sums}
        self._writer.add_event(_text_event("end", _as_table(told), time.time()))
        self._writer.close()


def list_event_files(folder: Path) -> list[Path]:
    """The event files in a folder."""
    return sorted(folder.glob("events.out.tfevents.*"))


def _text_event(tag: str, text: str, when: float) -> Event:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[text.encode()], tensor_shape=shape)
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    value = Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
    return Event(wall_time=when, step=0, summary=Summary(value=[value]))


def _as_table(told: Mapping[str, object]) -> str:
    """A table in Markdown, which TensorBoard shows as one."""
    rows = [f"| {key} | {to_printable(str(value)).replace('|', '¦')} |" for key, value in told.items() if value != ""]
    return "\n".join(["| | |", "| --- | --- |", *rows])
