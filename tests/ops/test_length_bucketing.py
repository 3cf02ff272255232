"""Which answers share a forward pass."""

import pytest
import torch

from moslim.ops.length_bucketing import CompletionBatch, chunks_by_length, like_length, worthwhile
from moslim.ops.logprobs import ForwardConfig

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
    return CompletionBatch(noise, torch.cat([prompt, mask], dim=1).long(), mask)


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


def test_sequences_begin_at_the_first_column_whatever_the_padding(batch):
    rows = torch.tensor([5, 2, 0])
    ids, lengths = batch.sequences(rows)
    everything = real(batch.input_ids, batch.attention_mask)
    assert lengths.tolist() == [2 + 5, 6 + 1, 3 + 2] and ids.shape == (3, 7)
    assert [row[:length] for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)] == [
        everything[i] for i in rows.tolist()
    ]


def test_sharing_is_worth_it_where_it_saves_a_fifth():
    assert worthwhile(8, 10) and not worthwhile(9, 10)


@pytest.mark.parametrize(("options", "message"), [({"tokens": 0}, "1 or more"), ({"share_prefixes": "yes"}, "'auto'")])
def test_wrong_options(options, message):
    with pytest.raises(ValueError) as error:
        ForwardConfig(**options)
    assert message in str(error.value)


def test_passes_are_small_on_a_cpu_unless_told_otherwise():
    cpu, other = torch.device("cpu"), torch.device("meta")
    assert (
        ForwardConfig().limit(cpu) < ForwardConfig().limit(other)
        and ForwardConfig(tokens=7).limit(cpu) == ForwardConfig(tokens=7).limit(other) == 7
    )
