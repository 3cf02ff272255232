"""Presets on made-up rows of the published schema and, where they are at hand, on the published files themselves.

The files are looked for in ``MOSLIM_DATA``, or else in ``shared/data`` beside the repository.
"""

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from moslim.data.batches import known_levels, level_shares
from moslim.data.sources.combined import ComparisonsFromRatings
from moslim.data.types import Example, RowKind, Source, Split, agreed_level
from moslim.preferences import PreferenceSet
from tests.helpers import published
from tests.helpers.presets import ROOT, built, command, parsed

FOLDER = Path(os.environ.get("MOSLIM_DATA", ROOT.parent / "shared/data"))
FILES = {
    "truthfulqa": ("truthfulqa_judge/truth_info.jsonl.gz", 18311),
    "openassistant": ("oasst1_en_validation/rated_replies.jsonl.gz", 1239),
    "openassistant_hub": ("oasst1_en_validation/messages.jsonl.gz", 1239),
    "openassistant_pairs": ("oasst1_en_validation/ranked_pairs.jsonl.gz", 1026),
    "seahorse": ("seahorse/validation.jsonl.gz", 8968),
    "hh_helpful": ("hh_rlhf/helpful-base.test.jsonl.gz", 2345),
    "hh_harmless": ("hh_rlhf/harmless-base.test.jsonl.gz", 2307),
}
"""By preset: where its published file is, and how many rows the preset makes of it."""
MADE_UP = {
    "truthfulqa": (published.truthfulqa, 2),
    "openassistant": (published.openassistant, 2),
    "openassistant_hub": (published.openassistant_hub, 2),
    "openassistant_pairs": (published.openassistant_pairs, 1),
    "seahorse": (published.seahorse, 2),
    "hh_helpful": (published.hh, 3),
    "hh_harmless": (published.hh, 3),
}
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


class Rows(Source):
    """Rows that are there already."""

    def __init__(self, given: list[Example]) -> None:
        self.given = given

    def rows(self, kind: RowKind, split: Split, preferences: PreferenceSet, seed: int) -> list[Example]:
        return self.given


@functools.cache
def preferences(name: str) -> PreferenceSet:
    return PreferenceSet(**parsed(command(name))["preferences"]["init_args"])


@functools.cache
def read(name: str, file: Path) -> list[Example]:
    """All rows of a file, as training rows."""
    source = parsed(command(name))["data"]["init_args"]["source"]
    source["init_args"] |= {"path": str(file), "validation": None, "test": None}
    source["init_args"] |= {"validation_share": 0.0, "test_share": 0.0}
    return built(source).rows(RowKind.LABELLED, Split.TRAIN, preferences(name), seed=0)


def files(name: str, folder: Path) -> Iterator[tuple[list[Example], int]]:
    """The rows of the made-up file, and of the published one, each with how many are expected."""
    make, count = MADE_UP[name]
    rows = make()
    file = folder / ("rows.tsv" if isinstance(rows, str) else "rows.jsonl")
    file.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
    yield read(name, file), count
    place, count = FILES[name]
    if (FOLDER / place).exists():
        yield read(name, FOLDER / place), count


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_read(name: str, tmp_path: Path) -> None:
    for rows, count in files(name, tmp_path):
        assert len(rows) == count
        assert any(row.levels or row.rejected is not None for row in rows)


@pytest.mark.parametrize("name", ["truthfulqa", "openassistant"])
def test_votes_become_soft_targets(name: str, tmp_path: Path) -> None:
    known = preferences(name)
    for rows, _ in files(name, tmp_path):
        disputed = 0
        for row in rows:
            levels = known.encode(known_levels(row.levels, known))[None]
            shares = level_shares([row], levels, known)[0]
            for d, dimension in enumerate(known.names):
                votes = row.votes.get(dimension, ())
                assert shares[d].sum().item() == pytest.approx(float(dimension in row.levels))
                if votes:
                    assert row.levels[dimension] == agreed_level(votes)
                    assert shares[d, 1].item() == pytest.approx(sum(votes) / len(votes))
                    disputed += len(set(votes)) > 1
        assert disputed > 0


@pytest.mark.parametrize(("name", "dimension"), [("truthfulqa", "informative"), ("openassistant", "fails_task")])
def test_disagreement_makes_the_margin_small(name: str, dimension: str, tmp_path: Path) -> None:
    for rows, count in files(name, tmp_path):
        given = [*rows, Example(rows[0].question, "An answer like no other.", {dimension: 0})]
        found = ComparisonsFromRatings(Rows(given), dimension).rows(RowKind.LABELLED, Split.TRAIN, preferences(name), 0)
        pairs = [row for row in found if row.rejected is not None]
        assert 0 < len(pairs) < count
        for row in pairs:
            votes = row.votes.get(dimension, (row.levels[dimension],))
            assert 0 < row.margin <= sum(votes) / len(votes) and row.comparison_dimensions == (dimension,)
        assert any(row.margin < 1 for row in pairs)
