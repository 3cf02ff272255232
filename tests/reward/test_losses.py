import math

import pytest
import torch
import torch.nn.functional as F

from moslim.data.batches import one_hot
from moslim.reward.heads import LINKS
from moslim.reward.losses import Corn, CrossEntropy, LevelLoss, Regression, SoftOrdinal

SIZES = (2, 7)
LOSSES = [CrossEntropy(), CrossEntropy(label_smoothing=0.1), SoftOrdinal(), Corn(), Regression()]
NAMES = ["cross_entropy", "smoothed", "soft_ordinal", "corn", "regression"]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows: head 0 (two levels) labelled in rows 0 and 1, head 1 (seven levels) in row 2 only."""
    logits = torch.full((3, 2, 7), -torch.inf)
    logits[:, 0, :2] = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [5.0, -5.0]])
    logits[:, 1] = 0.0
    logits[2, 1, 6] = math.log(4)
    return logits.requires_grad_(), one_hot(torch.tensor([[0, -1], [1, -1], [-1, 6]]), 7)


def random_scores(loss: LevelLoss, rows: int = 8) -> torch.Tensor:
    """Scores of two heads with three and five levels, as the classifier gives them to this loss."""
    widths = [LINKS[loss.link].width(size) for size in (3, 5)]
    scores = torch.randn(rows, 2, max(widths), generator=torch.Generator().manual_seed(0))
    scores[:, 0, widths[0] :] = -torch.inf
    return scores


# head 0: (-log 1/2 - log 1/4) / 2 labels; head 1: -log 4/10, over its single label
HEADS = [(math.log(2) + math.log(4)) / 2, math.log(2.5)]


def test_each_head_is_averaged_over_its_own_labels() -> None:
    logits, targets = batch()
    total, heads = CrossEntropy()(logits, targets, SIZES)
    torch.testing.assert_close(heads, torch.tensor(HEADS))
    assert total.item() == pytest.approx(sum(HEADS))


def test_weights_scale_heads() -> None:
    logits, targets = batch()
    total, heads = CrossEntropy(weights=[0.5, 2.0])(logits, targets, SIZES)
    assert total.item() == pytest.approx(0.5 * HEADS[0] + 2 * HEADS[1])
    torch.testing.assert_close(heads, torch.tensor(HEADS))
    with pytest.raises(ValueError, match="3 entries for 2 dimensions"):
        CrossEntropy(weights=[1.0, 1.0, 1.0])(logits, targets, SIZES)


def test_counts_of_all_processes_replace_those_of_the_batch() -> None:
    logits, targets = batch()
    _, heads = CrossEntropy()(logits, targets, SIZES, counts=torch.tensor([4.0, 0.5]))
    torch.testing.assert_close(heads, torch.tensor([HEADS[0] / 2, HEADS[1] * 2]))


def test_gradient_is_finite_and_stays_on_labelled_cells_and_real_levels() -> None:
    logits, targets = batch()
    CrossEntropy()(logits, targets, SIZES)[0].backward()
    # softmax minus one-hot, divided by the head's number of labels
    torch.testing.assert_close(logits.grad[0, 0, :2], torch.tensor([-0.25, 0.25]))
    torch.testing.assert_close(logits.grad[1, 0, :2], torch.tensor([0.375, -0.375]))
    torch.testing.assert_close(logits.grad[2, 1], torch.tensor([0.1] * 6 + [-0.6]))
    untouched = logits.grad.clone()
    untouched[0, 0, :2] = untouched[1, 0, :2] = untouched[2, 1] = 0
    assert (untouched == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_batch_without_labels_gives_zero_with_a_gradient_path(loss: LevelLoss) -> None:
    scores = random_scores(loss).requires_grad_()
    total, heads = loss(scores, torch.zeros(8, 2, 5), (3, 5))
    total.backward()
    assert total.item() == 0 and heads.tolist() == [0, 0]
    assert (scores.grad == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_votes_cost_the_mean_of_what_each_of_them_would(loss: LevelLoss) -> None:
    scores = random_scores(loss, rows=1)
    votes = [one_hot(torch.tensor([[a, b]]), 5) for a, b in ((0, 4), (2, 4), (2, 1), (1, 0))]
    together = loss.cells(scores, torch.stack(votes).mean(0), (3, 5))
    alone = torch.stack([loss.cells(scores, vote, (3, 5)) for vote in votes]).mean(0)
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_gradient_is_finite_where_a_head_has_fewer_levels(loss: LevelLoss) -> None:
    scores = random_scores(loss).requires_grad_()
    levels = torch.tensor([[0, 4], [1, 3], [2, -1], [-1, 2], [-1, -1], [2, 0], [1, 1], [0, 0]])
    total, _ = loss(scores, one_hot(levels, 5), (3, 5))
    total.backward()
    assert total.isfinite() and scores.grad.isfinite().all() and (scores.grad[4] == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_parts_of_a_batch_with_common_counts_add_up_to_the_whole(loss: LevelLoss) -> None:
    scores = random_scores(loss)
    targets = one_hot(torch.tensor([[0, 4], [1, 3], [2, -1], [-1, 2], [-1, -1], [2, 0], [1, 1], [0, 0]]), 5)
    counts = loss.counts(targets, (3, 5)).sum(0)
    parts = [loss(scores[i : i + 3], targets[i : i + 3], (3, 5), counts)[0] for i in (0, 3, 6)]
    torch.testing.assert_close(sum(parts), loss(scores, targets, (3, 5))[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_and_smoothing_are_those_of_torch(smoothing: float) -> None:
    loss = CrossEntropy(class_weights=[[], [3.0, 1.0, 1.0, 0.5, 0.2]], label_smoothing=smoothing)
    scores = random_scores(loss)
    levels = torch.tensor([[0, 4], [1, 3], [2, 0], [0, 2], [-1, -1], [2, 0], [1, 1], [0, 4]])
    _, heads = loss(scores, one_hot(levels, 5), (3, 5))
    options = {"ignore_index": -1, "label_smoothing": smoothing}
    expected = [
        F.cross_entropy(scores[:, 0, :3], levels[:, 0], **options),
        F.cross_entropy(scores[:, 1], levels[:, 1], weight=torch.tensor(loss.class_weights[1]), **options),
    ]
    torch.testing.assert_close(heads, torch.stack(expected))


def test_class_weights_and_smoothing_are_checked() -> None:
    logits, targets = batch()
    with pytest.raises(ValueError, match=r"loss.class_weights\[1\] has 2 entries for 7 levels"):
        CrossEntropy(class_weights=[[], [1.0, 2.0]])(logits, targets, SIZES)
    with pytest.raises(ValueError, match=r"loss.class_weights has 1 entries for 2 dimensions"):
        CrossEntropy(class_weights=[[]])(logits, targets, SIZES)
    with pytest.raises(ValueError, match="label_smoothing"):
        CrossEntropy(label_smoothing=1.0)


def test_soft_ordinal_targets_fall_off_with_distance_within_the_head() -> None:
    logits = torch.tensor([[[0.3, -0.2, 0.9, -torch.inf], [0.1, 0.5, -0.4, 0.0]]])
    cells = SoftOrdinal(alpha=math.log(2)).cells(logits, one_hot(torch.tensor([[0, 1]]), 4), (3, 4))
    for head, soft in enumerate(([4 / 7, 2 / 7, 1 / 7], [0.5 / 2.25, 1 / 2.25, 0.5 / 2.25, 0.25 / 2.25])):
        logp = logits[0, head, : len(soft)].log_softmax(-1)
        assert cells[0, head].item() == pytest.approx(-(torch.tensor(soft) * logp).sum().item(), rel=1e-5)


def test_soft_ordinal_becomes_cross_entropy_as_alpha_grows() -> None:
    logits, targets = batch()
    sharp, plain = SoftOrdinal(alpha=80.0)(logits, targets, SIZES)[0], CrossEntropy()(logits, targets, SIZES)[0]
    assert sharp.item() == pytest.approx(plain.item())


def test_corn_is_binary_cross_entropy_on_the_rows_that_reach_each_threshold() -> None:
    """Term by term as in the paper: task k sees the rows with y >= k, all tasks share one normaliser."""
    scores = random_scores(Corn())
    levels = torch.tensor([4, 0, 3, -1, 1, 2, 4, 0])
    terms, examples = 0.0, 0
    for k in range(4):
        reached = levels >= k
        above = (levels[reached] > k).float()
        terms += F.binary_cross_entropy_with_logits(scores[reached, 1, k], above, reduction="sum")
        examples += int(reached.sum())
    both = one_hot(torch.stack([torch.full((8,), -1), levels], dim=1), 5)
    _, heads = Corn()(scores, both, (3, 5))
    torch.testing.assert_close(heads, torch.stack([torch.tensor(0.0), terms / examples]))


def test_regression_is_the_squared_distance_in_levels() -> None:
    scores = torch.tensor([[[0.5], [-1.0]], [[2.0], [0.0]]])  # from the middles 1 and 2: levels 1.5, 1 and 3, 2
    _, heads = Regression()(scores, one_hot(torch.tensor([[1, 4], [2, -1]]), 5), (3, 5))
    torch.testing.assert_close(heads, torch.tensor([(0.25 + 1.0) / 2, 9.0]))


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_each_loss_learns_the_levels(loss: LevelLoss) -> None:
    """Free scores per row, trained on labels, end at these labels."""
    scores = torch.nn.Parameter(random_scores(loss))
    levels = torch.tensor([[0, 4], [1, 3], [2, 0], [0, 2], [1, 1], [2, 0], [1, 1], [0, 4]])
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        loss(scores, one_hot(levels, 5), (3, 5))[0].backward()
        optimizer.step()
    assert torch.equal(LINKS[loss.link].logits(scores, (3, 5)).argmax(-1), levels)
