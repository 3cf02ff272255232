import pytest

from moslim.ops.numerics import evenly_spaced


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(6, 3, [0, 2, 4]), (7, 3, [0, 2, 4]), (3, 5, [0, 1, 2]), (512, 4, [0, 128, 256, 384]), (0, 2, []), (4, 0, [])],
)
def test_indices_have_equal_distances(total, count, expected):
    assert evenly_spaced(total, count) == expected
