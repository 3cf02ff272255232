import json
import math

import pytest
import torch

from moslim.algorithms.functional import normalize_then_sum
from moslim.algorithms.grpo import GRPO
from moslim.algorithms.rloo import RLOO
from moslim.data.samplers import Reachable
from moslim.data.sources.table import Table
from moslim.generation.base import Completions
from moslim.mapping import ExpectedDistance, MappedReward, Tchebycheff, Weighted
from moslim.policy.generation import Generations
from moslim.policy.reward_functions import RewardFunction, RewardFunctions
from moslim.preferences import PreferenceSet
from tests.helpers.policy_runs import BATCH, SAMPLES, data, make, trainer

pytestmark = pytest.mark.filterwarnings("ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning")
NAN = math.nan
PREFERENCES = PreferenceSet({"tone": ["bad", "good"], "amount": ["none", "some", "much"]})
CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
TARGETS = torch.tensor([[1, 2], [-1, -1]])


def answers():
    """Two answers of two and one tokens."""
    tokens, mask = torch.tensor([[5, 2], [7, 0]]), torch.tensor([[True, True], [True, False]])
    found = Completions(tokens, mask, torch.zeros(2, 2), torch.tensor([True, False]))
    return Generations(found, tokens, mask, ["How?", CHAT], ["Like this.", "Because."])


def length(completions, **columns):
    return [-float(len(text.split())) for text in completions]


def polite(prompts, completions, **columns):
    """Applies to plain questions only."""
    return [None if isinstance(prompt, list) else 2 for prompt in prompts]


class Brief:
    def __init__(self, limit=3):
        self.limit = limit

    def __call__(self, completion_ids, **columns):
        return [float(len(ids) < self.limit) for ids in completion_ids]


def test_what_a_function_is_called_with():
    seen = {}

    def record(**columns):
        seen.update(columns)
        return [0.0, 1.0]

    assert RewardFunction(record)(answers(), [{"tone": 1}, {}], {"id": [7, None]}) == [0.0, 1.0]
    assert seen == {
        "prompts": ["How?", CHAT],
        "completions": ["Like this.", "Because."],
        "completion_ids": [[5, 2], [7]],
        "levels": [{"tone": 1}, {}],
        "id": [7, None],
    }
    RewardFunction(record, messages=True)(answers(), [{}, {}], {})
    assert seen["prompts"] == [[{"role": "user", "content": "How?"}], CHAT]
    assert seen["completions"][0] == [{"role": "assistant", "content": "Like this."}]


def test_columns_are_named_and_nan_where_a_function_does_not_apply():
    functions = RewardFunctions([RewardFunction(length), RewardFunction(polite), RewardFunction(Brief(2))], PREFERENCES)
    assert functions.names == ["length", "polite", "Brief"]
    expected = torch.tensor([[-2.0, 2.0, 0.0], [-1.0, NAN, 1.0]])
    torch.testing.assert_close(functions(answers(), TARGETS), expected, equal_nan=True)
    assert RewardFunctions([], PREFERENCES)(answers(), TARGETS).shape == (2, 0)


def test_requests_reach_the_functions_by_name():
    def check(levels, **columns):
        return [1.0 if wanted == {"tone": 1, "amount": 2} else None for wanted in levels]

    found = RewardFunctions([RewardFunction(check)], PREFERENCES)(answers(), TARGETS)
    torch.testing.assert_close(found, torch.tensor([[1.0], [NAN]]), equal_nan=True)


def test_columns_of_the_data_go_with_every_answer_to_their_row():
    seen = {}

    def solved(completions, solution, **columns):
        seen["solution"] = solution
        pairs = zip(completions, solution, strict=True)
        return [None if wanted is None else float(wanted in text) for text, wanted in pairs]

    functions = RewardFunctions([RewardFunction(solved)], PREFERENCES)
    torch.testing.assert_close(functions(answers(), TARGETS, [{"solution": "this"}]), torch.tensor([[1.0], [0.0]]))
    assert seen == {"solution": ["this", "this"]}
    found = functions(answers(), TARGETS, [{}, {"solution": "Because"}])
    torch.testing.assert_close(found, torch.tensor([[NAN], [1.0]]), equal_nan=True)


def mapped(total):
    own = torch.tensor([[0.2, 0.6], [NAN, 0.5], [NAN, NAN], [NAN, NAN]])
    return MappedReward(torch.tensor(total), own, torch.ones_like(own))


VALUES = torch.tensor([[1.0, NAN], [NAN, NAN], [1.0, 3.0], [NAN, NAN]])


def test_the_total_is_the_weighted_mean_over_what_counts_for_an_answer():
    functions = RewardFunctions([RewardFunction(length, weight=0.5), RewardFunction(polite, weight=2.0)], PREFERENCES)
    joined = functions.join(mapped([0.4, 0.5, 0.0, 0.0]), VALUES, is_mean=True)
    expected = torch.tensor([(0.2 + 0.6 + 0.5) / 2.5, 0.5, (0.5 + 6) / 2.5, 0.0])
    torch.testing.assert_close(joined.total, expected)
    columns = torch.cat([mapped([0.0] * 4).per_dimension, VALUES], dim=1)
    torch.testing.assert_close(joined.per_dimension, columns, equal_nan=True)
    assert functions.metrics(columns) == {"train/reward/length": 1.0, "train/reward/polite": 3.0}


def test_weights_of_the_mapping_and_of_functions_go_together():
    functions = RewardFunctions([RewardFunction(length, weight=0.5), RewardFunction(polite)], PREFERENCES)
    before = mapped([0.0] * 4)
    before.weights[0] = torch.tensor([4.0, 0.5])
    joined = functions.join(before, VALUES, is_mean=True)
    assert joined.weights[0].tolist() == [4.0, 0.5, 0.5, 1.0]
    assert joined.total[0].item() == pytest.approx((0.2 * 4 + 0.6 * 0.5 + 0.5) / 5)


def test_a_scalar_of_its_own_is_one_column():
    functions = RewardFunctions([RewardFunction(length, weight=0.5), RewardFunction(polite)], PREFERENCES)
    joined = functions.join(mapped([0.2, 0.5, 0.0, 0.0]), VALUES, is_mean=False)
    expected = torch.tensor([(0.2 + 0.5) / 1.5, 0.5, (0.5 + 3) / 1.5, 0.0])
    torch.testing.assert_close(joined.total, expected)


def test_without_functions_nothing_changes():
    functions, before = RewardFunctions([], PREFERENCES), mapped([0.4, 0.5, 0.0, 0.0])
    assert functions.join(before, torch.zeros(4, 0), is_mean=True) is before
    assert functions.metrics(before.per_dimension) == {}


def test_normalised_columns_are_weighted_afterwards():
    rewards = torch.tensor([[[0.0, 10.0], [2.0, 30.0]]])
    # both normalise to -1 and 1
    found = normalize_then_sum(rewards, 0.0, torch.tensor([1.0, 0.5]).expand(1, 2, 2))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0]]) * 1.5 / 1.25**0.5)


def test_an_answer_that_a_column_does_not_apply_to_is_left_out_of_its_group():
    rewards = torch.tensor([[[0.0, NAN], [2.0, 1.0], [4.0, 3.0]]])
    # the second column: mean 2, standard deviation 1 of the two answers that have it
    std = (8 / 3) ** 0.5
    expected = torch.tensor([[-2 / std, (0.0 - 1.0) / 2**0.5, (2 / std + 1.0) / 2**0.5]])
    torch.testing.assert_close(normalize_then_sum(rewards, 0.0), expected)


def test_bad_functions_are_named():
    with pytest.raises(ValueError, match="'length' has weight 0"):
        RewardFunction(length, weight=0.0)
    for names in ([None, None], ["tone"]):
        functions = [RewardFunction(length, name=name) for name in names]
        with pytest.raises(ValueError, match=r"the name '(length|tone)' is taken"):
            RewardFunctions(functions, PREFERENCES)
    for values, message in (
        ([1.0], "'short' returned 1 values for 2 completions"),
        ([1.0, math.inf], "'short' returned inf for 'Because.': give a finite number, or None"),
        ([math.nan, 1.0], "'short' returned nan for 'Like this.'"),
    ):
        with pytest.raises(ValueError, match=message):
            RewardFunction(lambda values=values, **columns: values, name="short")(answers(), [{}, {}], {})
    with pytest.raises(ValueError, match="the column 'levels' of the data is named as what every reward function gets"):
        RewardFunctions([RewardFunction(length)], PREFERENCES)(answers(), TARGETS, [{"levels": 1}, {}])


@pytest.mark.parametrize("optimizer", [RLOO(kl_coef=0.0), GRPO(aggregation="normalize_then_sum")])
def test_a_run_rewards_what_the_functions_say(optimizer, preferences, lm, classifier, tmp_path):
    rewards = [RewardFunction(length, 0.5), RewardFunction(polite)]
    parts = {"policy_optimizer": optimizer, "missing_eos_penalty": 0.0}
    module = make(preferences, lm, classifier, reward_functions=rewards, **parts)
    trainer(tmp_path, max_steps=1).fit(module, data(preferences))
    found = module.rollout
    assert found.per_dimension.shape == (BATCH * SAMPLES, 4)
    words = torch.tensor([-float(len(answer.split())) for answer in found.completion_texts])
    torch.testing.assert_close(found.per_dimension[:, 2], words)
    own = ExpectedDistance()(found.probs, found.targets, torch.zeros(len(found))).per_dimension
    torch.testing.assert_close(found.per_dimension[:, :2], own, equal_nan=True)
    total = (own.nansum(dim=1) + 0.5 * words + 2.0) / ((found.targets >= 0).sum(dim=1) + 1.5)
    torch.testing.assert_close(found.rewards, total)
    if optimizer.aggregation == "normalize_then_sum":
        grouped = found.per_dimension.reshape(BATCH, SAMPLES, 4)
        total = normalize_then_sum(
            grouped, optimizer.std_floor, torch.tensor([1, 1, 0.5, 1]).expand_as(grouped)
        ).flatten()
    better = total.reshape(BATCH, SAMPLES) > total.reshape(BATCH, SAMPLES).mean(dim=1, keepdim=True)
    assert torch.equal(found.advantages.reshape(BATCH, SAMPLES) > 0, better)
    assert module.trainer.callback_metrics["train/reward/length"].item() == pytest.approx(words.mean().item())
    assert module.trainer.callback_metrics["train/reward/polite"].item() == 2.0


def test_a_run_weighs_dimensions_and_hands_on_what_a_table_keeps(preferences, lm, classifier, tmp_path):
    lines = [{"question": f"Please describe topic {i}.", "solution": f"answer {i}"} for i in range(2 * BATCH)]
    table = tmp_path / "questions.jsonl"
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = {}

    def checked(prompts, solution, **columns):
        seen.update(zip(prompts, solution, strict=True))
        return [None] * len(prompts)

    mapping = Weighted(ExpectedDistance(), {preferences.names[0]: [1.0, 2.0, 4.0, 4.0, 4.0]})
    parts = {"mapping": mapping, "policy_optimizer": GRPO(aggregation="normalize_then_sum"), "missing_eos_penalty": 0.0}
    module = make(preferences, lm, classifier, reward_functions=[RewardFunction(checked)], **parts)
    rows = data(preferences, source=Table(str(table), keep=["solution"]), sampler=Reachable([0.0, 0.0, 1.0]))
    trainer(tmp_path, max_steps=2).fit(module, rows)
    found = module.rollout
    assert seen == {line["question"]: line["solution"] for line in lines}
    weights = torch.cat([mapping.weights(found.targets), torch.ones(len(found), 1)], dim=1)
    assert weights.unique().numel() > 1
    rewards, weights = (rows.reshape(BATCH, SAMPLES, -1) for rows in (found.per_dimension, weights))
    total, weighted = (normalize_then_sum(rewards, 0.1, by) for by in (None, weights))
    assert not torch.allclose(total, weighted)
    better = weighted > weighted.mean(dim=1, keepdim=True)
    assert torch.equal(found.advantages.reshape(BATCH, SAMPLES) > 0, better)


def test_a_mapping_with_a_scalar_of_its_own_needs_an_optimizer_that_reads_it(preferences, lm, classifier):
    with pytest.raises(ValueError, match="Tchebycheff makes a scalar of its own: set it to sum_then_normalize"):
        parts = {"mapping": Tchebycheff(), "policy_optimizer": RLOO(aggregation="normalize_then_sum")}
        make(preferences, lm, classifier, **parts)
