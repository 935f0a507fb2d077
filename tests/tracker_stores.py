"""What trackers hold, read back through the reader of each: (name, round) → the values that stand there."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Held = dict[tuple[str, int], list[float]]


def read_tensorboard(run: Path) -> Held:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: Held = defaultdict(list)
    for file in sorted((run / "tensorboard").iterdir()):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found[value.tag, event.step].append(value.tensor.float_val[0])
    return dict(found)


def mlflow_runs(project: str = "fedloom") -> list:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    return client.search_runs([client.get_experiment_by_name(project).experiment_id])


def read_mlflow(run: Path, project: str = "fedloom") -> Held:
    from mlflow.tracking import MlflowClient

    (held,) = mlflow_runs(project)
    history = {name: MlflowClient().get_metric_history(held.info.run_id, name) for name in held.data.metrics}
    found: Held = defaultdict(list)
    for name, points in history.items():
        for point in points:
            found[name, point.step].append(point.value)
    return dict(found)


def read_trackio(run: Path) -> Held:
    from trackio import SQLiteStorage

    found: Held = defaultdict(list)
    (name,) = SQLiteStorage.get_runs("fedloom")
    for log in SQLiteStorage.get_logs("fedloom", name):
        for key, value in log.items():
            if "/" in key:
                found[key, log["step"]].append(value)
    return dict(found)


def read_wandb(run: Path) -> Held:
    """From the files of offline runs that would be synced, once its own process has written their ends."""
    import json
    import time

    from wandb.proto import wandb_internal_pb2

    found: Held = defaultdict(list)
    for file in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        records = []
        while not any(record.HasField("exit") for record in records):
            time.sleep(0.1)
            records = [wandb_internal_pb2.Record.FromString(data) for data in log_records(file.read_bytes())]
        for record in records:
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for key, value in items.items():
                if "/" in key:
                    found[key, int(items["_step"])].append(json.loads(value))
    return dict(found)


def log_records(content: bytes) -> Iterator[bytes]:
    """The records of a log as LevelDB lays it out, with W&B's head of 7 bytes in its first block of 32 KiB."""
    place, record = 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


READERS = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
    "wandb": read_wandb,
}


def settle_at(folder: Path, monkeypatch) -> None:
    """Have every tracker keep what it keeps in this folder, and use no network."""
    for name, value in {
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "PYTHONPATH": os.pathsep.join(["src", os.environ.get("PYTHONPATH", "")]),
    }.items():
        monkeypatch.setenv(name, value)
