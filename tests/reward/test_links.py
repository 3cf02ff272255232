import math

import pytest
import torch

from moslim.reward.heads import LINKS, LinkName

SIZES = (2, 4)


def scores(name: LinkName) -> torch.Tensor:
    widths = [LINKS[name].width(size) for size in SIZES]
    found = 3 * torch.randn(50, 2, max(widths), generator=torch.Generator().manual_seed(1))
    found[:, 0, widths[0] :] = -torch.inf
    return found


@pytest.mark.parametrize("name", list(LINKS))
def test_every_link_gives_a_distribution_over_the_levels_of_each_head(name: LinkName) -> None:
    logits = LINKS[name].logits(scores(name), SIZES)
    probs = logits.softmax(-1)
    assert logits.shape == (50, 2, 4)
    assert (logits[:, 0, 2:] == -torch.inf).all() and (probs[:, 0, 2:] == 0).all()
    assert logits[:, 0, :2].isfinite().all() and logits[:, 1].isfinite().all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(50, 2))


@pytest.mark.parametrize("name", ["softmax", "corn"])
def test_expected_level_is_that_of_the_probabilities(name: LinkName) -> None:
    given = scores(name)
    probs = LINKS[name].logits(given, SIZES).softmax(-1)
    torch.testing.assert_close(LINKS[name].expected(given, SIZES), probs @ torch.arange(4.0))


def test_corn_by_hand() -> None:
    """P(y>0) = 3/4, P(y>1 | y>0) = 1/2, P(y>2 | y>1) = 1/5."""
    given = torch.tensor([[[math.log(3), 0.0, math.log(0.25)], [math.log(3), -torch.inf, -torch.inf]]])
    probs = LINKS["corn"].logits(given, (4, 2)).exp()
    expected = torch.tensor([[[0.25, 0.375, 0.375 * 0.8, 0.375 * 0.2], [0.25, 0.75, 0.0, 0.0]]])
    torch.testing.assert_close(probs, expected)


def test_corn_stays_exact_where_probabilities_vanish() -> None:
    logits = LINKS["corn"].logits(torch.tensor([[[-90.0, 80.0]]]), (3,))
    torch.testing.assert_close(logits, torch.tensor([[[0.0, -170.0, -90.0]]]))


def test_regression_is_on_the_two_levels_around_the_output_and_clamped_to_the_scale() -> None:
    given = torch.tensor([[[0.2], [0.25]], [[-3.0], [9.0]]])  # from the middles 0.5 and 1.5
    link = LINKS["regression"]
    probs = link.logits(given, SIZES).softmax(-1)
    expected = torch.tensor([[[0.3, 0.7, 0, 0], [0, 0.25, 0.75, 0]], [[1.0, 0, 0, 0], [0, 0, 0, 1.0]]])
    torch.testing.assert_close(probs, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(probs @ torch.arange(4.0), torch.tensor([[0.7, 1.75], [0.0, 3.0]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(link.expected(given, SIZES), torch.tensor([[0.7, 1.75], [-2.5, 10.5]]))
