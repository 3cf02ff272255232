"""Judged answers as plain records: for the console, files and dashboards."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moslim.data.types import Question
from moslim.preferences import INACTIVE, PreferenceSet
from moslim.utils.files import whole_file
from moslim.utils.sequences import evenly_spaced

Row = dict[str, Any]


class JudgedAnswers(Protocol):
    """What is read of a rollout: ``N`` answers, ``D`` dimensions, at most ``K`` levels."""

    @property
    def questions(self) -> Sequence[Question]: ...
    @property
    def answers(self) -> Sequence[str]: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def probs(self) -> Tensor: ...
    @property
    def per_dimension(self) -> Tensor: ...
    @property
    def rewards(self) -> Tensor: ...
    @property
    def answer_advantages(self) -> Tensor: ...


def answer_rows(rollout: JudgedAnswers, preferences: PreferenceSet, step: int, count: int) -> list[Row]:
    """Takes ``count`` answers, evenly spread, as plain data.

    ``requested`` and ``rewards`` leave out a dimension that was not asked for; ``probabilities`` holds all of them.
    """
    names, total = preferences.names, len(rollout.answers)
    rows = []
    for i in evenly_spaced(total, count):
        targets, rewards = rollout.targets[i].tolist(), rollout.per_dimension[i].tolist()
        asked = [d for d, target in enumerate(targets) if target != INACTIVE]
        levels = zip(preferences.dimensions, rollout.probs[i].tolist(), strict=True)
        rows.append(
            {
                "step": step,
                "question": _text(rollout.questions[i]),
                "requested": {names[d]: preferences.dimensions[d].levels[targets[d]] for d in asked},
                "answer": rollout.answers[i],
                "probabilities": {d.name: [_finite(p) for p in probs[: len(d.levels)]] for d, probs in levels},
                "rewards": {names[d]: _finite(rewards[d]) for d in asked},
                "reward": _finite(float(rollout.rewards[i])),
                "advantage": _finite(float(rollout.answer_advantages[i])),
            }
        )
    return rows


def append(file: Path, rows: list[Row]) -> None:
    """Adds rows to a JSON Lines file, which is created where it does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def write_parquet(lines: Path, names: Sequence[str]) -> Path:
    """Writes the rows of a JSON Lines file as parquet beside it, flat, with the columns of :func:`flat`.

    Args:
        lines: What :func:`append` wrote.
        names: The dimensions.
    """
    import pyarrow
    import pyarrow.parquet

    types = {"step": pyarrow.int64(), "reward": pyarrow.float64(), "advantage": pyarrow.float64()}
    for name in names:
        types |= {f"{name}/reward": pyarrow.float64(), f"{name}/probabilities": pyarrow.list_(pyarrow.float64())}
    with lines.open(encoding="utf-8") as stream:  # not splitlines(), which cuts at more than line ends
        rows = [flat(json.loads(line), names) for line in stream]
    schema = pyarrow.schema([(column, types.get(column, pyarrow.string())) for column in rows[0]])
    path = lines.with_suffix(".parquet")
    with whole_file(path) as part:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), part)
    return path


def flat(row: Row, names: Sequence[str]) -> Row:
    """One value per column: ``preference`` as text, and per dimension ``/requested``, ``/reward``, ``/probabilities``.

    Args:
        row: Of :func:`answer_rows`.
        names: The dimensions.
    """
    asked = ", ".join(f"{name}: {level}" for name, level in row["requested"].items())
    columns: Row = {"step": row["step"], "question": row["question"], "preference": asked, "answer": row["answer"]}
    columns |= {"reward": row["reward"], "advantage": row["advantage"]}
    for name in names:
        columns[f"{name}/requested"] = row["requested"].get(name)
        columns[f"{name}/reward"] = row["rewards"].get(name)
        columns[f"{name}/probabilities"] = row["probabilities"][name]
    return columns


def escaped(value: Any) -> Any:
    """A cell for W&B, whose tables show HTML: text is escaped, a list of numbers becomes text."""
    if isinstance(value, list):
        return " ".join("-" if number is None else f"{number:.2f}" for number in value)
    return html.escape(value) if isinstance(value, str) else value


def _text(question: Question) -> str:
    if isinstance(question, str):
        return question
    return "\n".join(f"{message['role']}: {message['content']}" for message in question)


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
