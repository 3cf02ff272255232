"""Reads an offline W&B run's own log with W&B's own reader."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class OfflineRun:
    """What a run's log says.

    Args:
        id: Of the run.
        history: Logged values, row by row.
        metrics: By name or ``beginning*``: the x-axis and the summaries that were defined.
        config: The run's configuration.
        artifacts: Kind by name.
        pictures: Files by name.
    """

    id: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, tuple[str, frozenset[str]]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, list[Path]] = field(default_factory=dict)


def read(folder: Path) -> OfflineRun:
    """Reads an ``offline-run-*`` folder."""
    (log,) = folder.glob("run-*.wandb")
    run = OfflineRun()
    for record in _records(log):
        kind = record["type"]
        body = record.get(kind, {})
        if kind == "run":
            run.id = body["run_id"]
        elif kind == "config":
            run.config |= body["update"]
        elif kind == "history":
            run.history.append(body["item"])
            for name, value in body["item"].items():
                if name.endswith(".filenames"):
                    run.pictures[name.removesuffix(".filenames")] = [folder / "files" / file for file in value]
        elif kind == "metric":
            summaries = frozenset(name for name, wanted in body.get("summary", {}).items() if wanted)
            run.metrics[body.get("glob_name") or body["name"]] = (body.get("step_metric", ""), summaries)
        elif kind == "artifact":
            run.artifacts[body["name"]] = body["type"]
    return run


def _records(log: Path) -> list[dict[str, Any]]:
    """The log's records, as `wandb leet inspect` prints them; releases without it have a reader in Python."""
    try:
        from wandb.sdk.internal.datastore import DataStore
    except ImportError:
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        return [json.loads(line) for line in lines]
    from google.protobuf.json_format import MessageToDict
    from wandb.proto.wandb_internal_pb2 import Record

    store, records = DataStore(), []
    store.open_for_scan(str(log))
    while data := store.scan_data():
        message = Record.FromString(data)
        kind = message.WhichOneof("record_type")
        body = MessageToDict(getattr(message, kind), preserving_proto_field_name=True)
        for key in ("item", "update"):
            if kind in ("history", "config") and key in body:
                body[key] = _nested(body[key])
        records.append({"type": kind, kind: body})
    return records


def _nested(items: list[dict[str, Any]]) -> dict[str, Any]:
    return {".".join(item.get("nested_key") or [item["key"]]): json.loads(item["value_json"]) for item in items}
