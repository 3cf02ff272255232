"""From a column of a row to the levels that a policy was asked for."""

from __future__ import annotations

from moslim.data.sources.fields import require
from moslim.data.sources.labels import level_of
from moslim.data.sources.records import Record
from moslim.data.sources.scale import Scale, is_missing
from moslim.errors import UsageError
from moslim.literals import quoted
from moslim.preferences import PreferenceSet


def requested_levels(record: Record, path: str, preferences: PreferenceSet) -> dict[str, int]:
    """Returns level by dimension name; dimensions that were not asked for, or are not in use, are left out.

    Args:
        record: The row.
        path: Where it holds an object with a level for each dimension that was asked for; null = for none.
        preferences: The dimensions in use.

    Raises:
        UsageError: There is no such column, or it holds something else.
    """
    asked = require(record, path, "requested")
    where = f"{record.place}, field '{path}'"
    if asked is None:
        return {}
    if not isinstance(asked, dict):
        raise UsageError(f"{where}: {quoted(asked)} is no object with the level of each dimension")
    return {
        dimension.name: level_of(asked[dimension.name], Scale(), dimension, where)
        for dimension in preferences.dimensions
        if not is_missing(asked.get(dimension.name))
    }
