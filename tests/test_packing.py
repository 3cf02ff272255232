"""Which answers share a forward pass."""

import pytest
import torch

from moslim.packing import AnswerBatch, chunks_by_length, distinct_prompts, like_length, shared_prompts, sharing_pays
from moslim.policy.passes import Passes

PROMPTS, ANSWERS = [3, 6, 2], [[2, 5], [1, 4, 3], [5, 2]]


@pytest.fixture
def batch():
    """Seven answers to three prompts of 3, 6 and 2 tokens; padding holds all sorts of things."""
    owner = torch.tensor([i for i, lengths in enumerate(ANSWERS) for _ in lengths])
    lengths = torch.tensor([length for lengths in ANSWERS for length in lengths])
    texts = torch.randint(10, 90, (3, 6), generator=torch.Generator().manual_seed(0))
    prompt = torch.arange(6) >= 6 - torch.tensor(PROMPTS)[owner][:, None]
    mask = torch.arange(5) < lengths[:, None]
    noise = torch.randint(90, (7, 11), generator=torch.Generator().manual_seed(1))
    noise[:, :6] = torch.where(prompt, texts[owner], noise[:, :6])
    return AnswerBatch(noise, torch.cat([prompt, mask], dim=1).long(), mask)


def real(ids, mask):
    """Rows without their padding."""
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]


def assert_holds(chunk, batch):
    """A chunk's rows are the batch's, cut to the widest of them."""
    everything = real(batch.input_ids, batch.attention_mask)
    assert real(chunk.input_ids, chunk.attention_mask) == [everything[i] for i in chunk.index.tolist()]
    assert torch.equal(chunk.mask, batch.mask[chunk.index, : chunk.mask.shape[1]])
    answers = [row[-length:] for row, length in zip(everything, batch.mask.sum(dim=1).tolist(), strict=True)]
    assert real(chunk.tokens, chunk.mask) == [answers[i] for i in chunk.index.tolist()]
    assert chunk.mask.any(dim=0).all()


def test_rows_of_like_length_go_together():
    assert list(like_length([5, 1, 9, 2, 2, 30], 10)) == [[1, 3, 4], [0], [2], [5]]
    assert list(like_length([], 10)) == []


def test_chunks_hold_like_lengths_and_no_common_padding(batch):
    chunks = list(chunks_by_length(batch, 24))
    assert [chunk.index.tolist() for chunk in chunks] == [[6, 0, 2], [5, 1], [4, 3]]
    assert [tuple(chunk.input_ids.shape) for chunk in chunks] == [(3, 6 + 2), (2, 3 + 5), (2, 6 + 4)]
    for chunk in chunks:
        assert_holds(chunk, batch)
        assert chunk.attention_mask.any(dim=0).all()


@pytest.mark.parametrize(("tokens", "count"), [(1, 7), (11, 6), (22, 4), (77, 1), (10**6, 1)])
def test_a_chunk_has_an_answer_and_no_more_tokens_than_allowed(batch, tokens, count):
    chunks = list(chunks_by_length(batch, tokens))
    assert len(chunks) == count and sorted(i for c in chunks for i in c.index.tolist()) == list(range(7))
    assert all(len(c.index) == 1 or c.input_ids.numel() <= tokens for c in chunks)


def test_chunks_among_some_rows(batch):
    assert [c.index.tolist() for c in chunks_by_length(batch, 99, torch.tensor([6, 4, 1]))] == [[6, 1, 4]]
    assert list(chunks_by_length(batch, 99, torch.tensor([], dtype=torch.long))) == []


def test_equal_prompts_are_found_by_their_ids_whatever_the_order_and_the_padding(batch):
    rows = torch.tensor([5, 3, 0, 6, 4])
    shown, owner = distinct_prompts(batch, rows)
    assert len(shown) == 3 and set(shown.tolist()) <= set(rows.tolist())
    prompts = real(batch.input_ids[:, :6], batch.attention_mask[:, :6])
    assert [prompts[i] for i in shown[owner].tolist()] == [prompts[i] for i in rows.tolist()]


@pytest.mark.parametrize(("tokens", "groups"), [(99, [3]), (9, [2, 1]), (1, [1, 1, 1])])
@pytest.mark.parametrize("among", [None, torch.tensor([6, 1, 3, 4, 0, 5])])
def test_shared_prompts_are_there_once_with_all_their_answers(batch, tokens, groups, among):
    found = list(shared_prompts(batch, tokens, among))
    assert [len(prompts.input_ids) for prompts in found] == groups
    prompts = real(batch.input_ids[:, :6], batch.attention_mask[:, :6])
    seen = []
    for block in found:
        assert len(block.input_ids) == 1 or block.input_ids.numel() <= tokens
        shown = real(block.input_ids, block.attention_mask)
        assert block.attention_mask.any(dim=0).all()
        for chunk, owners in zip(block.chunks, block.owners, strict=True):
            assert_holds(chunk, batch)
            assert len(chunk.index) == 1 or chunk.mask.numel() <= tokens
            width = chunk.input_ids.shape[1] - chunk.mask.shape[1]
            assert torch.equal(chunk.attention_mask[:, :width], block.attention_mask[owners])
            assert [shown[i] for i in owners.tolist()] == [prompts[i] for i in chunk.index.tolist()]
            seen += chunk.index.tolist()
    assert sorted(seen) == sorted(range(7) if among is None else among.tolist())


def test_long_prompts_make_small_chunks():
    """Each answer holds a copy of its prompt's keys and values: 16 answers to one prompt of 40 tokens."""
    ids, mask = torch.arange(42).repeat(16, 1), torch.ones(16, 2, dtype=torch.bool)
    (block,) = shared_prompts(AnswerBatch(ids, torch.ones_like(ids), mask), 32)
    assert [len(chunk.index) for chunk in block.chunks] == [6, 6, 4]  # 6 * 42 <= 8 * 32 < 7 * 42
    assert sorted(i for chunk in block.chunks for i in chunk.index.tolist()) == list(range(16))


def test_nothing_to_share(batch):
    none = torch.tensor([], dtype=torch.long)
    assert list(shared_prompts(batch, 9, none)) == [] and not sharing_pays(batch, none)


def test_sharing_pays_where_it_saves_tokens(batch):
    # 2 * 3 + 3 * 6 + 2 * 2 tokens of prompts and 22 of answers; prompts once: 11 and 22.
    assert sharing_pays(batch)
    assert not sharing_pays(batch, torch.tensor([0, 2, 5]))  # one answer to each prompt
    assert not sharing_pays(batch, torch.tensor([5, 6]))  # 11 tokens become 9: less than a fifth is saved
    assert sharing_pays(batch, torch.tensor([2, 3, 4]))  # 26 become 14


@pytest.mark.parametrize(("options", "message"), [({"tokens": 0}, "1 or more"), ({"share_prompts": "yes"}, "'auto'")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError) as error:
        Passes(**options)
    assert message in str(error.value)


def test_passes_are_small_on_a_cpu_unless_told_otherwise():
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert (
        Passes().limit(cpu) < Passes().limit(other)
        and Passes(tokens=7).limit(cpu) == Passes(tokens=7).limit(other) == 7
    )
