"""Reads what a TensorBoard logger wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def summaries(log: Path) -> Iterator[tuple[int, Any]]:
    """Yields the step and each summary value of an events file."""
    from tensorboardX.proto.event_pb2 import Event

    data = log.read_bytes()
    while data:  # records: length, its checksum, an event, its checksum
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            yield event.step, value
