"""Hindsight relabelling: second prompts that request the levels which completions have, and their loss."""

import random

import pytest
import torch

from moslim.algorithms.rloo import RLOO
from moslim.data.prompts import PromptRenderer
from moslim.data.samplers import PreferenceSampler, Uniform
from moslim.data.sources.workbench import Workbench
from moslim.generation.torch_engine import TorchEngine
from moslim.instructions import Tags
from moslim.ops.logprobs import ForwardConfig
from moslim.policy.hindsight import Hindsight, HindsightRelabeler, hindsight_loss
from moslim.policy.policy_models import PolicyModels
from moslim.policy.rollout import Rollout
from moslim.policy.update import PolicyUpdate
from moslim.preferences import Preference, PreferenceSet
from moslim.utils.errors import UsageError
from moslim.workbench.grammar import LEVELS, build_tokenizer
from tests.helpers.policy_models import build_model
from tests.helpers.policy_runs import PLAIN, data, make, trainer
from tests.helpers.rollouts import rollout

WORLD = PreferenceSet(LEVELS)


class Always(PreferenceSampler):
    """Draws the same dimensions each time; the levels do not matter."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def draw(self, preferences, generator, source):
        return Preference(dict.fromkeys(self.names, 0))


def relabeler(sampler: PreferenceSampler, **options) -> HindsightRelabeler:
    renderer = PromptRenderer(build_tokenizer(), Tags(names=False), WORLD)
    return HindsightRelabeler(Hindsight(**options), renderer, sampler, Workbench(), WORLD)


def prompts(relabeled: Rollout) -> list[str]:
    assert relabeled.hindsight_ids is not None and relabeled.hindsight_mask is not None
    tokenizer = build_tokenizer()
    rows = zip(relabeled.hindsight_ids, relabeled.hindsight_mask.bool(), strict=True)
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in rows]


def test_the_weight_decreases_linearly():
    assert [Hindsight(coef=2.0, decay_steps=4).weight(step) for step in (0, 1, 4, 9)] == [2.0, 1.5, 0.0, 0.0]
    assert Hindsight(coef=2.0).weight(10**6) == 2.0


def test_prompts_request_the_levels_that_completions_have():
    relabeled = rollout([[3, 1, 2, 4], [0, 4, 2, 0], [4, 1, 0, 1], [2, 2, 2, 2]])
    relabeler(Always("verbosity", "helpfulness"), num_completions=1).relabel(relabeled, [7, 8], seed=0)
    expected = [
        "<|user|> [[ long]] [[ expert]] How do I clean the kettle? <|assistant|>",
        "<|user|> [[ exhaustive]] [[ basic]] How do I clean the kettle? <|assistant|>",
    ]
    written = prompts(relabeled)
    assert [" ".join(text.split()) for text in (written[0], written[2])] == [
        " ".join(build_tokenizer().decode(build_tokenizer()(text)["input_ids"]).split()) for text in expected
    ]
    assert written[1] == written[3] == ""  # the second completion of each prompt


def test_completions_that_are_no_example_are_left_out():
    levels = [[3, 1, 2, 4]] * 4
    truncated = rollout(levels)
    truncated.ended[0] = False
    relabeler(Always("warmth"), num_completions=2).relabel(truncated, [0, 1], seed=0)
    assert [text != "" for text in prompts(truncated)] == [False, True, True, True]

    uncertain = rollout(levels)
    uncertain.probs[1, 2] = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1])
    relabeler(Always("warmth"), num_completions=2).relabel(uncertain, [0, 1], seed=0)
    assert [text != "" for text in prompts(uncertain)] == [True, False, True, True]

    held_out = rollout([[0, 1, 4, 0], [1, 1, 4, 0], [4, 0, 1, 1], [1, 1, 1, 4]])
    relabeler(Always("verbosity", "warmth"), num_completions=2).relabel(held_out, [0, 1], seed=0)
    assert [text != "" for text in prompts(held_out)] == [False, True, True, True]
    unreachable = rollout([[1, 1, 1, 4], [4, 1, 1, 4]])
    relabeler(Always("verbosity", "helpfulness"), num_completions=2).relabel(unreachable, [0], seed=0)
    assert [text != "" for text in prompts(unreachable)] == [False, True]


def test_draws_depend_on_seed_rollout_row_and_completion_only():
    levels = [[3, 1, 2, 4], [2, 2, 0, 1], [4, 1, 0, 1], [2, 2, 2, 2]]
    whole, again, other = rollout(levels), rollout(levels), rollout(levels)
    build = relabeler(Uniform(), num_completions=2)
    build.relabel(whole, [7, 8], seed=0)
    random.random()
    build.relabel(again, [7, 8], seed=0)
    build.relabel(other, [7, 8], seed=1)
    assert prompts(whole) == prompts(again) != prompts(other)
    second = whole.rows(torch.tensor([2, 3]))
    second.hindsight_ids = second.hindsight_mask = None
    build.relabel(second, [8], seed=0)
    assert prompts(second) == prompts(whole)[2:]


def test_nothing_is_written_once_the_weight_is_0():
    late = rollout([[3, 1, 2, 4]] * 2)
    late.version = 5
    relabeler(Always("warmth"), decay_steps=5).relabel(late, [0], seed=0)
    assert late.hindsight_ids is None


@pytest.fixture
def models(tokenizer):
    return PolicyModels(build_model("grouped", tokenizer), lora=None)


@pytest.fixture
def relabeled():
    """Completions 0, 1 and 3 have a second prompt of three tokens, the first one a shorter one."""
    rows = rollout([[3, 1, 2, 4], [2, 2, 0, 1], [4, 1, 0, 1], [2, 2, 2, 2]])
    rows.hindsight_ids = torch.tensor([[0, 8, 9], [7, 8, 9], [0, 0, 0], [10, 11, 12]])
    rows.hindsight_mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 1, 1]])
    return rows


def expected_nll(models, rows, which):
    """Summed negative log-likelihood, one completion at a time and without padding; and its tokens."""
    total, count = torch.zeros(()), 0
    for i in which:
        prompt = rows.hindsight_ids[i][rows.hindsight_mask[i].bool()]
        tokens = rows.tokens[i][rows.mask[i]]
        logits = models.policy(input_ids=torch.cat([prompt, tokens])[None], use_cache=False).logits[0]
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(dim=-1).gather(1, tokens[:, None])
        total, count = total - logprobs.sum(), count + len(tokens)
    return total, count


@pytest.mark.parametrize("forward_config", [PLAIN, ForwardConfig(), ForwardConfig(tokens=9, share_prefixes="always")])
def test_the_loss_is_the_mean_negative_log_likelihood(models, relabeled, forward_config):
    loss = hindsight_loss(models, relabeled, [relabeled], 1.0, forward_config, loss_scale=1)
    total, count = expected_nll(models, relabeled, (0, 1, 3))
    torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)
    trained = list(models.policy.parameters())
    for gradient, expected in zip(
        torch.autograd.grad(loss, trained), torch.autograd.grad(total / count, trained), strict=True
    ):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_minibatches_of_one_step_add_up(models, relabeled):
    parts = [relabeled.rows(torch.tensor(index)) for index in ([0, 2], [1, 3])]
    # Lightning takes the mean over the parts.
    losses = [hindsight_loss(models, part, parts, 1.0, PLAIN, loss_scale=2) for part in parts]
    whole = hindsight_loss(models, relabeled, [relabeled], 1.0, PLAIN, loss_scale=1)
    torch.testing.assert_close(sum(losses) / 2, whole, atol=1e-6, rtol=1e-5)


def test_without_relabelled_completions_there_is_no_term(models, relabeled):
    relabeled.hindsight_mask[:] = 0
    assert hindsight_loss(models, relabeled, [relabeled], 1.0, PLAIN, loss_scale=1) is None
    assert hindsight_loss(models, rollout([[1, 1, 1, 1]]), [], 1.0, PLAIN, loss_scale=1) is None


def test_the_update_adds_it_with_its_weight(models, relabeled):
    def loss(hindsight):
        update = PolicyUpdate(models, RLOO(), TorchEngine(4), PLAIN, 2, 0.0, importance_clip=None, hindsight=hindsight)
        return update.loss(relabeled, [relabeled], 1, first=False, batch_idx=0)

    relabeled.version = 1
    plain, weighted = loss(None), loss(Hindsight(coef=3.0, decay_steps=2))
    torch.testing.assert_close(weighted.loss - plain.loss, 1.5 * weighted.metrics["train/hindsight_nll"])
    assert "train/hindsight_nll" not in plain.metrics


@pytest.mark.slow
def test_a_run_learns_from_it(preferences, lm, classifier, tmp_path):
    module = make(preferences, lm, classifier, hindsight=Hindsight(coef=1.0, num_completions=3, min_probability=0.0))
    losses = []
    module.record_part = lambda metrics, batch_idx: losses.append(metrics["train/hindsight_nll"].item())
    trainer(tmp_path, max_steps=12).fit(module, data(preferences))
    assert len(losses) == 12 and sum(losses[-3:]) < 0.9 * sum(losses[:3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": 0.0}, "hindsight.coef is 0.0"),
        ({"num_completions": 0}, "num_completions is 0"),
        ({"decay_steps": 0}, "decay_steps 0"),
        ({"min_probability": 1.0}, "min_probability is 1.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        Hindsight(**options)
