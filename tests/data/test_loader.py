import pytest
import torch
from torch.utils.data import Dataset

from moslim.data.loader import (
    Draw,
    OrderedBatches,
    RepeatBatchSampler,
    ResumableLoader,
    TokenBudget,
    ordered_batches,
)


class Numbers(Dataset):
    """Ten times the epoch plus the row."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, draw):
        return 100 * draw.epoch + draw.row


def rows(sampler):
    return [[draw.row for draw in batch] for batch in sampler]


def test_each_batch_comes_repeats_times_in_a_row():
    sampler = RepeatBatchSampler(11, 3, seed=1, repeats=4)
    batches = rows(sampler)
    assert len(batches) == len(sampler) == 12
    assert all(batches[i] == batches[i // 4 * 4] for i in range(12))
    seen = [row for batch in batches[::4] for row in batch]
    assert len(set(seen)) == 9
    assert batches[::4] == rows(RepeatBatchSampler(11, 3, seed=1))


def test_order_is_a_function_of_seed_and_epoch():
    sampler = RepeatBatchSampler(20, 4, seed=1)
    first = rows(sampler)
    assert rows(sampler) == first
    sampler.set_epoch(1)
    assert rows(sampler) != first
    assert next(iter(sampler))[0].epoch == 1
    assert rows(RepeatBatchSampler(20, 4, seed=2)) != first


def test_epochs_can_be_all_the_same():
    sampler = RepeatBatchSampler(20, 4, seed=1, same_epochs=True)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == first and rows(RepeatBatchSampler(20, 4, seed=1)) == [[d.row for d in b] for b in first]


@pytest.mark.parametrize("stages", [None, [0] * 8 + [1] * 12])
@pytest.mark.parametrize("lengths", [None, [i * 7 % 20 for i in range(20)]])
def test_the_slices_of_all_ranks_are_the_batch_of_one_process(lengths, stages):
    together = rows(RepeatBatchSampler(20, 6, seed=1, repeats=2, lengths=lengths, stages=stages))
    parts = [rows(RepeatBatchSampler(20, 2, 1, 2, rank, 3, lengths, stages)) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*parts, strict=True)] == together


def test_an_epoch_goes_through_stage_after_stage_and_mixes_the_rows_of_each():
    stages = [2, 0, 1] * 10
    lengths = [i * 7 % 30 for i in range(30)]
    sampler = RepeatBatchSampler(30, 4, seed=1, repeats=2, lengths=lengths, stages=stages)
    batches = rows(sampler)
    assert len(batches) == len(sampler) == 12  # two batches of each stage, twice; two rows of each are left over
    assert [{stages[row] for row in batch} for batch in batches] == [{0}] * 4 + [{1}] * 4 + [{2}] * 4
    assert len({row for batch in batches for row in batch}) == 24
    sampler.start = 5
    assert rows(sampler) == batches[5:]
    sampler.set_epoch(1)
    later = rows(sampler)
    assert all(later[i : i + 4] != batches[i : i + 4] for i in (0, 4, 8))


def test_a_stage_with_too_few_rows_for_a_batch_is_an_error():
    with pytest.raises(ValueError, match="only 3 training rows of one stage, too few for one batch of 4"):
        RepeatBatchSampler(13, 4, stages=[0] * 10 + [1] * 3)


def test_rows_of_like_length_share_a_batch():
    lengths = torch.randint(1, 100, (400,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(batches):
        return sum(len(batch) * max(lengths[r] for r in batch) - sum(lengths[r] for r in batch) for batch in batches)

    plain, grouped = (rows(RepeatBatchSampler(400, 8, seed=3, lengths=n)) for n in (None, lengths))
    assert padding(grouped) < 0.1 * padding(plain)
    assert sorted(row for batch in grouped for row in batch) == list(range(400))
    maxima = [max(lengths[r] for r in batch) for batch in grouped]
    assert maxima != sorted(maxima)
    assert grouped == rows(RepeatBatchSampler(400, 8, seed=3, lengths=lengths))


def test_too_few_rows():
    with pytest.raises(ValueError, match="only 7 training rows, too few for one batch of 4 on each of 2 processes"):
        RepeatBatchSampler(7, 4, ranks=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_goes_on_behind_the_finished_batches(workers):
    def build(position):
        sampler = RepeatBatchSampler(12, 3, seed=5, repeats=2)
        return ResumableLoader(Numbers(12), sampler, sorted, lambda: position, workers)

    whole = build((3, 5))
    whole.batch_sampler.set_epoch(3)
    batches = list(whole)
    assert whole.state_dict() == {"epoch": 3, "done": 5}
    resumed = build((0, 0))
    resumed.load_state_dict(whole.state_dict())
    assert list(resumed) == batches[5:]
    assert len(resumed) == 8
    assert list(resumed) == batches  # the epoch after it is whole again


@pytest.mark.parametrize(("count", "size", "ranks"), [(10, 4, 1), (10, 2, 2), (9, 2, 4), (3, 8, 2), (7, 1, 3)])
def test_evaluation_sees_every_row_once_and_every_rank_has_as_many_batches(count, size, ranks):
    parts = [list(OrderedBatches(Numbers(count), size, list, rank, ranks)) for rank in range(ranks)]
    assert len({len(part) for part in parts}) == 1
    assert all(batch for part in parts for batch in part)
    in_order = [row for batches in zip(*parts, strict=True) for batch in batches for row in batch]
    assert in_order == list(range(count))
    assert max(len(batch) for part in parts for batch in part) <= size + 1


def test_evaluation_needs_a_row_for_every_rank():
    with pytest.raises(ValueError, match="2 rows cannot be shared out to 3 processes"):
        ordered_batches(2, 4, 3)


def test_a_draw_is_what_the_data_set_is_asked_for():
    sampler = RepeatBatchSampler(2, 2)
    sampler.set_epoch(6)
    assert sorted(next(iter(sampler))) == [Draw(6, 0), Draw(6, 1)]


def budget_of(count, tokens):
    generator = torch.Generator().manual_seed(0)
    widths = torch.randint(5, 120, (count,), generator=generator).tolist()
    texts = [2 if i % 7 == 0 else 1 for i in range(count)]
    return TokenBudget(tokens, widths, texts)


def cost(batch, budget):
    return max(budget.widths[row] for row in batch) * sum(budget.texts[row] for row in batch)


def test_a_token_budget_is_kept_with_little_padding_and_every_row():
    budget = budget_of(2000, 1024)
    sampler = RepeatBatchSampler(2000, 16, seed=1, budget=budget)
    batches = rows(sampler)
    assert len(batches) == len(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(2000))
    padded = sum(cost(batch, budget) for batch in batches)
    assert padded < sum(width * texts for width, texts in zip(budget.widths, budget.texts, strict=True)) / 0.9
    assert max(cost(batch, budget) for batch in batches) <= 1024
    assert padded / len(batches) > 0.85 * 1024  # as full as can be
    maxima = [max(budget.widths[row] for row in batch) for batch in batches]
    assert maxima != sorted(maxima)


def test_epochs_of_a_token_budget_mix_rows_anew_but_have_as_many_batches():
    sampler = RepeatBatchSampler(300, 16, seed=1, stages=[i % 2 for i in range(300)], budget=budget_of(300, 600))
    epochs = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        epochs.append(rows(sampler))
    assert {len(batches) for batches in epochs} == {len(sampler)}
    assert len({frozenset(map(frozenset, batches)) for batches in epochs}) == 5
    sampler.start = 4
    assert rows(sampler) == epochs[4][4:]


def test_the_ranks_of_a_token_budget_share_the_batch_of_one_process():
    """But for a last batch with fewer rows than ranks, which joins the one before it."""
    together = rows(RepeatBatchSampler(304, 1, seed=2, budget=budget_of(304, 1200)))
    parts = [rows(RepeatBatchSampler(304, 1, 2, 1, rank, 3, budget=budget_of(304, 400))) for rank in range(3)]
    assert [a + b + c for a, b, c in zip(*parts, strict=True)] == together
    assert all(batch for part in parts for batch in part)


def test_a_row_beyond_the_budget_makes_a_batch_of_its_own():
    budget = TokenBudget(10, [50, 4, 4, 30], [1, 1, 1, 2])
    assert sorted(map(sorted, rows(RepeatBatchSampler(4, 1, budget=budget)))) == [[0], [1, 2], [3]]
    with pytest.raises(ValueError, match="too few for one batch of 1 on each of 5"):
        RepeatBatchSampler(4, 1, ranks=5, budget=budget)
