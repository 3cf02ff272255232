import pytest
import torch
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer

from moslim.generation.kv_cache import GrowingCache, GrowingLayer


def states(rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, 3, tokens, 4, generator=generator).unbind()


def assert_equal(one, other):
    assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    assert one.get_seq_length() == other.get_seq_length()


def test_it_holds_what_transformers_own_layer_holds():
    ours, theirs = GrowingLayer(rows=6, room=4), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(*states(2, 5, 0))  # the prompt
        layer.batch_select_indices(torch.arange(2).repeat_interleave(3))
    for step in range(11):  # beyond the room, twice
        returned = [layer.update(*states(len(layer.keys), 1, step)) for layer in (ours, theirs)]
        assert torch.equal(returned[0][0], returned[1][0]) and torch.equal(returned[0][1], returned[1][1])
        assert_equal(ours, theirs)
        if step in (3, 4, 8):  # rows leave, at once and between tokens
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.arange(len(layer.keys))[1:])
            assert_equal(ours, theirs)
        if step in (5, 9):  # a row goes on as two
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([0, *range(len(layer.keys))]))
            assert_equal(ours, theirs)
    for layer in (ours, theirs):
        layer.batch_select_indices(torch.arange(8) % 3)  # more rows than there is room for
        layer.update(*states(8, 7, 99))  # many tokens at once
        layer.crop(-2)
        layer.update(*states(8, 1, 100))
    assert_equal(ours, theirs)


def test_tokens_within_the_room_are_written_in_place():
    layer = GrowingLayer(rows=2, room=4)
    layer.update(*states(2, 5, 0))
    places = []
    for step in range(6):
        layer.update(*states(2, 1, step))
        places.append((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(set(places[:4])) == 1 and places[4] != places[3] and places[5] == places[4]


@pytest.mark.parametrize("kept", [[2, 0], [0, 2], [2, 1], [1], [1, 1, 2], [0, 2, 2, 0]])
def test_chosen_rows_do_not_write_into_the_others(kept):
    layer = GrowingLayer(rows=4, room=4)
    layer.update(*states(3, 5, 0))
    before = layer.update(*states(3, 1, 1))[0].clone()
    place = layer.keys.data_ptr()
    layer.batch_select_indices(torch.tensor(kept))
    keys, _ = layer.update(*states(len(kept), 1, 2))
    assert torch.equal(keys[:, :, :6], before[kept]) and keys.data_ptr() == place


def test_repeated_rows_have_room_at_once():
    layer = GrowingLayer(rows=6, room=4)
    before = layer.update(*states(2, 5, 0))[0].clone()
    layer.batch_select_indices(torch.tensor([0, 1, 1]))
    place = layer.keys.data_ptr()
    layer.update(*states(3, 1, 1))
    layer.batch_select_indices(torch.tensor([0, 1, 2, 0, 2, 0]))
    for step in range(3):
        keys, _ = layer.update(*states(6, 1, step))
    assert torch.equal(keys[:, :, :5], before[[0, 1, 1, 0, 1, 0]]) and keys.data_ptr() == place


def test_layers_of_another_kind_stay_as_they_are():
    config = AutoConfig.for_model("mistral", num_hidden_layers=2, sliding_window=6)
    assert not any(isinstance(layer, GrowingLayer) for layer in GrowingCache(config, 3, 5).layers)
    full = GrowingCache(AutoConfig.for_model("llama", num_hidden_layers=2), 3, 5)
    assert isinstance(full, DynamicCache) and [type(layer) for layer in full.layers] == [GrowingLayer] * 2
