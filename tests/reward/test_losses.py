import math

import pytest
import torch

from moslim.reward.losses import CrossEntropy

SIZES = (2, 7)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows: head 0 (two levels) labelled in rows 0 and 1, head 1 (seven levels) in row 2 only."""
    logits = torch.full((3, 2, 7), -torch.inf)
    logits[:, 0, :2] = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [5.0, -5.0]])
    logits[:, 1] = 0.0
    logits[2, 1, 6] = math.log(4)
    return logits.requires_grad_(), torch.tensor([[0, -1], [1, -1], [-1, 6]])


# head 0: (-log 1/2 - log 1/4) / 2 labels; head 1: -log 4/10, over its single label
HEADS = [(math.log(2) + math.log(4)) / 2, math.log(2.5)]


def test_each_head_is_averaged_over_its_own_labels() -> None:
    logits, levels = batch()
    total, heads = CrossEntropy()(logits, levels, SIZES)
    torch.testing.assert_close(heads, torch.tensor(HEADS))
    assert total.item() == pytest.approx(sum(HEADS))


def test_weights_scale_heads() -> None:
    logits, levels = batch()
    total, heads = CrossEntropy(weights=[0.5, 2.0])(logits, levels, SIZES)
    assert total.item() == pytest.approx(0.5 * HEADS[0] + 2 * HEADS[1])
    torch.testing.assert_close(heads, torch.tensor(HEADS))
    with pytest.raises(ValueError, match="3 entries for 2 dimensions"):
        CrossEntropy(weights=[1.0, 1.0, 1.0])(logits, levels, SIZES)


def test_counts_of_all_processes_replace_those_of_the_batch() -> None:
    logits, levels = batch()
    _, heads = CrossEntropy()(logits, levels, SIZES, counts=torch.tensor([4.0, 0.5]))
    torch.testing.assert_close(heads, torch.tensor([HEADS[0] / 2, HEADS[1] * 2]))


def test_gradient_is_finite_and_stays_on_labelled_cells_and_real_levels() -> None:
    logits, levels = batch()
    CrossEntropy()(logits, levels, SIZES)[0].backward()
    # softmax minus one-hot, divided by the head's number of labels
    torch.testing.assert_close(logits.grad[0, 0, :2], torch.tensor([-0.25, 0.25]))
    torch.testing.assert_close(logits.grad[1, 0, :2], torch.tensor([0.375, -0.375]))
    torch.testing.assert_close(logits.grad[2, 1], torch.tensor([0.1] * 6 + [-0.6]))
    untouched = logits.grad.clone()
    untouched[0, 0, :2] = untouched[1, 0, :2] = untouched[2, 1] = 0
    assert (untouched == 0).all()


def test_batch_without_labels_gives_zero_with_a_gradient_path() -> None:
    logits, levels = batch()
    total, heads = CrossEntropy()(logits, torch.full_like(levels, -1), SIZES)
    total.backward()
    assert total.item() == 0 and heads.tolist() == [0, 0]
    assert (logits.grad == 0).all()
