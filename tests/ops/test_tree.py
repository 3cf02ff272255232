"""Trees of token sequences, and models that read them."""

import doctest

import pytest
import torch
from transformers import AutoConfig, AutoModel

from moslim.ops import prefix_tree as tree_module
from moslim.ops.models import checkpoint_activations
from moslim.ops.prefix_tree import along, grow, in_order, reads_trees
from tests.helpers.policy_models import SMALL

ROWS = [[5, 6, 7], [9], [5, 6], [5, 6, 7, 8], [5, 4], [9], [5, 6, 7]]
CPU = torch.device("cpu")


@pytest.fixture
def sequences():
    """Seven sequences, of which some are others' beginnings or equal; what stands behind them is noise."""
    ids = torch.randint(40, 50, (7, 5), generator=torch.Generator().manual_seed(0))
    for row, own in enumerate(ROWS):
        ids[row, : len(own)] = torch.tensor(own)
    return ids, torch.tensor(list(map(len, ROWS)))


def build(kind, **options):
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **{**SMALL, **options})).eval()


def test_the_example_of_the_docstring_is_right():
    found = doctest.testmod(tree_module)
    assert found.attempted > 5 and not found.failed


def test_every_beginning_is_there_once(sequences):
    tree = grow(*sequences)
    beginnings = {tuple(row[:end]) for row in ROWS for end in range(1, len(row) + 1)}
    assert len(tree.tokens) == len(beginnings) == 6  # 9, 5, 5 4, 5 6, 5 6 7, 5 6 7 8
    paths = [tuple(tree.nodes[i, : len(row)].tolist()) for i, row in enumerate(ROWS)]
    assert len({path[:end] for path in paths for end in range(1, len(path) + 1)}) == 6
    for path, row in zip(paths, ROWS, strict=True):
        assert tree.tokens[list(path)].tolist() == row and tree.positions[list(path)].tolist() == list(range(len(row)))
    assert torch.equal(tree.paths.flatten()[tree.cells], torch.arange(6))
    assert {tuple(path) for path in tree.paths.tolist()} <= {tuple(path) for path in tree.nodes.tolist()}
    assert len(tree.paths) < 7  # of equal sequences one is enough


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 100])
def test_parts_hold_few_nodes_and_every_sequence_once(sequences, tokens):
    ids, lengths = sequences
    parts = list(in_order(ids, lengths).parts(tokens))
    assert sorted(i for part in parts for i in part.order.tolist()) == list(range(7))
    for part in parts:
        tree, alone = part.tree(), grow(ids[part.order], lengths[part.order])
        assert len(tree.tokens) <= tokens or len(part.order) == 1
        assert len(tree.tokens) == len(alone.tokens)
        for row, length in enumerate(part.lengths.tolist()):
            assert tree.tokens[tree.nodes[row, :length]].tolist() == ROWS[part.order[row]]
    assert tokens < 6 or len(parts) == 1
    assert list(in_order(ids[:0], lengths[:0]).parts(tokens)) == []


def test_long_beginnings_make_small_parts():
    """Attention reads every sequence whole: 16 of 41 tokens, which differ in the last."""
    ids = torch.arange(41).repeat(16, 1)
    ids[:, -1] += torch.arange(16)
    parts = list(in_order(ids, torch.full((16,), 41)).parts(64))
    assert [len(part.order) for part in parts] == [12, 4]  # 12 * 41 <= 8 * 64 < 13 * 41


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("gemma3_text", {"head_dim": 8, "sliding_window": 2}),
        ("phi3", {"sliding_window": 2}),
        ("mixtral", {}),
    ],
)
def test_states_are_those_of_each_sequence(kind, options, sequences):
    model = build(kind, num_key_value_heads=1, **options)
    assert reads_trees(model, CPU)
    ids, lengths = sequences
    ids = ids.clamp(max=39)
    before = model.config._attn_implementation
    with along(model, grow(ids, lengths)) as inputs:
        found = model(**inputs).last_hidden_state[0]
    assert model.config._attn_implementation == before
    nodes = grow(ids, lengths).nodes
    for row, length in enumerate(lengths.tolist()):
        alone = model(input_ids=ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(found[nodes[row, :length]], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("mamba", {"state_size": 4}),
        ("gptj", {"n_embd": 16, "n_layer": 2, "n_head": 2, "rotary_dim": 4}),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2}),
        ("phimoe", {"num_key_value_heads": 1, "sliding_window": 4}),  # three whose windows are in their masks alone
        (
            "qwen2_moe",
            {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        ),
        ("doge", {"num_key_value_heads": 1, "keep_window_size": 8}),
        ("bert", {}),
        ("t5", {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 2}),
        ("bloom", {}),
        ("gemma2", {"num_key_value_heads": 1, "head_dim": 8, "attn_logit_softcapping": 0.1}),
    ],
)
def test_what_cannot_read_a_tree_is_found_out(kind, options):
    assert not reads_trees(build(kind, **options), CPU)


def test_activations_that_are_computed_twice_stand_in_the_way():
    model = build("llama")
    checkpoint_activations(model)
    assert reads_trees(model.eval(), CPU) and not reads_trees(model.train(), CPU)


def test_gradients_are_those_of_each_sequence(sequences):
    """In bfloat16, gradients that meet in a node are added up in float32: 7 sequences from one token on."""
    ids, lengths = sequences
    ids = ids.clamp(max=39)
    for dtype, allowed in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        model = build("llama").to(dtype)
        alone = sum(model(input_ids=ids[i : i + 1, :n]).last_hidden_state.sum() for i, n in enumerate(lengths.tolist()))
        wanted = torch.autograd.grad(alone, list(model.parameters()))
        tree = grow(ids, lengths)
        with along(model, tree) as inputs:
            nodes = model(**inputs).last_hidden_state[0]
        inside = torch.arange(5) < lengths[:, None]
        found = torch.autograd.grad(nodes[tree.nodes[inside]].sum(), list(model.parameters()))
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).norm() <= allowed * other.norm() + 1e-4


def test_what_a_model_is_set_to_comes_back_whatever_happens(sequences):
    config = AutoConfig.for_model("gemma3", text_config={**SMALL, "num_key_value_heads": 1, "head_dim": 8})
    model = build("llama")
    model.config = config
    config._attn_implementation = "sdpa"
    config.vision_config._attn_implementation = "eager"
    with pytest.raises(RuntimeError, match="on the way"), along(model, grow(*sequences)):
        assert config.get_text_config()._attn_implementation == "moslim_tree"
        raise RuntimeError("on the way")
    found = [one._attn_implementation for one in (config, config.text_config, config.vision_config)]
    assert found == ["sdpa", "sdpa", "eager"]
