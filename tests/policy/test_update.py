import math

import pytest
import torch

from moslim.algorithms.rloo import RLOO
from moslim.generation.torch_engine import TorchEngine
from moslim.ops.logprobs import ForwardConfig, completion_logprobs
from moslim.ops.lora import LoraOptions
from moslim.policy.policy_models import PolicyModels
from moslim.policy.rollout import Rollout
from moslim.policy.update import PolicyUpdate, mean_default_kl, policy_outputs
from tests.helpers.policy_models import build_model
from tests.helpers.policy_runs import PLAIN

LORA = LoraOptions(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"])
PASSES = [
    PLAIN,
    ForwardConfig(),
    ForwardConfig(tokens=9, share_prefixes="always"),
    ForwardConfig(tokens=20, share_prefixes="never"),
]


@pytest.fixture
def rows(tokenizer):
    """Six answers, of which numbers 1, 2 and 5 are to prompts that ask for nothing."""
    ids = torch.randint(6, len(tokenizer), (6, 9), generator=torch.Generator().manual_seed(4))
    ids[[3, 2], :5] = ids[[0, 1], :5]  # two pairs of answers to one prompt each
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 4, 3, 3])[:, None]
    attention = torch.cat([torch.ones(6, 5, dtype=torch.long), mask.long()], dim=1)
    targets = torch.tensor([[1, -1], [-1, -1], [-1, -1], [2, 0], [-1, 3], [-1, -1]])
    nothing = torch.zeros(6)
    return Rollout(
        (0, 0), ids, attention, mask, nothing[:, None].expand(-1, 4), None, targets, nothing, nothing[:, None],
        nothing, nothing, mask[:, 0], mask[:, 0], ["q"] * 6, ["a"] * 6,
    )  # fmt: skip


@pytest.fixture(params=[None, LORA], ids=["full", "lora"])
def models(request, tokenizer):
    """A policy that has moved away from its reference."""
    torch.manual_seed(0)
    models = PolicyModels(build_model("grouped", tokenizer), request.param)
    for p in models.policy.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    return models


def run(models, rows, forward_config, temperature=1.0, **options):
    update = PolicyUpdate(models, RLOO(), TorchEngine(4), forward_config, 1, default_kl_coef=0.0, importance_clip=None)
    outputs = policy_outputs(models, rows, temperature, forward_config, **options)
    return update.loss_inputs(outputs, rows, [rows], loss_scale=1, first=False), mean_default_kl(
        outputs.default_kl, [rows], loss_scale=1
    )


def all_logits(model, rows):
    """Of the plain form: what predicts each answer token."""
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.attention_mask, "use_cache": False}
    return model(**inputs).logits[:, 4:-1]


@pytest.mark.parametrize("forward_config", PASSES)
@pytest.mark.parametrize("default_kl", [True, False])
def test_logprobs_are_those_of_the_whole_batch(models, rows, forward_config, default_kl):
    expected = completion_logprobs(models.policy, rows.batch, 0.7, PLAIN)
    found = run(models, rows, forward_config, temperature=0.7, default_kl=default_kl)[0].logprobs
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found[~rows.mask] == 0).all()


@pytest.mark.parametrize("forward_config", PASSES)
def test_default_kl_is_the_mean_over_tokens_of_prompts_without_instruction(models, rows, forward_config):
    _, found = run(models, rows, forward_config, default_kl=True)
    mine = all_logits(models.policy, rows).log_softmax(dim=-1)
    with models.reference() as reference, torch.no_grad():
        theirs = all_logits(reference, rows).log_softmax(dim=-1)
    chosen = rows.mask & torch.tensor([0, 1, 1, 0, 0, 1]).bool()[:, None]
    expected = (mine.exp() * (mine - theirs)).sum(dim=-1)[chosen].mean()
    assert expected > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    trained = [p for p in models.policy.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(found, trained, retain_graph=True)
    for one, other in zip(gradients, torch.autograd.grad(expected, trained), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_at_the_start_the_default_has_not_moved(tokenizer, rows):
    models = PolicyModels(build_model("grouped", tokenizer), LORA)
    assert run(models, rows, PLAIN, default_kl=True)[1].item() == 0


def test_without_such_prompts_or_weight_there_is_no_default_kl(models, rows):
    instructed = rows.rows(torch.tensor([0, 3, 4]))
    assert run(models, instructed, PLAIN, default_kl=True)[1] is None
    assert run(models, rows, PLAIN, default_kl=False)[1] is None


@pytest.mark.parametrize("forward_config", PASSES)
def test_entropy_of_every_token(models, rows, forward_config):
    found = run(models, rows, forward_config, temperature=0.7, entropy=True)[0].entropy
    logits = all_logits(models.policy, rows) / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy() * rows.mask
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert run(models, rows, forward_config)[0].entropy is None
    assert torch.autograd.grad(found.sum(), [p for p in models.policy.parameters() if p.requires_grad])


def counted_passes(models):
    """Counts the answers that go through the policy."""
    counts = []

    def count(_, __, inputs):
        counts.append(len(inputs["input_ids"]))

    models.policy.register_forward_pre_hook(count, with_kwargs=True)
    return counts


def test_answers_that_nothing_needs_are_skipped(models, rows):
    rows.used = torch.tensor([False, False, True, True, False, True])
    counts = counted_passes(models)
    update, _ = run(models, rows, PLAIN)
    assert counts == [3] and update.mask.any(dim=1).tolist() == rows.used.tolist()
    expected = completion_logprobs(models.policy, rows.batch, 1.0, PLAIN)
    torch.testing.assert_close(update.logprobs, expected * rows.used[:, None], atol=1e-5, rtol=0)
    counts.clear()
    _, kl = run(models, rows, PLAIN, default_kl=True)  # the default is held on answers that are not used, too
    assert sum(counts) == 4 + (3 if models.adapted else 0)
    rows.used[:] = True
    torch.testing.assert_close(kl, run(models, rows, PLAIN, default_kl=True)[1])


def test_a_batch_of_which_nothing_is_used_still_has_a_gradient(models, rows):
    rows.used = torch.zeros(6, dtype=torch.bool)
    update, _ = run(models, rows, PLAIN)
    assert not update.mask.any()
    gradients = torch.autograd.grad(
        (update.logprobs * update.mask).sum(), [p for p in models.policy.parameters() if p.requires_grad]
    )
    assert all((gradient == 0).all() for gradient in gradients)


def test_a_hand_made_divergence(tokenizer, rows):
    """A policy that gives one token all other odds than its reference, at every place."""
    models = PolicyModels(build_model("llama", tokenizer), None)
    models.policy.lm_head.weight.data.zero_()
    for model in (models.policy, models._copy):
        model.lm_head.weight.data.zero_()
    size = len(tokenizer)
    models.policy.lm_head.register_forward_hook(lambda _, __, out: out + math.log(3) * (torch.arange(size) == 7))
    found = run(models, rows, PLAIN, default_kl=True)[1].item()
    p = 3 / (size + 2)
    expected = p * math.log(p * size) + (1 - p) * math.log(size / (size + 2))
    assert found == pytest.approx(expected, rel=1e-4)
