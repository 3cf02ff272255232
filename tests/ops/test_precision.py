"""What is computed from a model's outputs is float32, whatever precision the run has."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from moslim.algorithms.functional import ValueHead
from moslim.evaluation.best_of import Candidates, best_of_n
from moslim.evaluation.classifier_records import LevelMetrics
from moslim.mapping.base import MappingFunction
from moslim.ops.numerics import apply_wide, full_precision
from moslim.preferences import PreferenceSet, expected_distance, expected_level, requested_probability
from moslim.reward.heads import LINKS
from moslim.reward.losses import BradleyTerry, Corn, CrossEntropy, LevelLoss, PairMetrics, Regression, SoftOrdinal
from moslim.reward.modeling import PreferenceClassifier, pool
from moslim.utils.files import plain

PREFERENCES = PreferenceSet({"two": ["0", "1"], "five": ["0", "1", "2", "3", "4"]})
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def rounding(kind: str) -> Iterator[None]:
    """Within it, matrix products are in 16 bits and so are tensors without a type, as under Lightning's precisions."""
    torch.set_default_dtype(HALF[kind])
    try:
        with torch.autocast("cpu", HALF[kind]):
            assert (drawn(1, 2) @ drawn(2, 1)).dtype == HALF[kind]
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(params=HALF)
def kind(request):
    return request.param


@pytest.fixture
def autocast(kind):
    with rounding(kind):
        yield


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def scores(rows: int, width: int) -> Tensor:
    found = drawn(rows, 2, width)
    if width > 1:
        found[:, 0, 2 if width == 5 else 1 :] = -torch.inf
    return found


def test_levels(autocast):
    probs = torch.tensor([[[0.0, 0.0, 0.001, 0.009, 0.0], [0.001, 0.001, 0.003, 0.998, -0.003]]], dtype=torch.float32)
    levels = torch.arange(5, dtype=torch.float64)
    assert expected_level(probs).dtype == torch.float32
    torch.testing.assert_close(expected_level(probs).double(), (probs.double() * levels).sum(-1), rtol=1e-6, atol=0)
    one = torch.tensor([0.0, 0.0, 0.011, 0.989], dtype=torch.float32)
    assert expected_level(one).item() == pytest.approx(2.989, abs=1e-6)
    asked = torch.tensor([[3, 1]])
    assert expected_distance(probs, asked).dtype == requested_probability(probs, asked).dtype == torch.float32
    assert expected_level(probs.double()).dtype == torch.float64


def test_counts(autocast):
    metrics = LevelMetrics(PREFERENCES)
    metrics.update(torch.zeros(301, 2, dtype=torch.long), torch.zeros(301, 2, dtype=torch.long))
    assert metrics.confusion[:, 0, 0].tolist() == [301, 301]
    pairs = PairMetrics(PREFERENCES)
    pairs.update(torch.ones(301, 2, dtype=torch.bfloat16), torch.ones(301, 2, dtype=torch.bool))
    assert pairs.count.tolist() == pairs.right.tolist() == [301, 301]


class Product(LevelLoss):
    """A user's own, with a matrix product."""

    def cells(self, scores, targets, sizes):
        return (scores.softmax(-1)[..., None, :] @ (1 - targets)[..., None])[..., 0, 0] + torch.tensor([0.1001, 0.0])


LOSSES = [Corn(), CrossEntropy(label_smoothing=0.1), SoftOrdinal(), Regression(), Product()]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_losses_on_levels(loss, kind):
    outputs = scores(7, {"softmax": 5, "corn": 4, "regression": 1}[loss.link]).requires_grad_()
    votes = torch.tensor([[[1 / 3, 2 / 3, 0, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]]]).expand(7, -1, -1)
    expected, heads = loss(outputs, votes, PREFERENCES.sizes)
    (slope,) = torch.autograd.grad(expected, outputs)
    with rounding(kind):
        again, others = loss(outputs, votes, PREFERENCES.sizes)
        assert again.dtype == torch.float32 and torch.equal(again, expected) and torch.equal(heads, others)
    assert torch.equal(torch.autograd.grad(again, outputs)[0], slope)


@pytest.mark.parametrize("link", LINKS)
def test_gaps_and_the_loss_on_them(link, kind):
    chosen = scores(3, {"softmax": 5, "corn": 4, "regression": 1}[link])
    rejected = chosen + 0.009 * torch.arange(chosen.shape[-1])

    def score_margins():
        return LINKS[link].expected(chosen, PREFERENCES.sizes) - LINKS[link].expected(rejected, PREFERENCES.sizes)

    mask, margins = torch.ones(3, 2, dtype=torch.bool), torch.tensor([0.1001, 0.0, 0.3])
    expected = score_margins(), BradleyTerry()(score_margins(), mask, margins)
    with rounding(kind):
        assert torch.equal(score_margins(), expected[0]) and torch.equal(
            BradleyTerry()(score_margins(), mask, margins), expected[1]
        )


def small(**options) -> PreferenceClassifier:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = LlamaModel(LlamaConfig(vocab_size=20, **sizes))
    return PreferenceClassifier.from_backbone(backbone, PREFERENCES, **options).eval()


@pytest.mark.parametrize("hidden", [None, 8])
@pytest.mark.parametrize("link", LINKS)
def test_heads(hidden, link, kind):
    model, fresh, coarse = (small(head_hidden=hidden, link=link) for _ in range(3))
    features = 20 * drawn(9, 32)
    with torch.no_grad():
        expected = model.classify(features)
        model.head.to(torch.bfloat16)
        coarse.head.load_state_dict(model.head.state_dict())
        rounded = coarse.classify(features)  # weights that were rounded, in a float32 head
        with rounding(kind):
            found, again = fresh.classify(features), model.classify(features)
    for one, other in ((found, expected), (again, rounded)):
        assert one.logits.dtype == one.scores.dtype == torch.float32
        assert torch.equal(one.logits, other.logits) and torch.equal(one.scores, other.scores)


def test_a_mean_over_301_tokens(autocast):
    hidden, mask = torch.ones(1, 301, 2, dtype=torch.bfloat16), torch.ones(1, 301, dtype=torch.long)
    assert pool(hidden, mask, ["mean", "max"]).tolist() == [[1.0, 1.0, 1.0, 1.0]]
    hidden[0, 0] = 2
    assert pool(hidden, mask, ["mean"])[0].tolist() == pytest.approx([302 / 301] * 2, rel=1e-6)
    assert pool(hidden.double(), mask, ["last"]).dtype == torch.float64


def test_the_value_head(kind):
    head, states = ValueHead(32), drawn(11, 32)
    head.linear.weight.data = drawn(1, 32, seed=1)
    with torch.no_grad():
        expected = head(states)
        head.linear.weight.data = head.linear.weight.bfloat16().float()
        rounded = head(states)
        with rounding(kind):
            assert torch.equal(head(states), rounded) and not torch.equal(rounded, expected)
            assert torch.equal(head.to(torch.bfloat16)(states), rounded)


class Tilted(MappingFunction):
    """A user's own, with a matrix product and a tensor without a type."""

    def per_dimension(self, probs, targets, groups):
        steps = torch.full((probs.shape[-1], 1), 1.001, device=probs.device)
        return (probs @ steps)[..., 0].masked_fill(targets < 0, torch.nan)


def test_mapping_functions(kind):
    mapping, probs = Tilted(), drawn(6, 2, 5).softmax(-1)
    mapping.bind(PREFERENCES)
    inputs = probs, torch.tensor([[0, 1]] * 6), torch.zeros(6, dtype=torch.long)
    expected = mapping(*inputs)
    with rounding(kind):
        found = mapping(*inputs)
        assert found.total.dtype == found.weights.dtype == torch.float32
        assert torch.equal(found.total, expected.total) and torch.equal(found.per_dimension, expected.per_dimension)


def test_best_of_n(kind):
    asked = [torch.tensor([i % 2, i % 5]) for i in range(301)]
    choices = [Candidates((f"q{i}", f"again {i}"), ("a", "b", "c"), asked[i], i % 3) for i in range(301)]
    probs, mapping = drawn(602, 3, 2, 5).softmax(-1), Tilted()
    mapping.bind(PREFERENCES)
    expected = plain(best_of_n(choices, probs, mapping))
    with rounding(kind):
        assert plain(best_of_n(choices, probs, mapping)) == expected


def test_it_ends_with_its_block(autocast):
    layer, default = nn.Linear(3, 2), torch.get_default_dtype()
    with full_precision():
        assert torch.ones(1).dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    assert torch.get_default_dtype() == default and torch.is_autocast_enabled("cpu")
    assert apply_wide(layer, torch.ones(1, 3)).dtype == torch.float32
    assert apply_wide(layer.double(), torch.ones(1, 3)).dtype == torch.float64
