import pytest
from lightning.pytorch import Callback

from moslim.plugin import Plugin, all_parts, part_callbacks


class Part(Plugin):
    role = "part"

    def __init__(self, *children):
        self._children = children

    @property
    def children(self):
        return self._children


class Finer(Part):
    role = "finer"


def test_the_state_key_tells_role_and_class_apart():
    assert Part().state_key == "part:tests.test_plugin.Part"
    assert Finer().state_key == "finer:tests.test_plugin.Finer"


def test_parts_come_before_those_inside_of_them_with_their_places():
    inner = Part(Finer(), Finer())
    outer, other = Part(Finer(), inner), Finer()
    parts = all_parts([outer, other])
    assert parts == [outer, outer.children[0], inner, *inner.children, other]
    assert [part.place for part in parts] == ["", ".0", ".1", ".1.0", ".1.1", ""]
    keys = [part.state_key for part in parts]
    assert keys[3:5] == ["finer.1.0:tests.test_plugin.Finer", "finer.1.1:tests.test_plugin.Finer"]
    assert len(set(keys)) == 6
    assert all_parts([outer, other]) == parts and [part.state_key for part in parts] == keys  # asked a second time


def test_part_callbacks_are_the_parts():
    part = Part(Finer())
    assert part_callbacks([part], [Callback()]) == [part, part.children[0]]
    assert part_callbacks([part], [part, part.children[0], Callback()]) == [part, part.children[0]]  # a later stage


@pytest.mark.parametrize("listed", [Part, Finer])
def test_a_type_that_lightning_would_drop_is_refused(listed):
    role = "part" if listed is Part else "finer"
    with pytest.raises(ValueError, match=rf"trainer\.callbacks lists a {listed.__name__}, .* model's {role}: remove"):
        part_callbacks([Part(Finer())], [listed()])


def test_a_parent_class_is_refused_and_a_derived_one_is_not():
    with pytest.raises(ValueError, match="lists a Part"):
        part_callbacks([Finer()], [Part()])
    part = Part()
    assert part_callbacks([part], [Finer()]) == [part]


def test_one_part_in_two_places_is_refused():
    part = Part()
    with pytest.raises(ValueError, match="the same Part instance occurs twice in the model's part"):
        all_parts([Part(part, Finer(part))])
    assert len(all_parts([Part(Part(), Part())])) == 3
